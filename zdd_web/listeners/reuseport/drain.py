"""Leave a port that other masters stay on: bpf.py has the mechanism; here are the peers, and when it is over."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zdd_web.listeners.accept_queue import is_full
from zdd_web.listeners.reuseport import bpf
from zdd_web.system import clock

#: A SYN-ACK that was lost is sent again after a second: for so long handshakes under way are waited for, seconds.
HANDSHAKES_WITHIN = 1.2

#: And for so long once a queue has been full: a SYN-ACK is sent again after 1, 3, 7, 15 and 31 seconds, seconds.
FULL_QUEUE_WITHIN = 32.0


class PeerGeneration(NamedTuple):
    """Another generation on this machine: the listeners that it has, by inode, and whether it stops."""

    listens: frozenset[int]
    stops: bool


@dataclass(frozen=True)
class Others:
    """The members that connections are left to: `count` members of the group, from index `first` on.

    `earlier` came before ours: as many members stand before the first of ours.
    """

    earlier: int
    first: int
    count: int


def foreign_listeners(port: int, ours: Sequence[socket.socket]) -> frozenset[int]:
    """Return the listeners of other services on the address of `ours`, by inode. Raises OSError without /proc."""
    mine = {bpf.inode(each) for each in ours}
    here = bpf.local_address(ours[0])
    # Another address on this port is another group, and takes nothing from ours.
    return frozenset(
        entry.inode for entry in bpf.entries(port, bpf.LISTEN) if entry.inode not in mine and entry.local == here
    )


def others_that_stay(
    there: frozenset[int], earlier: frozenset[int], ours: int, neighbours: Iterable[PeerGeneration]
) -> Others | None:
    """Return which of the foreign listeners `ours` may leave their connections to; None when there is none.

    A listener that is not among the earlier members came after ours.

    >>> younger, older = frozenset({7, 8}), frozenset({5})
    >>> others_that_stay(younger, frozenset(), 3, [])
    Others(earlier=0, first=3, count=2)
    >>> others_that_stay(younger | older, older, 3, [])
    Others(earlier=1, first=0, count=1)
    >>> others_that_stay(younger | older, older, 3, [PeerGeneration(older, stops=True)])
    Others(earlier=1, first=4, count=2)
    >>> others_that_stay(younger, frozenset(), 3, [PeerGeneration(younger, stops=True)])
    """
    neighbours = list(neighbours)
    staying = {inode for each in neighbours if not each.stops for inode in each.listens}
    going = {inode for each in neighbours if each.stops for inode in each.listens} - staying
    if there <= going:
        return None
    earlier &= there
    if earlier and (earlier == there or not earlier & going):
        return Others(len(earlier), 0, len(earlier))
    return Others(len(earlier), len(earlier) + ours, len(there - earlier))


class Steering:
    """New connections go to `count` members of a group from index `first` on, and to none of `ours`."""

    def __init__(self, port: int, ours: Sequence[socket.socket], first: int, count: int) -> None:
        """Begin. Raises OSError, and has changed nothing then."""
        self._port, self._ours, self._range = port, ours, (first, count)
        self._steer()
        try:
            self._under_way = bpf.handshakes(port)
        except OSError:
            bpf.let_the_kernel_choose(ours[0])
            raise
        self._at_last = clock.after_ns(HANDSHAKES_WITHIN)

    def _steer(self) -> None:
        bpf.steer_to_range(self._ours[0], *self._range)

    def is_settled(self) -> bool:
        """Look whether the handshakes that were under way are over. Raises OSError."""
        # A master that has joined meanwhile has detached the program.
        self._steer()
        if any(is_full(each) for each in self._ours):
            # The kernel drops the last segment of a handshake then, and the client, which is connected as far as it
            # knows, sends it again after some time, longer each time.
            self._at_last = clock.after_ns(FULL_QUEUE_WITHIN)
        # Before anything is read, which may fail.
        if clock.passed(self._at_last):
            return True
        if self._under_way:
            self._under_way &= bpf.handshakes(self._port)
        return not self._under_way


class PortDrain(Steering):
    """All of this master's sockets on a port, in the order in which they stand in the group, on their way out."""

    def __init__(self, port: int, ours: Sequence[socket.socket], others: Others) -> None:
        """Steer new connections to the others. Raises OSError."""
        super().__init__(port, ours, others.first, others.count)
        self._others = others

    def close(self, close: Callable[[int], None]) -> None:
        """Close them by `close(index)`, in an order that leads no connection to one that is being closed."""
        for index, target in zip(reversed(range(len(self._ours))), self._targets(), strict=True):
            if target is not None:
                with contextlib.suppress(OSError):
                    bpf.steer_to_one(self._ours[index], target)
            close(index)

    def _targets(self) -> Sequence[int | None]:
        if self._others.first:
            targets = bpf.closing_indices(len(self._ours), self._others.count)
            return [self._others.earlier + target for target in targets]
        # Theirs stand before ours: no close moves any of them.
        return [None] * len(self._ours)
