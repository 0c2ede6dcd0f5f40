"""Other masters on the ports of ours, in `reuseport` mode: which they are, and to leave the ports to them.

Two masters that know nothing of each other share a port in this mode. The one that stops steers new connections to the
other (listeners/reuseport/drain.py), and holds its sockets until they are empty and its workers have left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from zdd_web import log, service
from zdd_web.board import LAYOUT
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.sockets.listener import Port
from zdd_web.lifecycle import Phase
from zdd_web.listeners.reuseport.drain import PeerGeneration
from zdd_web.system import clock

#: How often a master that has steered to others looks whether they stay, seconds.
LOOK_WHETHER_THEY_STAY_EVERY = 0.1


class SharedPorts:
    """Leaves ports to the other masters on them, as long as one of those stays."""

    def __init__(self) -> None:
        self._looked_at, self._look_every = clock.NEVER, LOOK_WHETHER_THEY_STAY_EVERY

    def leave(self, ports: Sequence[Port]) -> None:
        """Steer new connections to the other masters on each of the ports, where one stays."""
        self._looked_at = clock.now_ns()
        # Where no other listener can be seen, or steered to, this is the last one.
        neighbours = (guarded("listeners", _neighbours)() or []) if ports else []
        for port in ports:
            guarded("listeners", port.leave_to_others)(neighbours)

    def follow(self, ports: Sequence[Port], shut: Callable[[Port], None]) -> None:
        """See whether what was under way to steered listeners is over; the tick's call while the service stops.

        A port on which no other master stays any more is taken back, and given to `shut`. Raises OSError.
        """
        left = [port for port in ports if port.is_left_to_others]
        if left and clock.since(self._looked_at) >= self._look_every:
            self._looked_at, neighbours = clock.now_ns(), _neighbours()
            # Among thousands of processes it takes long: a master that stops has more to do.
            self._look_every = max(LOOK_WHETHER_THEY_STAY_EVERY, 20 * clock.since(self._looked_at))
            # The kernel's table of connections may be long.
            if any(each.stops for each in neighbours):
                for port in left:
                    if not port.others_stay(neighbours):
                        # A connection that came to a queue of ours once it is empty would be reset.
                        port.stop_steering()
                        shut(port)
        for port in left:
            port.follow_farewell()


def name_others(ports: Sequence[Port]) -> None:
    """Log which other listeners were on the ports before ours, at a start."""
    known: frozenset[int] = frozenset()
    earlier = [(port, earlier) for port in ports for _, _, earlier in [port.group] if earlier]
    if earlier:
        known = known.union(*(each.listens for each in _neighbours()))
    for port, inodes in earlier:
        unknown = len(frozenset(inodes) - known)
        log.emit("listener.shared", logging.WARNING if unknown else logging.INFO, port=port.number,
                 others=len(inodes), unknown=unknown)  # fmt: skip


def _neighbours() -> list[PeerGeneration]:
    return [
        PeerGeneration(
            listens=frozenset(record.inode for record, _ in each.board.listener_records()),
            stops=each.board.header.phase in (Phase.DRAINING, Phase.STOPPED),
        )
        # The kernel lets processes of one user alone share a port.
        for each in service.generations(os.geteuid())
        if each.pid != os.getpid() and each.board.header.layout == LAYOUT
    ]
