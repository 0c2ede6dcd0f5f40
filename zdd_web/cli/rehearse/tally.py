"""Counts requests against handovers as they come: memory and time do not grow with what has been counted.

A handover happens *at* its `ready_at`, a failed one, which has none, at its `done_at`. A request arrives at `started`
and is in flight until `ended`. `steady` and `around` split the requests, `before` and `after` are parts of the two:

- `steady`: not in flight at any moment within 1 s of a handover;
- `before`: arrived in the second before a handover;
- `around`: in flight at some moment within 1 s of a handover;
- `after`: arrived in the second that begins 1 s after a handover.

So a request can be placed only when it is known whether a handover came within a second. Until then its times wait in
four arrays, of 21 bytes a request: for a second, or as long as an upgrade takes. All else is counted at once.
"""

from __future__ import annotations

import math
import threading
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from zdd_web.cli.rehearse.changed_replies import Comparison
from zdd_web.cli.rehearse.latencies import Latencies
from zdd_web.cli.rehearse.samples import NEAR, Handover, Outcome, Sample
from zdd_web.cli.rehearse.timeline import Timeline

WINDOWS = ("steady", "before", "around", "after")

#: Lost requests that are kept whole, the first ones; all are counted. A server that died loses thousands a second.
MOST_LOSSES = 10_000

#: Requests are placed in batches.
_BATCH = 1024

_OK, _STALE, _UNSENT = Outcome.OK, Outcome.STALE, Outcome.UNSENT
_LOST, _ANSWERED = 1, 2
#: In place of a generation that is not known.
_UNKNOWN = -1


def noticed_at(sample: Sample) -> float:
    """Return when a loss was caused: of a timeout near its beginning; every other loss is noticed as it happens."""
    return sample.started if sample.outcome is Outcome.TIMEOUT else sample.ended


@dataclass
class Near:
    """A handover and what is counted around it."""

    handover: Handover
    requests: int = 0
    lost: int = 0
    generations: set[int] = field(default_factory=set)
    early_answers: int = 0
    longest_stall: float = 0.0


