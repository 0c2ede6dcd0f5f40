"""Approximate FIFO order across several accept queues.

The kernel does not say since when a connection waits, and the queues of a port are filled by chance: workers that look
into them in any fixed order let some wait for two or three times as long as others. So workers note, in memory that all
of them share, when one first saw how many wait in each. Under load a worker looks at every request; where requests are
so short that this would cost more than it brings, once in a while.

Several processes write without a lock, which one that is killed or stopped would hold. What two of them do at once may
cost a connection its place; the next look puts the numbers right by the kernel's.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

#: Arrival times are noted for at most so many connections of one queue.
MOST = 62

#: How long a look is good enough for all workers, nanoseconds: little next to a wait that anybody would notice.
LOOK_EVERY = 1_000_000

_TAKEN, _SEEN, _STAMPS, _WORDS = 0, 1, 2, 2 + MOST
_NOW = 1 << 64


class Arrivals:
    """Shared by all processes that are forked later.

    >>> arrivals = Arrivals(2)
    >>> arrivals.note(0, waiting=1, now=10), arrivals.note(1, waiting=1, now=20), arrivals.note(0, waiting=2, now=30)
    (None, None, None)
    >>> arrivals.in_order([1, 0])
    [0, 1]
    >>> arrivals.taken(0)
    >>> arrivals.in_order([1, 0])
    [1, 0]
    """

    def __init__(self, queues: int) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * (_WORDS * queues + 1))).cast("Q")
        self._looked_at = _WORDS * queues

    def is_due(self, now: int) -> bool:
        """Tell whether it is time for a look, and that the caller is to take it."""
        words, at = self._words, self._looked_at
        if now - words[at] < LOOK_EVERY:
            return False
        words[at] = now
        return True

    def note(self, queue: int, waiting: int, now: int) -> None:
        """Note how many wait in a queue."""
        words, at = self._words, queue * _WORDS
        seen = words[at + _SEEN]
        taken = min(words[at + _TAKEN], seen)
        if seen - taken > waiting:
            # Accepted by a process that has not noted it, or not yet.
            taken = seen - waiting
        stamps = at + _STAMPS
        while seen - taken < waiting and seen - taken < MOST:
            words[stamps + seen % MOST] = now
            seen += 1
        words[at + _TAKEN], words[at + _SEEN] = taken, seen

    def in_order(self, queues: Iterable[int]) -> list[int]:
        """Return the queues in which a connection waits, that with the longest wait first."""
        words = self._words
        came = []
        for queue in queues:
            at = queue * _WORDS
            taken = words[at]
            # No process has seen this connection: it is taken for the last to arrive.
            came.append((words[at + _STAMPS + taken % MOST] if taken < words[at + _SEEN] else _NOW, queue))
        came.sort()
        return [queue for _, queue in came]

    def taken(self, queue: int) -> None:
        """Note that the first one was accepted."""
        self._words[queue * _WORDS + _TAKEN] += 1
