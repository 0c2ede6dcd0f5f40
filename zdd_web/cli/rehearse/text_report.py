"""A rehearsal's report for a terminal: the verdict first, then what it rests on."""

from __future__ import annotations

import textwrap

from zdd_web.cli.rehearse.plain_table import grid as tabulate
from zdd_web.cli.rehearse.report import Around, Outcome, Report

# A server that died loses thousands; the first ones show why.
_LOSSES_SHOWN = 40
_DIFFERENCES_SHOWN = 10
_WIDTH = 100


def text(report: Report) -> str:
    """Write a report for a person, who reads the first line and perhaps no more."""
    blocks = [
        "\n".join([verdict(report), *problems(report)]),
        "\n".join(_facts(report)),
        _latency(report),
    ]
    if report.handovers:
        blocks.append(_handovers(report))
    if report.scenarios:
        blocks.append(_scenarios(report))
    if report.losses:
        blocks.append(_losses(report))
    return "\n\n".join(blocks) + "\n"


def verdict(report: Report) -> str:
    """Say in one line how many requests were lost, and in what."""
    lost = f"{report.lost:,} of {report.requests:,} requests {'LOST' if report.lost > report.excused else 'lost'}"
    if report.lost and report.lost <= report.excused:
        lost += ", all with the process that was killed,"
    if report.different:
        lost += f", {report.different:,} replies DIFFERENT,"
    count = len(report.handovers)
    named = [f"{count} upgrade{'' if count == 1 else 's'}"]
    events = named if count or not (report.stop or report.scenarios) else []
    events += [f"a {scenario.name}" for scenario in report.scenarios]
    if report.stop is not None:
        events.append("a stop")
    listed = " and ".join(filter(None, (", ".join(events[:-1]), events[-1])))
    return f"{lost} in {listed}"


def problems(report: Report) -> list[str]:
    """Name what spoils a rehearsal besides a loss."""
    found = [f"INTERRUPTED: {report.interrupted}; this is what was measured"] if report.interrupted else []
    found += [] if report.requests else ["NOT PROVEN: no request was sent"]
    for around in report.handovers:
        name = f"handover {around.handover.number}"
        if not around.handover.ok:
            found.append(f"FAILED: {name}: {around.handover.reason or 'no reason known'}")
        if around.early_answers:
            answers = f"{around.early_answers:,} answers of generation {around.handover.to_generation}"
            found.append(f"TOO EARLY: {name}: {answers} before it was ready")
    for difference in report.differences[:_DIFFERENCES_SHOWN]:
        source = f" from generation {difference.generation}" if difference.generation is not None else ""
        replies = f"{difference.count:,} repl{'y' if difference.count == 1 else 'ies'} to GET {difference.path}"
        what = difference.what.replace("before", "before the first upgrade")
        found.append(f"DIFFERENT: {replies}{source}: {what}")
    if (more := len(report.differences) - _DIFFERENCES_SHOWN) > 0:
        found.append(f"DIFFERENT: in {more:,} more ways, all of them in the JSON report")
    for scenario in report.scenarios:
        if not scenario.ok:
            found.append(f"FAILED: the {scenario.name}: {scenario.reason}")
        if scenario.excused:
            held = f"{scenario.excused:,} of the lost requests were in the hands of the process that"
            found.append(f"NOTE: {held} {scenario.name} killed, and could not be saved")
    if report.stop is not None and not report.stop.ok:
        found.append(f"FAILED: the stop: {report.stop.reason or 'no reason known'}")
    if unsent := report.outcomes[Outcome.UNSENT]:
        found.append(f"NOTE: {unsent:,} requests not sent for want of ports or descriptors on this machine")
    if report.generator is not None:
        found += [f"NOTE: {note}" for note in report.generator.notes]
    return found


