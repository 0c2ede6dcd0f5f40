"""One listener of the master, and in `reuseport` mode all of them on one port.

Theory of operation
-------------------
A port has a pool of sockets, all bound before the first fork (listeners/reuseport/queues.py says why), of which as many
listen as there are workers. They stand in the kernel's group in the order in which they began to listen. SIGTTIN has
one more listen, at the end. SIGTTOU takes the last one away: new connections are steered to the others, the handshakes
that were under way are waited for, the workers empty its queue, and then it is shut down; nothing moves in the group.
Nothing of this is done while another master is on the port, whose place it would change: every worker accepts from
every queue, so that any number of them will do.

Two masters may be on a port. When the earlier one leaves, each close of its sockets moves the last of the group into
the hole: those of the later one stand in another order from then on (`bpf.turned`). It knows which, if the earlier one
has left as we do, and that it has by the program that a master leaves behind. Where the order is not known no queue is
closed any more.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from zdd_web import log
from zdd_web.board import ListenerRecord, Slot
from zdd_web.board.admission import Admission
from zdd_web.listeners import socket_file
from zdd_web.listeners.accept_queue import is_empty
from zdd_web.listeners.matching import Address
from zdd_web.listeners.reuseport import bpf
from zdd_web.listeners.reuseport.arrivals import Arrivals
from zdd_web.listeners.reuseport.drain import (
    Others,
    PeerGeneration,
    PortDrain,
    Steering,
    foreign_listeners,
    others_that_stay,
)
from zdd_web.listeners.reuseport.queues import Queues, new_epoll
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Listener as RawListener

#: One who stays alone cannot be steered to safely while several leave (`closing_indices`).
LEAST_QUEUES = 2

#: SIGTTIN may bring as many workers as there are at the start, or so many, and each has a queue of its own.
SPARE = 8

#: How often a master looks who else is on its port, while it waits for them, and while a queue empties, seconds.
LOOK_FOR_OTHERS_EVERY, LOOK_AT_QUEUE_EVERY = 1.0, 0.1


@dataclass(eq=False)
class Listener:
    """One of the master's; `sock` is gunicorn's object."""

    bind: str
    address: Address
    slot: int
    sock: RawListener
    record: ListenerRecord = field(repr=False)
    #: The index of that record.
    index: int
    #: Otherwise it is only bound: until the gate opens, or until there are more workers.
    listens: bool = True
    #: This generation's alone: the predecessor does not have it.
    added: bool = False
    #: This generation's alone: a successor does not want it.
    dropped: bool = False
    #: Device and inode of the file of a Unix socket; None where the path does not lead to it.
    file: tuple[int, int] | None = None

    @property
    def is_open(self) -> bool:
        """Whether this master still has it."""
        return self.sock.sock is not None

    @property
    def is_lent(self) -> bool:
        """Whether a process outside the service has it too: it is not ours to shut."""
        return self.bind.startswith(("fd://", "systemd:"))

    @property
    def path(self) -> str:
        """The path of a Unix socket that has one."""
        name = "" if not self.is_open or self.sock.FAMILY != socket.AF_UNIX else self.sock.getsockname()
        return name if isinstance(name, str) else ""

    @property
    def is_reachable(self) -> bool:
        """Whether clients reach it by its path, if it is a Unix socket that has one."""
        return not self.path or socket_file.leads_to(self.path, self.socket)

    def note_file(self) -> None:
        """Note to which file its path leads, which is its own."""
        self.file = socket_file.identity(self.path) if self.path else None

    def unlink(self) -> None:
        """Remove its file; another one that is in its place stays. Raises OSError."""
        if self.file is not None and socket_file.identity(self.path) == self.file:
            os.unlink(self.path)

    @property
    def socket(self) -> socket.socket:
        """The socket itself; only while it is open."""
        bound: socket.socket = self.sock.sock
        return bound

    def listen(self, backlog: int) -> None:
        """Begin to listen. Raises OSError."""
        self.socket.listen(backlog)
        self.note_that_it_listens()

    def note_that_it_listens(self) -> None:
        """Say so on the board."""
        self.listens = True
        self.record.inode = bpf.inode(self.socket)
        self.set_admission(Admission.OPEN)

    def stop_listening(self) -> None:
        """End its queue for every process that has a copy of it; it stays bound."""
        self.socket.shutdown(socket.SHUT_RD)
        self.listens = False
        self.set_admission(Admission.BOUND)

    def set_admission(self, door: Admission) -> None:
        """Tell workers and the operator how far it lets new connections in."""
        self.record.settled = 0
        self.record.blocked_since = clock.now_ns()
        self.record.door = door


def how_many(workers: int, binds: int, most: int) -> int:
    """Return how many sockets a port is to have: for the workers, and for those that SIGTTIN may bring.

    >>> how_many(2, binds=1, most=256), how_many(40, binds=1, most=256), how_many(40, binds=4, most=256)
    (10, 80, 64)
    """
    return max(LEAST_QUEUES, min(workers + max(SPARE, workers), most // binds))


class Port:
    """Those that share one."""

    def __init__(
        self, members: Sequence[Listener], backlog: int, earlier: Iterable[int] = (), *, ordered: bool = True
    ) -> None:
        """Take them; those that listen as they stand in the group, if `ordered`, behind the `earlier`."""
        self.members, self._backlog = members, backlog
        self.number: int = members[0].sock.getsockname()[1]
        self._order = [each for each in members if each.listens]
        self._elders = frozenset(earlier)
        #: Whether they are known to stand in that order.
        self._is_ordered = ordered
        self._epoll = new_epoll(len(members))
        self._arrivals = Arrivals(len(members))
        for each in members:
            if each.listens:
                self._epoll.register(each.socket.fileno(), select.EPOLLIN)
            else:
                each.set_admission(Admission.BOUND)
        self._closing: Steering | None = None
        self._port_drain: PortDrain | None = None
        self._looked_at = clock.NEVER

    def in_order(self) -> list[Listener]:
        """Return them as a successor is to have them: those that listen first, as they stand in the group."""
        return [*self._order, *(each for each in self.members if each not in self._order)]

    @property
    def group(self) -> tuple[int, bool, tuple[int, ...]]:
        """The port, whether it is known how ours stand there, and the listeners of others before them, by inode."""
        return self.number, self._is_ordered, tuple(sorted(self._elders))

    def for_worker(self, slot: Slot) -> Queues:
        """Return what a worker accepts from, and counts in its slot; called in the worker."""
        sockets = [each.socket for each in self.members]
        accepted = [partial(slot.count_accept, each.index) for each in self.members]
        return Queues(sockets, self._epoll, self._arrivals, accepted, str(self.members[0].sock))

    # -- their number

    def open(self, queues: int) -> None:
        """Have so many listen, where none does yet. Raises OSError."""
        if not self._order:
            self._elders = self._strangers()
            for each in self.members[: max(LEAST_QUEUES, queues)]:
                self._listen(each)
            bpf.let_the_kernel_choose(self._order[0].socket)

    def _listen(self, each: Listener) -> None:
        # Watched first: a queue that is not watched would keep its clients waiting.
        fd = each.socket.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        try:
            each.listen(self._backlog)
        except OSError:
            self._epoll.unregister(fd)
            raise
        self._order.append(each)

    @property
    def is_busy(self) -> bool:
        """Whether a queue is on its way out."""
        return self._closing is not None

    def fit(self, workers: int) -> None:
        """Have as many queues as there are workers; the tick's call while this generation alone serves."""
        wanted = min(max(LEAST_QUEUES, workers), len(self.members))
        if self._closing is not None and wanted >= len(self._order):
            self.hold()
        every = LOOK_FOR_OTHERS_EVERY if self._closing is None else LOOK_AT_QUEUE_EVERY
        if wanted == len(self._order) or clock.since(self._looked_at) < every:
            return
        self._looked_at = clock.now_ns()
        if self._is_shared():
            self.hold()
        elif self._closing is not None:
            self._follow_closing(self._closing)
        elif wanted > len(self._order):
            self._grow(wanted)
        elif self._is_ordered:
            self._begin_to_close()

    def _grow(self, wanted: int) -> None:
        self._say_that_it_changes(wanted)
        while wanted > len(self._order):
            self._listen(next(each for each in self.members if each not in self._order))
        # A master that was here may have left its program behind.
        bpf.let_the_kernel_choose(self._order[0].socket)
        self._looked_at = clock.NEVER

    def _begin_to_close(self) -> None:
        last, staying = self._order[-1], len(self._order) - 1
        self._say_that_it_changes(staying)
        self._closing = Steering(self.number, [last.socket], 0, staying)
        last.set_admission(Admission.STEERED)

    def _say_that_it_changes(self, wanted: int) -> None:
        log.emit("listener.queues", bind=self.members[0].bind, before=len(self._order), wanted=wanted)

    def _follow_closing(self, closing: Steering) -> None:
        last = self._order[-1]
        if closing.is_settled() and is_empty([last.socket]):
            # Nothing waits for it once it does not listen any more.
            self._epoll.unregister(last.socket.fileno())
            self._order.pop()
            self._closing = None
            last.stop_listening()
            bpf.let_the_kernel_choose(self._order[0].socket)
            self._looked_at = clock.NEVER

    def hold(self) -> None:
        """Keep the queue that was on its way out."""
        if self._closing is not None:
            self._closing = None
            bpf.let_the_kernel_choose(self._order[0].socket)
            self._order[-1].set_admission(Admission.OPEN)

    # -- who else is here

    def _strangers(self) -> frozenset[int]:
        return foreign_listeners(self.number, [each.socket for each in self.members])

    def _is_shared(self) -> bool:
        there = self._strangers()
        self._follow_earlier(there)
        return bool(there)

    def _follow_earlier(self, there: frozenset[int]) -> None:
        """Put our order right when those that stood before ours have left."""
        left = self._elders - there
        if not left:
            return
        # Another master that has come since has detached the program.
        orderly = bool(there) or bpf.let_the_kernel_choose(self._order[0].socket)
        if left == self._elders and orderly:
            self._order = bpf.turned(self._order, len(left))
        else:
            self._is_ordered = False
        self._elders -= left

    # -- to leave the port to others

    @property
    def is_left_to_others(self) -> bool:
        """Whether new connections go to another master."""
        return self._port_drain is not None

    def leave_to_others(self, neighbours: Iterable[PeerGeneration]) -> None:
        """Steer new connections to the other masters on the port, if one of them stays. Raises OSError."""
        self.hold()
        others = self._others(neighbours)
        if others is None:
            return
        self._port_drain = PortDrain(self.number, [each.socket for each in self._order], others)
        for each in self._order:
            each.set_admission(Admission.STEERED)
        log.emit("listener.steered", port=self.number, listeners=len(self._order), others=others.count,
                 migrates="yes" if bpf.migrates() else "no")  # fmt: skip

    def others_stay(self, neighbours: Iterable[PeerGeneration]) -> bool:
        """Tell whether a master that new connections go to is there for good. Raises OSError."""
        return self._others(neighbours) is not None

    def _others(self, neighbours: Iterable[PeerGeneration]) -> Others | None:
        if not self._order:
            return None
        there = self._strangers()
        self._follow_earlier(there)
        return others_that_stay(there, self._elders, len(self._order), neighbours)

    def follow_farewell(self) -> None:
        """Say on the board when nothing is under way to ours any more. Raises OSError."""
        if self._port_drain is not None and self._port_drain.is_settled():
            for each in self._order:
                each.record.settled = 1

    def stop_steering(self) -> None:
        """Have new connections come here as well again."""
        if self._port_drain is not None:
            self._port_drain = None
            bpf.let_the_kernel_choose(self._order[0].socket)

    def close(self, close: Callable[[Listener], None]) -> None:
        """Close those that leave others alone by `close(listener)`, so that no connection meets one on its way out."""
        if self._port_drain is not None:
            order, port_drain, self._port_drain = self._order, self._port_drain, None
            port_drain.close(lambda index: close(order[index]))
