"""The charts of the page: pure functions from a report to SVG, and to labels that keep their size on a phone.

An SVG here has 1000 units for its width and is stretched to whatever width the page has. So it holds no text: that
stands beside and above it, in HTML, at a share of the width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from zdd_web.cli.rehearse.report import Report
from zdd_web.cli.rehearse.tally import noticed_at
from zdd_web.cli.rehearse.timeline import Slice

WIDTH = 1000.0
#: Points of a curve: more than a screen shows only make the file larger.
POINTS = 320
#: Generations that have a row each; of more, rows are shared.
ROWS = 24
#: Colours of generations, over and over.
COLOURS = 4


@dataclass(frozen=True)
class Event:
    """Something that was done to the service, for a vertical line."""

    begun_at: float
    ended_at: float
    what: str
    outcome: str
    ok: bool


@dataclass(frozen=True)
class Frame:
    """The time that all charts share: `begin` and `end` in monotonic seconds."""

    begin: float
    end: float

    @classmethod
    def of(cls, report: Report) -> Frame:
        """Return the span from the first request to the last thing that happened."""
        line = report.timeline
        begin = line.origin
        if begin is None:
            begin = min((span.begun_at for span in report.phases), default=0.0)
        ends = [begin + len(line.slices) * line.width, *(event.ended_at for event in events(report))]
        return cls(begin, max(*ends, begin + 1e-3))

    def x(self, at: float) -> float:
        """Return the place of an instant, 0 to `WIDTH`."""
        return WIDTH * min(1.0, max(0.0, (at - self.begin) / (self.end - self.begin)))

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Yield places and labels of round seconds, at most seven."""
        span = self.end - self.begin
        step = round_up(span / 6)
        for n in range(int(span / step) + 1):
            yield self.x(self.begin + n * step), f"{n * step:g} s"


