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
class Others:
    """Listeners of somebody else on a port; `younger` when they came after ours."""

    count: int
    younger: bool


def others_on(
    port: int, ours: Sequence[socket.socket], since: int, masters: Iterable[tuple[int, int]]
) -> Others | None:
    """Return who else listens on the address of `ours`, which began to listen at `since`; None when nobody does.

    `masters` are those who may be looked at: their pids, and since when they listen, monotonic nanoseconds. Raises
    OSError without /proc.
    """
    mine = {reuseport.inode(each) for each in ours}
    listening = reuseport.entries(port, reuseport.LISTEN)
    here = {entry.local for entry in listening if entry.inode in mine}
    # Another address on this port is another group, and takes nothing from ours.
    inodes = {entry.inode for entry in listening if entry.inode not in mine and entry.local in here}
    if not inodes:
        return None
    began = [listening_since for pid, listening_since in masters if _holds(pid, inodes)]
    # Those of nobody whom this user may look at came after ours: that is how a new version is started.
    return Others(len(inodes), younger=not began or min(began) > since)


def _holds(pid: int, inodes: Collection[int]) -> bool:
    names = {f"socket:[{inode}]" for inode in inodes}
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{entry}") in names:
                    return True
    return False


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
        if self._under_way:
            self._under_way &= reuseport.handshakes(self._port)
        return not self._under_way or clock.passed(self._at_last)

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
