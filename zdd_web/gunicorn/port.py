"""One listener of the master, and in `reuseport` mode all of them on one port.

Theory of operation
-------------------
A port has as many sockets as there may be workers, all bound before the first fork (listeners/queues.py says why), of
which as many listen as there are workers. They stand in the kernel's group in the order in which they began to listen.
SIGTTIN has one more listen, at the end. SIGTTOU takes the last one away: new connections are steered to the others,
the handshakes that were under way are waited for, the workers empty its queue, and then it is shut down; nothing moves
in the group. Nothing of this is done while somebody else is on the port, whose place it would change: every worker
accepts from every queue, so that any number of them will do.

Who joins a port that an older master leaves later finds its own order turned: each close of the older one's moves the
last of the group into the hole (`_turn`).
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zdd_web import clock, log
from zdd_web.board import ListenerRecord
from zdd_web.door import Door
from zdd_web.listeners import reuseport
from zdd_web.listeners.arrivals import Arrivals
from zdd_web.listeners.backlog import is_empty
from zdd_web.listeners.matching import Address, Place
from zdd_web.listeners.queues import Queues, new_epoll
from zdd_web.listeners.sharing import Farewell, Neighbour, Others, others_on, strangers

#: One who stays alone cannot be steered to safely while several leave (`closing_indices`).
LEAST_QUEUES = 2

#: SIGTTIN may double the number of workers, or come as often as this, and each has a queue more.
SPARE = 8

#: How often a master that waits for others on its port looks for them, seconds.
LOOK_EVERY = 1.0


@dataclass(eq=False)
class Listener:
    """One of the master's; `sock` is gunicorn's object."""

    bind: str
    address: Address
    slot: int
    sock: Any
    record: ListenerRecord = field(repr=False)
    #: Bound, and to listen when the gate opens.
    listens: bool = True
    #: This generation's alone: the predecessor does not have it.
    added: bool = False
    #: This generation's alone: a successor does not want it.
    dropped: bool = False

    @property
    def place(self) -> Place:
        """What the configuration calls it."""
        return Place(self.bind, self.address, self.slot)

    @property
    def is_open(self) -> bool:
        """Whether this master still has it."""
        return self.sock.sock is not None

    @property
    def is_lent(self) -> bool:
        """Whether somebody outside the service has it too: it is not ours to shut."""
        return self.bind.startswith(("fd://", "systemd:"))

    @property
    def path(self) -> str:
        """The path of a Unix socket that has one."""
        name = "" if not self.is_open or self.sock.FAMILY != socket.AF_UNIX else self.sock.getsockname()
        return name if isinstance(name, str) else ""

    def began(self, since: int = 0) -> None:
        """Note that it listens, from now on or since then."""
        self.record.since = since or clock.now_ns()
        self.record.inode = reuseport.inode(self.sock.sock)

    def say(self, door: Door) -> None:
        """Tell workers and the operator how far it lets new connections in."""
        self.record.settled = 0
        self.record.door_since = clock.now_ns()
        self.record.door = door


def how_many(workers: int, binds: int, most: int) -> int:
    """Return how many sockets a port is to have: for the workers, and for those that SIGTTIN may bring.

    >>> how_many(2, binds=1, most=256), how_many(40, binds=1, most=256), how_many(40, binds=4, most=256)
    (10, 80, 64)
    """
    return max(LEAST_QUEUES, min(workers + max(SPARE, workers), most // binds))


class Port:
    """Those that share one."""

    def __init__(self, members: Sequence[Listener], backlog: int) -> None:
        """Take them; of those that listen the first came first. None may listen yet."""
        self.members, self._backlog = members, backlog
        self.number: int = members[0].sock.getsockname()[1]
        self._order = [each for each in members if each.listens]
        self._epoll = new_epoll(len(members))
        self._arrivals = Arrivals(len(members))
        for each in members:
            if each.listens:
                self._epoll.register(each.sock.fileno(), select.EPOLLIN)
            else:
                each.say(Door.IDLE)
        #: How many sockets an older master had here when these began to listen.
        self._elders = 0
        self._leaving: Farewell | None = None
        self._farewell: Farewell | None = None
        self._looked_at = clock.NEVER

    def in_order(self) -> list[Listener]:
        """Return them as a successor is to have them: those that listen first, as they stand in the group."""
        return [*self._order, *(each for each in self.members if each not in self._order)]

    def for_worker(self) -> Queues:
        """Return what a worker accepts from; called in the worker."""
        return Queues([each.sock.sock for each in self.members], self._epoll, self._arrivals, str(self.members[0].sock))

    # -- their number

    def open(self, queues: int) -> None:
        """Have so many listen, where none does yet. Raises OSError."""
        if not self._order:
            self._elders = len(strangers(self.number, self._sockets))
            for each in self.members[: max(LEAST_QUEUES, queues)]:
                self._listen(each)
            reuseport.let_the_kernel_choose(self._sockets[0])

    def _listen(self, each: Listener) -> None:
        each.sock.sock.listen(self._backlog)
        self._epoll.register(each.sock.fileno(), select.EPOLLIN)
        self._order.append(each)
        each.listens = True
        each.began()
        each.say(Door.OPEN)

    @property
    def is_busy(self) -> bool:
        """Whether a queue is on its way out."""
        return self._leaving is not None

    def fit(self, workers: int) -> None:
        """Have as many queues as there are workers; the tick's call while this generation alone serves."""
        wanted = min(max(LEAST_QUEUES, workers), len(self.members))
        if self._leaving is not None:
            if wanted >= len(self._order):
                self.hold()
            else:
                self._follow_leaving(self._leaving)
        elif wanted != len(self._order) and (not self._looked_at or clock.since(self._looked_at) >= LOOK_EVERY):
            self._looked_at = clock.now_ns()
            if self._is_alone():
                self._looked_at = clock.NEVER
                self._change(wanted)

    def _change(self, wanted: int) -> None:
        before = len(self._order)
        while wanted > len(self._order):
            self._listen(next(each for each in self.members if each not in self._order))
        if wanted < before:
            last = self._order[-1]
            self._leaving = Farewell(self.number, [last.sock.sock], Others(0, 0, before - 1))
            last.say(Door.STEERED)
        log.emit("listener.queues", bind=self.members[0].bind, before=before, wanted=wanted)

    def _follow_leaving(self, leaving: Farewell) -> None:
        last = self._order[-1]
        if not self._is_alone():
            self.hold()
        elif leaving.is_settled() and is_empty([last.sock.sock]):
            # Nobody waits for it any more when it is no listener any more.
            self._epoll.unregister(last.sock.fileno())
            last.sock.sock.shutdown(socket.SHUT_RD)
            self._order.pop()
            last.listens = False
            last.say(Door.IDLE)
            self._leaving = None
            reuseport.let_the_kernel_choose(self._sockets[0])

    def hold(self) -> None:
        """Keep the queue that was on its way out."""
        if self._leaving is not None:
            self._leaving = None
            reuseport.let_the_kernel_choose(self._sockets[0])
            self._order[-1].say(Door.OPEN)

    @property
    def _sockets(self) -> list[socket.socket]:
        return [each.sock.sock for each in self._order or self.members]

    def _is_alone(self) -> bool:
        if strangers(self.number, self._sockets):
            return False
        self._turn()
        return True

    def _turn(self) -> None:
        """Put our order right: whoever was first has left, from its last socket to its first."""
        at = -self._elders % len(self._order)
        self._order, self._elders = [*self._order[at:], *self._order[:at]], 0

    # -- to leave the port to others

    @property
    def is_left_to_others(self) -> bool:
        """Whether new connections go to somebody else."""
        return self._farewell is not None

    def leave_to_others(self, neighbours: Iterable[Neighbour]) -> None:
        """Steer new connections to whoever else is on the port, if somebody stays. Raises OSError."""
        self.hold()
        others = self._others(neighbours)
        if others is None:
            return
        if not others.elders:
            self._turn()
        self._farewell = Farewell(self.number, self._sockets, others)
        for each in self._order:
            each.say(Door.STEERED)
        log.emit("listener.steered", port=self.number, listeners=len(self._order), others=others.count,
                 migrates="yes" if reuseport.migrates() else "no")  # fmt: skip

    def others_stay(self, neighbours: Iterable[Neighbour]) -> bool:
        """Tell whether somebody whom new connections go to is there for good. Raises OSError."""
        return self._others(neighbours) is not None

    def _others(self, neighbours: Iterable[Neighbour]) -> Others | None:
        if not self._order:
            return None
        return others_on(self.number, self._sockets, min(each.record.since for each in self._order), neighbours)

    def follow_farewell(self) -> None:
        """Say on the board when nothing is under way to ours any more. Raises OSError."""
        if self._farewell is not None and self._farewell.is_settled():
            for each in self._order:
                each.record.settled = 1

    def take_back(self) -> None:
        """Have new connections come here again."""
        if self._farewell is not None:
            self._farewell = None
            reuseport.let_the_kernel_choose(self._sockets[0])

    def close(self, close: Callable[[Listener], None]) -> None:
        """Close those that leave others alone by `close(listener)`, so that no connection meets one on its way out."""
        if self._farewell is not None:
            order, farewell, self._farewell = self._order, self._farewell, None
            farewell.close(lambda index: close(order[index]))