def _facts(report: Report) -> list[str]:
    outcomes = [f"{o.value} {n:,}" for o, n in report.outcomes.items() if n or o is Outcome.OK]
    lines = [f"outcomes          {', '.join(outcomes)}"]
    answers = ", ".join(f"{'unknown' if g is None else g}: {n:,}" for g, n in report.generations.items())
    lines += textwrap.wrap(answers, _WIDTH, initial_indent="by generation     ", subsequent_indent=" " * 18)
    if times := report.seconds_to_handover:
        low, median, high = times
        lines.append(f"time to handover  {low:.2f} s min, {median:.2f} s median, {high:.2f} s max")
    if report.handovers:
        lines.append(f"longest stall     {report.longest_stall * 1000:,.0f} ms without an answer around a handover")
    if (stop := report.stop) is not None:
        status = "no exit status" if stop.exit_status is None else f"exit status {stop.exit_status}"
        seconds = stop.ended_at - stop.requested_at
        lines.append(f"stop              {seconds:.2f} s, {stop.in_flight:,} requests in flight, {status}")
    return lines


def _latency(report: Report) -> str:
    meaning = {
        "steady": "further than 1 s from every handover",
        "before": "arrived in the second before one",
        "around": "in flight within 1 s of one",
        "after": "arrived 1 to 2 s after one",
    }
    rows = [
        (window, f"{latency.requests:,}", latency.p50, latency.p99, latency.max, meaning[window])
        for window, latency in report.latency.items()
        if latency.requests or window == "steady"
    ]
    return tabulate(
        rows,
        headers=("latency", "requests", "p50 ms", "p99 ms", "max ms", ""),
        floatfmt=".1f",
        missingval="-",
        colalign=("left", "right", "right", "right", "right", "left"),
        disable_numparse=[1],
    )


def _handovers(report: Report) -> str:
    return tabulate(
        [_handover(around) for around in report.handovers],
        headers=(
            "handover",
            "generations",
            "seconds",
            "requests",
            "lost",
            "early",
            "stall ms",
            "answered by",
            "",
        ),
        floatfmt=".2f",
        missingval="-",
        colalign=("right", "left", "right", "right", "right", "right", "right", "left", "left"),
        disable_numparse=[1, 3, 6, 7],
    )


def _handover(around: Around) -> tuple[object, ...]:
    handover = around.handover
    return (
        handover.number,
        f"{handover.from_generation} > {handover.to_generation}",
        around.seconds,
        f"{around.requests:,}",
        around.lost,
        around.early_answers,
        f"{around.longest_stall * 1000:,.0f}",
        " ".join(map(str, around.generations)) or "-",
        "ok" if handover.ok and not around.lost and not around.early_answers else "NOT OK",
    )


def _scenarios(report: Report) -> str:
    rows = [
        (
            each.name,
            each.ended_at - each.begun_at,
            f"{each.requests:,}",
            each.lost,
            each.detail,
            "ok" if each.ok and each.lost <= each.excused else "NOT OK",
        )
        for each in report.scenarios
    ]
    return tabulate(
        rows,
        headers=("scenario", "seconds", "requests", "lost", "what happened", ""),
        floatfmt=".2f",
        colalign=("left", "right", "right", "right", "left", "left"),
        disable_numparse=[2],
        maxcolwidths=[None, None, None, None, 50, None],
    )


def _losses(report: Report) -> str:
    rows = [
        (
            f"{loss.at:.3f} s",
            loss.where or "-",
            loss.sample.kind,
            loss.sample.path,
            loss.sample.outcome.value,
            " ".join(filter(None, (str(loss.sample.status or ""), loss.sample.detail))),
        )
        for loss in report.losses[:_LOSSES_SHOWN]
    ]
    table = tabulate(
        rows,
        headers=("lost at", "where", "client", "path", "outcome", "detail"),
        colalign=("right", "left", "left", "left", "left", "left"),
        disable_numparse=True,
    )
    if (more := report.lost - len(rows)) > 0:
        kept = "all of them" if len(report.losses) == report.lost else f"the first {len(report.losses):,}"
        table += f"\n... and {more:,} more, {kept} in the JSON report"
    return table