class Tally:
    """Takes requests from the load's thread, in the order in which they ended, and handovers from the controller's."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.generations: Counter[int | None] = Counter()
        self.arrived = dict.fromkeys(WINDOWS, 0)
        self.latencies = {window: Latencies() for window in WINDOWS}
        self.losses: list[Sample] = []
        self.comparison = Comparison()
        self.timeline = Timeline()
        #: In the order of their instants, as `_ats`.
        self.near: list[Near] = []
        #: When the first request arrived and the last one ended.
        self.began: float | None = None
        self._ended = 0.0
        self._ats: list[float] = []
        self._attempts: defaultdict[int, list[Near]] = defaultdict(list)
        #: Replies of generations that no handover is known to have led to.
        self._unclaimed: Counter[int] = Counter()
        self._open = math.inf
        self._first_answer: float | None = None
        self._last_answer: float | None = None
        self._starts, self._ends = array("d"), array("d")
        self._by, self._flags = array("l"), array("b")
        self._finished = False
        self._lock = threading.Lock()

    def append(self, sample: Sample) -> None:
        """Take a request."""
        with self._lock:
            outcome = sample.outcome
            self.outcomes[outcome] += 1
            if outcome is _OK:
                flags = _ANSWERED
                self.comparison.add(sample)
            elif outcome is _STALE or outcome is _UNSENT:
                return
            else:
                flags = (_LOST if outcome.lost else 0) | (_ANSWERED if outcome.answered else 0)
                if outcome.lost and len(self.losses) < MOST_LOSSES:
                    self.losses.append(sample)
            generation, started, ended = sample.generation, sample.started, sample.ended
            self.generations[generation] += 1
            if self.began is None or started < self.began:
                self.began = started
            if ended > self._ended:
                self._ended = ended
            self.timeline.add(sample)
            self._starts.append(started)
            self._ends.append(ended)
            self._by.append(_UNKNOWN if generation is None else generation)
            self._flags.append(flags)
            if not len(self._ends) % _BATCH:
                self._place(min(self._ended, self._open) - NEAR)

    def totals(self) -> tuple[int, int]:
        """Return how many requests there were so far, and how many of them were lost."""
        with self._lock:
            lost = sum(count for outcome, count in self.outcomes.items() if outcome.lost)
            return self.outcomes[_OK] + lost, lost

    def answers_of(self, generation: int) -> int:
        """Return how many replies a generation has sent so far."""
        with self._lock:
            return self.generations[generation]

    def changes_at(self, at: float | None) -> None:
        """Take the instant from which replies may differ; only the first one counts."""
        if at is not None:
            with self._lock:
                self.comparison.until = min(self.comparison.until, at)

    def expect(self, at: float) -> None:
        """An upgrade is about to be asked for: no handover comes before `at`, one may come later."""
        self.changes_at(at)
        with self._lock:
            self._open = at

    def handover(self, handover: Handover) -> None:
        """Take an upgrade that has succeeded or failed."""
        with self._lock:
            near = Near(handover)
            insort(self.near, near, key=lambda each: each.handover.at)
            insort(self._ats, handover.at)
            attempts = self._attempts[handover.to_generation]
            if not attempts:
                near.early_answers = self._unclaimed.pop(handover.to_generation, 0)
            attempts.append(near)
            self._open = math.inf

    def finish(self) -> None:
        """Place all requests: there are no more, nor handovers."""
        with self._lock:
            self._place(math.inf)
            if self.began is not None and not self._finished:
                # Begin and end of the load count as answers here, or a dead server would show no stall.
                self._stall(self.began, self._ended if self._first_answer is None else self._first_answer)
                if self._last_answer is not None:
                    self._stall(self._last_answer, self._ended)
                self._finished = True

    def _place(self, before: float) -> None:
        """Count the requests that ended before an instant, for which all handovers that matter are known."""
        ends = self._ends
        count = bisect_left(ends, before)
        if not count:
            return
        quiet = self._ats[-1] if self._ats else -math.inf
        arrived, steady, latest = self.arrived, self.latencies["steady"].add, self._last_answer
        claimed = self._attempts
        for started, ended, generation, flags in zip(
            self._starts[:count], ends[:count], self._by[:count], self._flags[:count], strict=True
        ):
            if flags & _ANSWERED:
                if latest is None:
                    self._first_answer = ended
                elif latest - NEAR <= quiet:
                    self._stall(latest, ended)
                latest = ended
            if started - 2 * NEAR > quiet:
                arrived["steady"] += 1
                if flags & _ANSWERED:
                    steady((ended - started) * 1000)
            else:
                self._window(started, ended, generation, flags)
            if generation != _UNKNOWN:
                if generation in claimed:
                    self._early(generation, ended)
                else:
                    self._unclaimed[generation] += 1
        self._last_answer = latest
        for each in (self._starts, self._ends, self._by, self._flags):
            del each[:count]

    def _window(self, started: float, ended: float, generation: int, flags: int) -> None:
        ats = self._ats
        first, last = bisect_left(ats, started - NEAR), bisect_right(ats, ended + NEAR)
        windows = ["around" if first < last else "steady"]
        if bisect_right(ats, started + NEAR) > bisect_left(ats, started):
            windows.append("before")
        if bisect_right(ats, started - NEAR) > bisect_left(ats, started - 2 * NEAR):
            windows.append("after")
        for window in windows:
            self.arrived[window] += 1
            if flags & _ANSWERED:
                self.latencies[window].add((ended - started) * 1000)
        for near in self.near[first:last]:
            near.requests += 1
            near.lost += flags & _LOST
            if generation != _UNKNOWN:
                near.generations.add(generation)

    def _early(self, generation: int, ended: float) -> None:
        # A generation that never got ready must never answer; but the next attempt may bear its number.
        attempts = self._attempts[generation]
        begin = -math.inf
        for index, near in enumerate(attempts):
            end = near.handover.ready_at
            if end is None:
                end = attempts[index + 1].handover.requested_at if index + 1 < len(attempts) else math.inf
            if begin <= ended < end:
                near.early_answers += 1
                return
            begin = near.handover.done_at

    def _stall(self, begin: float, end: float) -> None:
        ats = self._ats
        for near in self.near[bisect_left(ats, begin - NEAR) : bisect_right(ats, end + NEAR)]:
            near.longest_stall = max(near.longest_stall, end - begin)
