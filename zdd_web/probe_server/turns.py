"""Which connection is answered next, when many wait.

A client of the probe port can send any number of requests at once, on as many connections as it likes. A connection
that has something to answer waits here for its turn, and in a turn it gets one answer. The loop looks at its sockets
between two rounds, so that a probe which arrives meanwhile does not wait for all those that were there before.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

#: How long a round takes, seconds; a request alone takes a tenth to half a millisecond.
ROUND = 0.001


class Rank(enum.IntEnum):
    """What goes first. A prober waits for each answer before it asks again: what is sent behind that can wait."""

    LIVENESS = 0
    OTHER = 1
    PIPELINED = 2


class Turns(Generic[T]):
    """Queues, one for each rank.

    >>> turns = Turns()
    >>> for name, rank in (("metrics", Rank.PIPELINED), ("readyz", Rank.OTHER), ("livez", Rank.LIVENESS)):
    ...     turns.add(name, rank)
    >>> list(turns.round())
    ['livez', 'readyz', 'metrics']
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._queues: tuple[deque[T], ...] = tuple(deque() for _ in Rank)

    def add(self, item: T, rank: Rank) -> None:
        """Have an item wait for its turn, behind all others of its rank."""
        self._queues[rank].append(item)

    def round(self) -> Iterator[T]:
        """Yield those whose turn it is until the round's time is over, at least one of each rank.

        What is added meanwhile waits for the next round.
        """
        ends = self._now() + ROUND
        for queue, count in [(queue, len(queue)) for queue in self._queues]:
            for number in range(count):
                if number and self._now() >= ends:
                    break
                yield queue.popleft()

    def __len__(self) -> int:
        return sum(map(len, self._queues))
