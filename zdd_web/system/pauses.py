"""Time in which this process itself was paused, which proves nothing about the processes that it watches.

SIGSTOP, a cgroup freezer (`docker pause`) and some hypervisors stop a whole tree of processes while CLOCK_MONOTONIC
runs on. When they resume, the first process to run finds that every other has been silent for a minute. So a process
that watches others notes each turn of its own loop: the time between the moment when the next turn was due and the
moment when it came is a pause, and is not counted in `since()`.

A loop that was late because the machine is overloaded looks the same and is treated the same: a process that has sent
heartbeats meanwhile is not affected, since only the time after its last heartbeat counts.

A process that has never called `turn()` has no pauses; a fork begins without any.
"""

from __future__ import annotations

import os
import time
from collections import deque

#: A watching loop turns at least once a second; later than this, in seconds, it was paused.
DUE_WITHIN = 1.5

#: How long the others have after a pause before silence counts again: one heartbeat, seconds.
HEARTBEAT = 1.0

#: How many pauses are remembered: the older ones lie before anything that is still waited for.
REMEMBERED = 16


class Pauses:
    """The pauses of one loop. Times are monotonic nanoseconds.

    >>> second = 10**9
    >>> pauses = Pauses()
    >>> pauses.turn(0 * second)
    >>> pauses.since(0 * second, now=1 * second)
    1.0
    >>> pauses.turn(61 * second)  # paused for a minute
    >>> pauses.since(0 * second, now=61 * second)
    1.5
    >>> pauses.turn(62 * second)
    >>> pauses.since(0 * second, now=63 * second)
    2.5
    """

    def __init__(self) -> None:
        #: When the next turn is due; 0 before the first one.
        self._due = 0
        self._spans: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)

    def turn(self, now: int) -> None:
        """Note that the loop has come round."""
        if self._due and now > self._due:
            self._spans.append((self._due, now + int(HEARTBEAT * 1e9)))
        self._due = now + int(DUE_WITHIN * 1e9)

    def since(self, instant: int, now: int) -> float:
        """Return the seconds since an instant, without the pauses; also without one that is not noted yet."""
        spans = list(self._spans)
        if self._due and now > self._due:
            spans.append((self._due, now))
        paused = sum(max(0, min(ended, now) - max(began, instant)) for began, ended in spans)
        return (now - instant - paused) / 1e9


_own = Pauses()


def turn() -> None:
    """Note that the loop of this process has come round; to be called at least once a second."""
    _own.turn(time.monotonic_ns())


def since(instant: int) -> float:
    """Return the seconds since an instant (monotonic nanoseconds), without those in which this process was paused."""
    return _own.since(instant, time.monotonic_ns())


def forget() -> None:
    """Forget all pauses, and that this process has a loop."""
    global _own
    _own = Pauses()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
