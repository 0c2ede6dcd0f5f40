"""Leave a port that other masters stay on: see reuseport.py for how, here is who, and when it is over."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from zdd_web import clock
from zdd_web.listeners import reuseport

#: A SYN-ACK that was lost is sent again after a second: for so long handshakes under way are waited for, seconds.
HANDSHAKES_WITHIN = 1.2


@dataclass(frozen=True)
class Generation:
    """Those who may be looked at: a master with its workers, since when it listens (monotonic), whether it stops."""

    pids: tuple[int, ...]
    since: int
    stops: bool


@dataclass(frozen=True)
class Others:
    """Listeners of somebody else on a port; `younger` when they came after ours."""

    count: int
    younger: bool


def others_on(port: int, ours: Sequence[socket.socket], since: int, generations: Iterable[Generation]) -> Others | None:
    """Return who else listens on the address of `ours`, which began to listen at `since`; None when nobody stays.

    Raises OSError without /proc.
    """
    mine = {reuseport.inode(each) for each in ours}
    listening = reuseport.entries(port, reuseport.LISTEN)
    here = {entry.local for entry in listening if entry.inode in mine}
    # Another address on this port is another group, and takes nothing from ours.
    inodes = {entry.inode for entry in listening if entry.inode not in mine and entry.local in here}
    if not inodes:
        return None
    held = [(each, {inode for pid in each.pids for inode in _held(pid, inodes)}) for each in generations]
    going = {inode for each, theirs in held if each.stops for inode in theirs}
    if going - {inode for each, theirs in held if not each.stops for inode in theirs} == inodes:
        return None
    began = [each.since for each, theirs in held if theirs]
    # Those of nobody whom this user may look at came after ours: that is how a new version is started.
    return Others(len(inodes), younger=not began or min(began) > since)


def _held(pid: int, inodes: Collection[int]) -> set[int]:
    names = {f"socket:[{inode}]": inode for inode in inodes}
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(names.get(os.readlink(f"/proc/{pid}/fd/{entry}"), 0))
    return found - {0}


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
        reuseport.steer_to_range(self._ours[0], len(self._ours) if self.others.younger else 0, self.others.count)

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
        if self.others.younger:
            return reuseport.closing_indices(len(self._ours), self.others.count)
        # Ours stand at the end: no close moves any of theirs.
        return [None] * len(self._ours)
