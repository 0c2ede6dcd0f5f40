"""Leave a port that other masters stay on: see reuseport.py for how, here is who, and when it is over."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from zdd_web import clock
from zdd_web.listeners import reuseport

#: A SYN-ACK that was lost is sent again after a second: for so long handshakes under way are waited for, seconds.
HANDSHAKES_WITHIN = 1.2


@dataclass(frozen=True)
class Neighbour:
    """Another generation on this machine: since when it listens on what (monotonic, by inode), whether it stops."""

    listens: Mapping[int, int]
    stops: bool


@dataclass(frozen=True)
class Others:
    """Those whom connections are left to: `count` members of the group, from index `first` on.

    `elders` came before ours: as many members stand before the first of ours.
    """

    elders: int
    first: int
    count: int


def strangers(port: int, ours: Sequence[socket.socket]) -> set[int]:
    """Return the listeners of somebody else on the address of `ours`, by inode. Raises OSError without /proc."""
    mine = {reuseport.inode(each) for each in ours}
    here = reuseport.local_address(ours[0])
    # Another address on this port is another group, and takes nothing from ours.
    return {
        entry.inode
        for entry in reuseport.entries(port, reuseport.LISTEN)
        if entry.inode not in mine and entry.local == here
    }


def others_on(port: int, ours: Sequence[socket.socket], since: int, neighbours: Iterable[Neighbour]) -> Others | None:
    """Return who else listens on the address of `ours`, which began to listen at `since`; None when nobody stays.

    Raises OSError without /proc.
    """
    inodes = strangers(port, ours)
    there = [each for each in neighbours if inodes & each.listens.keys()]
    staying = {inode for each in there if not each.stops for inode in each.listens}
    going = {inode for each in there if each.stops for inode in each.listens} - staying
    if inodes <= going:
        return None
    # Those of nobody whom this user may look at came after ours: that is how a new version is started.
    elders = {inode for each in there for inode in inodes & each.listens.keys() if each.listens[inode] <= since}
    if elders and (elders == inodes or not elders & going):
        return Others(len(elders), 0, len(elders))
    return Others(len(elders), len(elders) + len(ours), len(inodes - elders))


class Farewell:
    """All of this master's sockets on a port, in the order in which they began to listen, on their way out."""

    def __init__(self, port: int, ours: Sequence[socket.socket], others: Others) -> None:
        """Steer new connections to the others. Raises OSError."""
        self.others = others
        self._port, self._ours = port, ours
        self._steer()
        self._under_way = reuseport.handshakes(port)
        self._at_last = clock.after_ns(HANDSHAKES_WITHIN)

    def _steer(self) -> None:
        reuseport.steer_to_range(self._ours[0], self.others.first, self.others.count)

    def is_settled(self) -> bool:
        """Look whether the handshakes that were under way are over. Raises OSError."""
        # Whoever has joined meanwhile has taken the program away.
        self._steer()
        # Before anything is read, which may fail.
        if clock.passed(self._at_last):
            return True
        if self._under_way:
            self._under_way &= reuseport.handshakes(self._port)
        return not self._under_way

    def close(self, close: Callable[[int], None]) -> None:
        """Close them by `close(index)`, in an order that leads no connection to one that is being closed."""
        for index, target in zip(reversed(range(len(self._ours))), self._targets(), strict=True):
            if target is not None:
                with contextlib.suppress(OSError):
                    reuseport.steer_to_one(self._ours[index], target)
            close(index)

    def _targets(self) -> Sequence[int | None]:
        if self.others.first:
            targets = reuseport.closing_indices(len(self._ours), self.others.count)
            return [self.others.elders + target for target in targets]
        # Theirs stand before ours: no close moves any of them.
        return [None] * len(self._ours)
