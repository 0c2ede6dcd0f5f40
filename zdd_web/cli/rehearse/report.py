"""
What a rehearsal has shown: the requests of a load set against the handovers that happened meanwhile.

Pure: no I/O, no clock. What is counted is counted in tally.py, as the requests come; here it becomes a report.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zdd_web.cli.rehearse.changed_replies import Difference
from zdd_web.cli.rehearse.generator_health import GeneratorHealth
from zdd_web.cli.rehearse.samples import Handover, Kind, Outcome, PhaseSpan, Sample, ScenarioResult, StopResult
from zdd_web.cli.rehearse.tally import WINDOWS, Near, Tally, noticed_at
from zdd_web.cli.rehearse.timeline import Timeline

__all__ = ["Around", "Handover", "Kind", "Latency", "Loss", "Outcome", "Report", "Sample", "StopResult", "build"]

FORMAT = 1


@dataclass(frozen=True)
class Latency:
    """Of the complete replies in one window, in milliseconds; None where there was none."""

    requests: int
    p50: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True)
class Around:
    """One handover and the requests in flight within 1 s of it."""

    handover: Handover
    requests: int
    lost: int
    generations: tuple[int, ...]
    early_answers: int  # by the new generation, before it was let in
    longest_stall: float  # seconds without a complete reply to any client

    @property
    def seconds(self) -> float | None:
        """Give the time to handover."""
        ready = self.handover.ready_at
        return None if ready is None else ready - self.handover.requested_at


@dataclass(frozen=True)
class Loss:
    """One lost request: `at` in seconds since the load began, `offset` from the event it is nearest to."""

    sample: Sample
    at: float
    event: str  # "handover 3", "the stop", or empty
    offset: float

    @property
    def where(self) -> str:
        side = "after" if self.offset >= 0 else "before"
        return self.event and f"{self.offset:+.3f} s {side} {self.event}"


@dataclass(frozen=True)
class Report:
    """Everything a rehearsal has shown; see the module for the windows."""

    outcomes: dict[Outcome, int]
    generations: dict[int | None, int]  # requests by what answered, None for no or an unmarked reply
    latency: dict[str, Latency]
    handovers: tuple[Around, ...]
    losses: tuple[Loss, ...]
    differences: tuple[Difference, ...]  # replies that are not what the first generation answered
    stop: StopResult | None
    scenarios: tuple[ScenarioResult, ...] = ()
    phases: tuple[PhaseSpan, ...] = ()
    generator: GeneratorHealth | None = None
    interrupted: str = ""  # by what, and how far the rehearsal was then
    timeline: Timeline = field(default_factory=Timeline, compare=False)

    @property
    def requests(self) -> int:
        """Count the requests; a stale connection and an unsent request do not count."""
        return self.outcomes[Outcome.OK] + self.lost

    @property
    def lost(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome.lost)

    @property
    def excused(self) -> int:
        """Count the lost requests that were in the hands of a process which the rehearsal itself killed."""
        return sum(scenario.excused for scenario in self.scenarios)

    @property
    def different(self) -> int:
        """Count the replies that are not what the first generation answered; they are not lost."""
        return sum(difference.count for difference in self.differences)

    @property
    def early_answers(self) -> int:
        return sum(around.early_answers for around in self.handovers)

    @property
    def ok(self) -> bool:
        """Tell whether the promise held; a rehearsal without a request has shown nothing."""
        kept = self.requests > 0 and self.lost <= self.excused and not self.early_answers and not self.different
        happened = all(a.handover.ok for a in self.handovers) and all(each.ok for each in self.scenarios)
        happened = happened and (self.stop is None or self.stop.ok)
        return kept and happened and not self.interrupted

    @property
    def seconds_to_handover(self) -> tuple[float, float, float] | None:
        """Give the least, the median and the most over the handovers that succeeded."""
        times = [around.seconds for around in self.handovers if around.seconds is not None]
        return (min(times), statistics.median(times), max(times)) if times else None

    @property
    def longest_stall(self) -> float:
        return max((around.longest_stall for around in self.handovers), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """
        Give the report as JSON-ready values. Keys may be added; any other change raises `format`.

        `ok`, `requests`, `lost`, `early_answers`; `outcomes`: every outcome's count; `generations`: requests
        by generation, "unknown" for none; `latency_ms`: window -> `requests`, `p50`, `p99`, `max`;
        `seconds_to_handover`: `min`, `median`, `max`, or null; `longest_stall`: seconds; `handovers`: the
        fields of `Handover` and `Around` each; `losses`: the fields of `Sample`, then `at`, `event`,
        `offset`, `where` each, of the first `tally.MOST_LOSSES`; `stop`: the fields of `StopResult`, or null;
        `different`: a count, and `differences`: the fields of `Difference` each; `excused`: a count, and `scenarios`:
        the fields of `ScenarioResult` each; `phases`: the fields of `PhaseSpan` each; `generator`: the fields of
        `GeneratorHealth` and its `notes`, or null; `interrupted`: by what, or "".
        """
        times = self.seconds_to_handover
        return {
            "format": FORMAT,
            "ok": self.ok,
            "requests": self.requests,
            "lost": self.lost,
            "early_answers": self.early_answers,
            "outcomes": {outcome.value: count for outcome, count in self.outcomes.items()},
            "generations": {"unknown" if g is None else str(g): n for g, n in self.generations.items()},
            "latency_ms": {window: asdict(latency) for window, latency in self.latency.items()},
            "seconds_to_handover": dict(zip(("min", "median", "max"), times, strict=True)) if times else None,
            "longest_stall": self.longest_stall,
            "handovers": [_around_json(around) for around in self.handovers],
            "losses": [_loss_json(loss) for loss in self.losses],
            "stop": None if self.stop is None else asdict(self.stop),
            "different": self.different,
            "differences": [asdict(difference) for difference in self.differences],
            "excused": self.excused,
            "scenarios": [asdict(scenario) for scenario in self.scenarios],
            "phases": [asdict(span) for span in self.phases],
            "generator": None if self.generator is None else self.generator.to_json(),
            "interrupted": self.interrupted,
        }


def _around_json(around: Around) -> dict[str, Any]:
    values = asdict(around)
    return {
        **values.pop("handover"),
        "seconds": around.seconds,
        **values,
        "generations": list(around.generations),
    }


def _loss_json(loss: Loss) -> dict[str, Any]:
    values = asdict(loss)
    sample = values.pop("sample")
    return {**sample, "outcome": loss.sample.outcome.value, **values, "where": loss.where}


def build(samples: Sequence[Sample], handovers: Sequence[Handover], *, stop: StopResult | None) -> Report:
    """Set `samples` against `handovers`, in any order each, when all of both are known."""
    tally = Tally()
    for handover in sorted(handovers, key=lambda handover: handover.at):
        tally.handover(handover)
    tally.changes_at(min([*(h.requested_at for h in handovers), *([stop.requested_at] if stop else [])], default=None))
    for sample in sorted(samples, key=lambda sample: sample.ended):
        tally.append(sample)
    return of(tally, stop=stop)


def of(tally: Tally, *, stop: StopResult | None, scenarios: Sequence[ScenarioResult] = (), **others: Any) -> Report:
    """Make the report of what was tallied; `others` are fields of `Report` that no request has a part in."""
    tally.finish()
    return Report(
        outcomes={outcome: tally.outcomes[outcome] for outcome in Outcome},
        generations=dict(sorted(tally.generations.items(), key=lambda item: (item[0] is None, item[0] or 0))),
        latency={window: _latency(window, tally) for window in WINDOWS},
        handovers=tuple(_around(near) for near in tally.near),
        losses=tuple(_losses(tally, stop, scenarios)),
        differences=tally.comparison.differences(),
        stop=stop,
        scenarios=tuple(scenarios),
        timeline=tally.timeline,
        **others,
    )


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Take the nearest-rank percentile of ascending values: always one that was measured."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _latency(window: str, tally: Tally) -> Latency:
    measured = tally.latencies[window]
    return Latency(tally.arrived[window], measured.percentile(0.5), measured.percentile(0.99), measured.max)


def _around(near: Near) -> Around:
    return Around(
        handover=near.handover,
        requests=near.requests,
        lost=near.lost,
        generations=tuple(sorted(near.generations)),
        early_answers=near.early_answers,
        longest_stall=near.longest_stall,
    )


def _losses(tally: Tally, stop: StopResult | None, scenarios: Sequence[ScenarioResult]) -> Iterator[Loss]:
    begin = tally.began or 0.0
    events = [(near.handover.at, f"handover {near.handover.number}") for near in tally.near]
    events += [(scenario.begun_at, f"the {scenario.name}") for scenario in scenarios]
    events.sort()
    ats = [at for at, _ in events]
    for sample in sorted(tally.losses, key=noticed_at):
        at = noticed_at(sample)
        event, since = "", at
        if stop is not None and at >= stop.requested_at:
            event, since = "the stop", stop.requested_at
        elif events:
            index = bisect_left(ats, at)
            since, event = min(events[max(0, index - 1) : index + 1], key=lambda event: abs(event[0] - at))
        yield Loss(sample, at - begin, event, at - since)
