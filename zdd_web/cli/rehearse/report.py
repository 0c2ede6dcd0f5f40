"""
What a rehearsal has shown: the samples of a load set against the handovers that happened meanwhile.

Pure: no I/O, no clock. All times are `time.monotonic()` seconds of one machine. A handover happens *at* its
`ready_at`, a failed one, which has none, at its `done_at`. A request arrives at `started` and is in flight
until `ended`. `steady` and `around` split the requests, `before` and `after` are slices of the two:

- `steady`: not in flight at any moment within 1 s of a handover;
- `before`: arrived in the second before a handover;
- `around`: in flight at some moment within 1 s of a handover;
- `after`: arrived in the second that begins 1 s after a handover.
"""

from __future__ import annotations

import enum
import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from zdd_web.cli.rehearse.replies import Difference, compare

FORMAT = 1
NEAR = 1.0  # seconds
WINDOWS = ("steady", "before", "around", "after")

Kind = Literal["new", "keepalive", "thinking"]


class Outcome(str, enum.Enum):
    """What became of one request."""

    OK = "ok"
    STALE = "stale"  # kept-alive connection found closed before the request was written; retried
    UNSENT = "unsent"  # the generator had no port, descriptor or memory left
    REFUSED = "refused"
    RESET = "reset"  # RST on a fresh connection without a byte of reply
    CLOSED = "closed"  # end of file on a fresh connection without a byte of reply
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server_error"  # a complete reply with a 5xx status
    KEEPALIVE_RACE = "keepalive_race"  # written on a reused connection, then reset or closed without a byte
    INVALID = "invalid"  # the bytes are no HTTP, more than one reply, or the reply to another request

    @property
    def lost(self) -> bool:
        """Tell whether a user would have missed an answer."""
        return self not in (Outcome.OK, Outcome.STALE, Outcome.UNSENT)

    @property
    def answered(self) -> bool:
        """Tell whether a complete reply arrived, whatever it said."""
        return self in (Outcome.OK, Outcome.SERVER_ERROR)


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One request.

    `started` is before connecting; `connection_opened` is None if there never was a connection; `generation`
    is the reply's `X-Zdd-Generation`; `detail` an errno name or a few words. `length` and `digest` are those of the
    reply's body, without digits: see replies.py.
    """

    client: int
    kind: Kind
    path: str
    connection_opened: float | None
    started: float
    ended: float
    outcome: Outcome
    status: int | None = None
    generation: int | None = None
    detail: str = ""
    length: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Handover:
    """One upgrade as the controller saw it; `ready_at`, None if it failed, is when the gate opened."""

    number: int
    from_generation: int
    to_generation: int
    requested_at: float
    ready_at: float | None
    done_at: float
    ok: bool
    reason: str = ""

    @property
    def at(self) -> float:
        return self.done_at if self.ready_at is None else self.ready_at


@dataclass(frozen=True)
class StopResult:
    """The stop that ended the rehearsal; `in_flight` counts the requests in hand when it was asked for."""

    requested_at: float
    ended_at: float
    exit_status: int | None
    in_flight: int
    ok: bool
    reason: str = ""


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
    longest_stall: float  # seconds without a complete reply to anybody

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
    generations: dict[int | None, int]  # requests by who answered, None for nobody or an unmarked reply
    latency: dict[str, Latency]
    handovers: tuple[Around, ...]
    losses: tuple[Loss, ...]
    differences: tuple[Difference, ...]  # replies that are not what the first generation answered
    stop: StopResult | None

    @property
    def requests(self) -> int:
        """Count the requests; a stale connection and an unsent request are none."""
        return self.outcomes[Outcome.OK] + self.lost

    @property
    def lost(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome.lost)

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
        kept = self.requests > 0 and not self.lost and not self.early_answers and not self.different
        return kept and all(a.handover.ok for a in self.handovers) and (self.stop is None or self.stop.ok)

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
        `offset`, `where` each; `stop`: the fields of `StopResult`, or null; `different`: a count, and
        `differences`: the fields of `Difference` each.
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
    """Set `samples` against `handovers`, in any order each."""
    handovers = sorted(handovers, key=lambda handover: handover.at)
    requests = [s for s in samples if s.outcome is Outcome.OK or s.outcome.lost]
    counts = Counter(s.outcome for s in samples)
    first_change = [*(h.requested_at for h in handovers), *([stop.requested_at] if stop else [])]
    generations = Counter(s.generation for s in requests)
    return Report(
        outcomes={outcome: counts[outcome] for outcome in Outcome},
        generations=dict(sorted(generations.items(), key=lambda item: (item[0] is None, item[0] or 0))),
        latency=_latencies(requests, [handover.at for handover in handovers]),
        handovers=_around(requests, handovers),
        losses=_losses(requests, handovers, stop),
        differences=compare(requests, until=min(first_change, default=math.inf)),
        stop=stop,
    )


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Take the nearest-rank percentile of ascending values: always one that was measured."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _latencies(requests: Sequence[Sample], ats: Sequence[float]) -> dict[str, Latency]:
    counts = dict.fromkeys(WINDOWS, 0)
    values: dict[str, list[float]] = {window: [] for window in WINDOWS}
    for sample in requests:
        for window in _windows(sample, ats):
            counts[window] += 1
            if sample.outcome.answered:
                values[window].append((sample.ended - sample.started) * 1000)
    result = {}
    for window, measured in values.items():
        measured.sort()
        p50, p99 = percentile(measured, 0.5), percentile(measured, 0.99)
        result[window] = Latency(counts[window], p50, p99, measured[-1] if measured else None)
    return result


def _windows(sample: Sample, ats: Sequence[float]) -> list[str]:
    def any_within(low: float, high: float) -> bool:
        return bisect_right(ats, high) > bisect_left(ats, low)

    started = sample.started
    found = ["around" if any_within(started - NEAR, sample.ended + NEAR) else "steady"]
    if any_within(started, started + NEAR):
        found.append("before")
    if any_within(started - 2 * NEAR, started - NEAR):
        found.append("after")
    return found


def _around(requests: Sequence[Sample], handovers: Sequence[Handover]) -> tuple[Around, ...]:
    ats = [handover.at for handover in handovers]
    near: list[list[Sample]] = [[] for _ in handovers]
    for sample in requests:
        for index in range(bisect_left(ats, sample.started - NEAR), bisect_right(ats, sample.ended + NEAR)):
            near[index].append(sample)
    gaps = _gaps(requests)
    return tuple(
        Around(
            handover=handover,
            requests=len(close),
            lost=sum(s.outcome.lost for s in close),
            generations=tuple(sorted({s.generation for s in close if s.generation is not None})),
            early_answers=_early_answers(requests, handover, handovers),
            longest_stall=max(
                (end - begin for begin, end in gaps if end >= handover.at - NEAR and begin <= handover.at + NEAR),
                default=0.0,
            ),
        )
        for handover, close in zip(handovers, near, strict=True)
    )


def _early_answers(requests: Sequence[Sample], handover: Handover, handovers: Sequence[Handover]) -> int:
    # A generation that never got ready must never answer; but the next attempt may bear its number.
    namesakes = [h for h in handovers if h.to_generation == handover.to_generation and h is not handover]
    begin = max((h.done_at for h in namesakes if h.at < handover.at), default=-math.inf)
    end = handover.ready_at
    if end is None:
        end = min((h.requested_at for h in namesakes if h.at > handover.at), default=math.inf)
    return sum(s.generation == handover.to_generation and begin <= s.ended < end for s in requests)


def _gaps(requests: Sequence[Sample]) -> list[tuple[float, float]]:
    """Pair consecutive complete replies; begin and end of the load count, or a dead server shows no stall."""
    if not requests:
        return []
    ends = sorted(s.ended for s in requests if s.outcome.answered)
    points = [min(s.started for s in requests), *ends, max(s.ended for s in requests)]
    return list(itertools.pairwise(points))


def _losses(requests: Sequence[Sample], handovers: Sequence[Handover], stop: StopResult | None) -> tuple[Loss, ...]:
    begin = min((s.started for s in requests), default=0.0)
    found = []
    for sample in requests:
        if sample.outcome.lost:
            # A timeout's cause lies near its beginning; every other loss is noticed as it happens.
            at = sample.started if sample.outcome is Outcome.TIMEOUT else sample.ended
            event, since = "", at
            if stop is not None and at >= stop.requested_at:
                event, since = "the stop", stop.requested_at
            elif handovers:
                nearest = min(handovers, key=lambda handover: abs(handover.at - at))
                event, since = f"handover {nearest.number}", nearest.at
            found.append(Loss(sample, at - begin, event, at - since))
    return tuple(sorted(found, key=lambda loss: loss.at))