def round_up(value: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ...

    >>> round_up(0.3), round_up(7), round_up(1000)
    (0.5, 10.0, 1000.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= value * (1 - 1e-9))


def events(report: Report) -> list[Event]:
    """Return what was done, in the order of time."""
    found = [
        Event(
            each.handover.requested_at,
            each.handover.done_at,
            f"upgrade to generation {each.handover.to_generation}",
            each.handover.reason or f"{each.requests:,} requests around it, {each.lost:,} lost",
            each.handover.ok and not each.lost and not each.early_answers,
        )
        for each in report.handovers
    ]
    found += [
        Event(
            each.begun_at,
            each.ended_at,
            each.name,
            each.reason or f"{each.detail}; {each.requests:,} requests, {each.lost:,} lost".removeprefix("; "),
            each.ok and each.lost <= each.excused,
        )
        for each in report.scenarios
    ]
    if (stop := report.stop) is not None:
        outcome = stop.reason or f"exit status {stop.exit_status}, {stop.in_flight:,} requests were in flight"
        found.append(Event(stop.requested_at, stop.ended_at, "stop", outcome, stop.ok))
    return sorted(found, key=lambda event: event.begun_at)


def merged(slices: Sequence[Slice]) -> tuple[list[Slice], int]:
    """Return at most `POINTS` slices, and how many of the given ones each of them is."""
    replies = sum(sum(each.answered.values()) for each in slices)
    # Of a few requests a point shows chance: it should have twenty.
    of = max(1, math.ceil(len(slices) / min(POINTS, max(40, replies // 20))))
    found = []
    for at in range(0, len(slices), of):
        whole = Slice()
        for each in slices[at : at + of]:
            whole.merge(each)
        found.append(whole)
    return found, of


def _svg(height: float, inner: str, name: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" preserveAspectRatio="none" role="img" aria-label="{escape(name)}">'
        f"{inner}</svg>"
    )


def colour(generation: int | None) -> str:
    """Return the class that gives a generation its colour."""
    return "gx" if generation is None else f"g{(generation - 1) % COLOURS}"


def _lines(report: Report, frame: Frame, height: float) -> str:
    """Shade what was done while it was done."""
    found = []
    for event in events(report):
        x, to = frame.x(event.begun_at), frame.x(event.ended_at)
        found.append(f'<rect class="event" x="{x:.2f}" y="0" width="{max(to - x, 0.8):.2f}" height="{height:g}"/>')
    return "".join(found)


def rates(report: Report, frame: Frame) -> tuple[str, float]:
    """Return the chart of replies a second, stacked by generation, and the rate at its upper edge."""
    height = 100.0
    slices, of = merged(report.timeline.slices)
    width = report.timeline.width * of
    top = round_up(max((sum(each.answered.values()) for each in slices), default=0) / width)
    known = [generation for generation in report.generations if generation is not None]
    order: list[int | None] = [*known, None]
    levels = [0.0] * len(slices)
    origin = report.timeline.origin or 0.0
    paths = []
    for generation in order:
        there = [n for n, each in enumerate(slices) if each.answered.get(generation)]
        if not there:
            continue
        span = range(there[0], there[-1] + 1)
        upper, lower = [], []
        for n in span:
            left, right = frame.x(origin + n * width), frame.x(origin + (n + 1) * width)
            low = levels[n]
            levels[n] = low + slices[n].answered.get(generation, 0) / width
            for x in (left, right):
                upper.append(f"{x:.1f},{height * (1 - levels[n] / top):.2f}")
                lower.append(f"{x:.1f},{height * (1 - low / top):.2f}")
        name = "not marked with a generation" if generation is None else f"generation {generation}"
        title = f"<title>{name}: {report.generations.get(generation, 0):,} requests</title>"
        points = " ".join([*upper, *reversed(lower)])
        paths.append(f'<polygon class="{colour(generation)}" points="{points}">{title}</polygon>')
    grid = f'<path class="grid" d="M0 0H{WIDTH:g}M0 {height / 2:g}H{WIDTH:g}"/>'
    return _svg(height, grid + _lines(report, frame, height) + "".join(paths), "replies per second"), top


def latency(report: Report, frame: Frame) -> tuple[str, list[tuple[float, str]]]:
    """Return the chart of latency on a logarithmic scale, and the labels of its axis: share from above, and text."""
    height = 100.0
    slices, of = merged(report.timeline.slices)
    width = report.timeline.width * of
    origin = report.timeline.origin or 0.0
    worst = max((each.slowest for each in slices), default=1.0)
    decades = max(2, math.ceil(math.log10(max(worst, 1.0) * 1.0001)))

    def y(ms: float) -> float:
        return height * (1 - math.log10(max(ms, 1.0)) / decades)

    def curve(name: str, values: Sequence[float | None]) -> str:
        d, pen = [], "M"
        for n, value in enumerate(values):
            if value is None:
                pen = "M"  # nothing was answered: a gap, and no line over it
                continue
            d.append(f"{pen}{frame.x(origin + (n + 0.5) * width):.1f} {y(value):.2f}")
            pen = "L"
        return f'<path class="curve {name}" d="{"".join(d)}"/>'

    curves = [
        curve("slowest", [each.slowest if each.latencies else None for each in slices]),
        curve("p99", [each.percentile(0.99) for each in slices]),
        curve("p50", [each.percentile(0.5) for each in slices]),
    ]
    labels = [(n / decades, f"{10 ** (decades - n):,} ms") for n in range(decades + 1)]
    grid = "".join(f"M0 {height * share:.2f}H{WIDTH:g}" for share, _ in labels[:-1])
    svg = f'<path class="grid" d="{grid}"/>' + _lines(report, frame, height) + "".join(curves)
    return _svg(height, svg, "latency"), labels


def losses(report: Report, frame: Frame) -> str:
    """Return the marks of lost requests, each at its instant."""
    height = 10.0
    places: dict[int, int] = {}
    instants = [(noticed_at(loss.sample), 1) for loss in report.losses]
    if len(report.losses) < report.lost:
        # Not all were kept, but the slices know of all.
        origin, width = report.timeline.origin or 0.0, report.timeline.width
        instants = [(origin + (n + 0.5) * width, each.lost) for n, each in enumerate(report.timeline.slices)]
    for at, count in instants:
        place = round(frame.x(at))
        places[place] = places.get(place, 0) + count
    marks = "".join(
        f'<rect class="lost" x="{x - 1.5:g}" y="0" width="3" height="{height:g}"><title>{n:,} lost</title></rect>'
        for x, n in sorted(places.items())
        if n
    )
    return _svg(height, _lines(report, frame, height) + marks, f"{report.lost:,} lost requests")


def phases(report: Report, frame: Frame) -> list[tuple[str, str]]:
    """Return a row for each generation, its label and its SVG; rows are shared when there are too many."""
    height = 10.0
    numbers = sorted({span.generation for span in report.phases})
    shared = len(numbers) > ROWS
    rows: dict[int, list[str]] = {}
    for span in report.phases:
        if span.ended_at < frame.begin:
            continue
        row = numbers.index(span.generation) % 4 if shared else span.generation
        x, to = frame.x(span.begun_at), frame.x(span.ended_at)
        title = f"generation {span.generation}: {span.phase}, {span.ended_at - span.begun_at:.2f} s"
        rows.setdefault(row, []).append(
            f'<rect class="{colour(span.generation)} {escape(span.phase)}" x="{x:.2f}" y="1" '
            f'width="{max(to - x, 0.6):.2f}" height="{height - 2:g}"><title>{escape(title)}</title></rect>'
        )
    found = []
    for row, rects in sorted(rows.items()):
        label = f"{row + 1}, {row + 5}, ..." if shared else str(row)
        found.append((label, _svg(height, _lines(report, frame, height) + "".join(rects), f"generation {label}")))
    return found
