"""The master's listeners: how they come to be, how they travel to a successor, and how they go.

A mode (`LISTENER`) decides how they come to be and go, and nothing else:

    fd          one socket for each bind, which all workers share
    reuseport   as many as there are workers, with SO_REUSEPORT. The master holds them all, so none closes when a worker
                does, and every worker accepts from all of them, from its own first: nobody waits behind a busy one
    systemd     systemd's, received by LISTEN_FDS

A successor inherits them, with what each is called; which of them its configuration means is decided by name and
address (listeners/matching.py). Those that it adds are bound at once and listen when its gate opens: before that
nobody accepts from them. Those that it does not want are drained by the predecessor: nobody new is let in, its workers
accept what waits, and when the last of them accepts no more they are closed.

Two masters that know nothing of each other share a port in `reuseport` mode. The one that stops steers new connections
to the other (listeners/sharing.py), and holds its sockets until they are empty and its workers have left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from zdd_web import clock, log, service
from zdd_web.board import LAYOUT, MOST_LISTENERS, Board
from zdd_web.errors import ListenerError, UpgradeError
from zdd_web.gunicorn import compat
from zdd_web.gunicorn.boundary import guarded
from zdd_web.gunicorn.handover import Inheritance
from zdd_web.lifecycle import Phase
from zdd_web.listeners import activation, reuseport
from zdd_web.listeners.backlog import Door, close_door, open_door, queue
from zdd_web.listeners.binding import make_way, refuse_mixed, why_not
from zdd_web.listeners.matching import Address, Place, match, same_bind
from zdd_web.listeners.sharing import Farewell, Generation, Others, others_on
from zdd_web.settings import Settings

#: In `reuseport` mode: one who stays alone cannot be steered to safely while several leave (closing_indices).
LEAST_SLOTS = 2

#: How often a master that has steered to others looks whether they stay, seconds.
LOOK_EVERY = 0.1


@dataclass
class _Listener:
    """One of them; `sock` is gunicorn's object."""

    bind: str
    address: Address
    slot: int
    sock: Any
    #: Bound, and to listen when the gate opens.
    listens: bool = True
    #: This generation's alone: a successor does not want it.
    dropped: bool = False

    @property
    def place(self) -> Place:
        return Place(self.bind, self.address, self.slot)

    @property
    def is_lent(self) -> bool:
        """Whether somebody outside the service has it too: it is not ours to shut."""
        return self.bind.startswith(("fd://", "systemd:"))

    @property
    def path(self) -> str:
        """The path of a Unix socket that has one."""
        name = "" if self.sock.sock is None or self.sock.FAMILY != socket.AF_UNIX else self.sock.getsockname()
        return name if isinstance(name, str) else ""


class Listening:
    """The listeners of this generation."""

    def __init__(self, server: Any, board: Board, settings: Settings, heir: Inheritance | None) -> None:
        """Take what systemd has passed. Raises `ListenerError`."""
        self._server, self._board, self._header, self._settings = server, board, board.header, settings
        self._heir = heir
        self._mode = settings.listener
        self._all: list[_Listener] = []
        #: By port: sockets that leave others alone on it.
        self._farewells: dict[int, Farewell] = {}
        self._looked_at = clock.NEVER
        self._activated: tuple[activation.Activated, ...] = ()
        if heir is None and (self._mode == "systemd" or os.environ.get("LISTEN_PID") == str(os.getpid())):
            if self._mode == "reuseport":
                raise ListenerError(
                    "LISTENER = 'reuseport' and LISTEN_FDS contradict each other: systemd has made the sockets; use "
                    "LISTENER = 'systemd', or start the service without its socket unit"
                )
            self._activated = activation.take(os.environ, os.getpid(), settings.systemd_names)
        elif heir is None and settings.systemd_names:
            raise ListenerError(
                f"SYSTEMD_NAMES = {dict(settings.systemd_names)!r}, and systemd has passed no sockets (LISTEN_FDS): "
                f"set LISTENER = 'systemd' and start the service by its socket unit, or remove the names"
            )

    @property
    def probe_socket(self) -> tuple[int, str]:
        """The descriptor that systemd has passed for the probe port and its name; -1 for none."""
        return next(((each.fd, each.name) for each in self._activated if each.role == "probe"), (-1, ""))

    # -- how they come to be

    def take(self) -> tuple[int, ...]:
        """Make them, or adopt what was inherited; return which of those are not wanted, by index.

        Raises `ListenerError`, `SettingsError`, or `UpgradeError` for what only a restart can change.
        """
        compat.check_certificates(self._server.cfg)
        try:
            if self._heir is not None:
                dropped = self._adopt(self._heir)
            else:
                dropped = ()
                self._make()
            if len(self._all) > MOST_LISTENERS:
                raise ListenerError(f"{len(self._all)} listeners: at most {MOST_LISTENERS} are possible: bind fewer")
        except BaseException:
            # The predecessor has not heard of them.
            for path in self.added_paths:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise
        self._publish()
        return dropped

    def _publish(self) -> None:
        self._server.LISTENERS = [each.sock for each in self._all]
        self._header.listener_count = len(self._all)
        for index, each in enumerate(self._all):
            self._header.listener(index).name = str(each.sock).replace("\0", "@")

    def _make(self) -> None:
        server = self._server
        if self._activated:
            # Nobody's to unlink, nor to close for good.
            server.systemd = True
            for each in self._activated:
                if each.role == "app":
                    self._add(f"systemd:{each.name}", each.fd, compat.adopt_listener(server, each.fd))
            return
        stock = compat.take_stock_inheritance() if server.master_pid else []
        if stock:
            binds = self._wanted() if self._mode == "fd" and len(stock) == len(server.cfg.bind) else []
            for at, fd in enumerate(stock):
                bind, address = (binds[at].bind, binds[at].address) if binds else (f"fd://{fd}", fd)
                self._add(bind, address, compat.adopt_listener(server, fd))
            return
        for place in self._wanted():
            if self._mode == "reuseport" or str(place.address).startswith("\0"):
                # An abstract Unix socket is bound here too: gunicorn before 27 looks for its file.
                self._bind(place)
            elif isinstance(place.address, int):
                self._add(place.bind, place.address, self._adopt_number(place.bind, place.address))
            else:
                self._add(place.bind, place.address, compat.create_listener(server, place.address))

    def _adopt_number(self, bind: str, fd: int) -> Any:
        try:
            return compat.adopt_listener(self._server, fd)
        except OSError as error:
            raise ListenerError(
                f"bind = {bind!r}: descriptor {fd} is no listening socket ({error.strerror}): whoever starts gunicorn "
                f"must leave it open under this number"
            ) from None

    def _add(self, bind: str, address: Address, sock: Any, slot: int = 0, *, listens: bool = True) -> None:
        self._all.append(_Listener(bind, address, slot, sock, listens))

    def _wanted(self) -> list[Place]:
        cfg = self._server.cfg
        places = [Place(bind, address) for bind, address in zip(cfg.bind, cfg.address, strict=True)]
        if self._mode != "reuseport":
            return places
        refuse_mixed(places)
        slots = max(LEAST_SLOTS, min(cfg.workers, MOST_LISTENERS // len(places)))
        return [Place(place.bind, place.address, slot) for slot in range(slots) for place in places]

    def _bind(self, place: Place) -> None:
        address = place.address
        slot = place.slot if self._mode == "reuseport" else None
        if slot:
            # Port 0: those behind the first one take the port that it was given.
            address = next(each for each in self._all if each.bind == place.bind).sock.getsockname()[:2]
        try:
            if isinstance(address, str):
                make_way(address)
            sock = compat.bind_listener(self._server, address, slot)
        except OSError as error:
            raise ListenerError(f"bind = {place.bind!r}: {why_not(error, address, slot)}") from None
        self._add(place.bind, place.address, sock, place.slot, listens=False)
        if slot == 0:
            # Once for all of them: the kernel's table of connections may be long.
            self._refuse_overlap(place.bind, sock)

    @staticmethod
    def _refuse_overlap(bind: str, sock: Any) -> None:
        # The kernel allows it to one user, and sends connections to whichever address is the more exact one.
        listening = reuseport.entries(sock.getsockname()[1], reuseport.LISTEN)
        ours = reuseport.local_address(sock.sock)
        if any(reuseport.overlap(ours, entry.local) for entry in listening):
            raise ListenerError(
                f"bind = {bind!r}: another socket listens on this port by an address that covers this one, or is "
                f"covered by it (`ss -ltnp` shows which): two masters share a port only where they bind the same "
                f"address; '[::]' takes IPv4 and IPv6"
            )

    def _adopt(self, heir: Inheritance) -> tuple[int, ...]:
        server = self._server
        if heir.mode != self._mode:
            self._close_given(heir.listeners)
            raise UpgradeError(
                f"LISTENER is {self._mode!r} in the new configuration and {heir.mode!r} in the running one: an upgrade "
                f"keeps the listeners; restore LISTENER, or restart the service"
            )
        binds = heir.binds if len(heir.binds) == len(heir.listeners) else ("",) * len(heir.listeners)
        slots = heir.slots if len(heir.slots) == len(heir.listeners) else (0,) * len(heir.listeners)
        # One of a release that names its listeners otherwise goes by its address.
        given = [
            Place(bind, _address_of(fd), slot) for fd, bind, slot in zip(heir.listeners, binds, slots, strict=True)
        ]
        inherited_only = all(place.bind.startswith("systemd:") for place in given)
        if self._mode == "systemd" or inherited_only:
            wanted = given
        else:
            wanted = self._wanted()
            if self._mode == "reuseport":
                # Each worker accepts from all of them: there may be more of them than workers, or fewer.
                old = [place for place in given if any(same_bind(place, each) for each in wanted)]
                new = [place for place in wanted if not any(same_bind(place, each) for each in old)]
                wanted = [*old, *new]
        found = match(wanted, given)
        kept = dict(found.kept)
        for at, place in enumerate(wanted):
            if at in kept:
                slot = place.slot if self._mode == "reuseport" else None
                sock = compat.adopt_listener(server, heir.listeners[kept[at]], slot)
                self._add(place.bind, place.address, sock, place.slot)
            elif isinstance(place.address, int):
                raise UpgradeError(
                    f"bind = {place.bind!r} is new: a descriptor cannot be added in an upgrade; restart the service"
                )
            else:
                self._bind(place)
        self._header.listening_since = heir.listening_since
        self._close_given(heir.listeners[index] for index in found.dropped)
        for at in found.added:
            log.emit("listener.added", bind=wanted[at].bind)
        for index in found.dropped:
            log.emit("listener.dropped", bind=given[index].bind or str(given[index].address))
        return found.dropped

    @staticmethod
    def _close_given(fds: Iterable[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def added_paths(self) -> list[str]:
        """Paths that this generation has made beside a predecessor's, which removes them if this one fails."""
        return [] if self._heir is None else [each.path for each in self._all if each.path and not each.listens]

    def open(self) -> None:
        """Listen on what was only bound so far, now that somebody is about to accept. Raises OSError."""
        for each in self._all:
            if not each.listens:
                each.sock.sock.listen(self._server.cfg.backlog)
                each.listens = True
                if self._mode == "reuseport":
                    reuseport.let_the_kernel_choose(each.sock.sock)
        self._header.listening_since = self._header.listening_since or clock.now_ns()

    # -- how they travel

    def inheritance(self) -> dict[str, Any]:
        """Return what a successor is given of them, as fields of `Inheritance`."""
        return {
            "listeners": tuple(each.sock.fileno() for each in self._all),
            "binds": tuple(each.bind for each in self._all),
            "slots": tuple(each.slot for each in self._all),
            "mode": self._mode,
            "listening_since": self._header.listening_since,
        }

    # -- in a worker

    def for_worker(self, worker: Any, place: int) -> dict[int, int]:
        """Give a worker its listeners, its own first; return the index of each, by descriptor."""
        count = len(self._all)
        if self._mode == "reuseport" and count:
            start = place % count
            worker.sockets = [*worker.sockets[start:], *worker.sockets[:start]]
        return {each.sock.fileno(): index for index, each in enumerate(self._all)}

    @property
    def counts_accepts(self) -> bool:
        """Whether workers are to count what they accept, listener by listener."""
        return self._mode == "reuseport"

    # -- what is to be seen of them

    def note(self) -> None:
        """Note the queues on the board; the tick's call."""
        for index, each in enumerate(self._all):
            if each.sock.sock is not None and each.listens:
                record = self._header.listener(index)
                record.length, record.limit = queue(each.sock.sock)

    # -- how they go

    def drop(self, indices: Collection[int]) -> None:
        """Begin to empty those that a successor does not want, before the workers are told to leave."""
        for index in indices:
            if index < len(self._all):
                each = self._all[index]
                # One that is lent stays as it is, open too: it could not be had again.
                each.dropped = not each.is_lent
                self._shut(index, close_door(each.sock.sock) if each.dropped else Door.KEPT)
        self._header.door_since = clock.now_ns()

    def close_dropped(self) -> None:
        """Close them, when no worker accepts any more."""
        for each in self._all:
            if each.dropped and each.sock.sock is not None:
                if isinstance(each.address, tuple):
                    # As it was bound: it may have to be bound again, and port 0 would be another one.
                    each.address = each.sock.getsockname()[:2]
                self._close(each, unlink=True)
                log.emit("listener.closed", bind=each.bind)

    def take_back(self) -> None:
        """Listen on them again, as far as possible: the successor that did not want them is gone."""
        self._header.door_since = 0
        for each in [each for each in self._all if each.dropped]:
            each.dropped = False
            try:
                self._reopen(each)
            except OSError as error:
                # No worker could be forked with it.
                self._all.remove(each)
                log.emit("listener.lost", logging.ERROR, bind=each.bind, error=error.strerror or str(error))
        for index in range(len(self._all)):
            self._shut(index, Door.OPEN)
        self._publish()

    def _reopen(self, each: _Listener) -> None:
        if each.sock.sock is not None:
            open_door(each.sock.sock, self._server.cfg.backlog)
            return
        sock = compat.bind_listener(self._server, each.address, each.slot if self._mode == "reuseport" else None)
        try:
            sock.sock.listen(self._server.cfg.backlog)
        except OSError:
            sock.close()
            raise
        each.sock = sock

    def keep(self) -> None:
        """Leave the queues to somebody else, who serves or will."""
        self._header.door_since = clock.now_ns()
        for index in range(len(self._all)):
            self._shut(index, Door.KEPT)

    def shut(self) -> None:
        """Let nobody new in, for good: the service stops."""
        # First of all: what fails below is not tried at each turn.
        self._header.door_since = clock.now_ns()
        if self._mode == "reuseport":
            # Where nobody can be seen, or steered to, this is the last one.
            guarded("listeners", self._look_for_others)()
        for index, each in enumerate(self._all):
            if not each.listens:
                self._close(each, unlink=True)
            elif self._mode == "reuseport" and each.sock.getsockname()[1] in self._farewells:
                self._shut(index, Door.STEERED)
            else:
                self._shut_alone(index)

    def _shut_alone(self, index: int) -> None:
        each = self._all[index]
        self._shut(index, close_door(each.sock.sock))
        # The workers have their own: the last of them closes the queue, right after it has found it empty.
        self._close(each, unlink=True)

    def _shut(self, index: int, door: Door) -> None:
        record = self._header.listener(index)
        record.settled = 0
        record.door_since = clock.now_ns()
        record.door = door

    def _look_for_others(self) -> None:
        self._looked_at, generations = clock.now_ns(), _who_is_here()
        for port in {each.sock.getsockname()[1] for each in self._all if each.listens}:
            others = self._others_on(port, generations)
            if others is not None:
                ours = [each.sock.sock for each in self._on(port)]
                self._farewells[port] = Farewell(port, ours, others)
                log.emit("listener.steered", port=port, listeners=len(ours), others=others.count,
                         migrates="yes" if reuseport.migrates() else "no")  # fmt: skip

    def _others_on(self, port: int, generations: list[Generation]) -> Others | None:
        return others_on(port, [each.sock.sock for each in self._on(port)], self._header.listening_since, generations)

    def _on(self, port: int) -> list[_Listener]:
        return [each for each in self._all if each.sock.sock is not None and each.sock.getsockname()[1] == port]

    def follow(self) -> None:
        """See whether what was under way to steered listeners is over; the tick's call while the service stops."""
        if self._farewells and clock.since(self._looked_at) >= LOOK_EVERY:
            self._looked_at, generations = clock.now_ns(), _who_is_here()
            # The kernel's table of connections may be long.
            somebody_stops = any(each.stops for each in generations)
            for port in [*self._farewells] if somebody_stops else []:
                if self._others_on(port, generations) is not None:
                    continue
                # They stop as well: whoever came to a queue of ours once it is empty would be reset.
                del self._farewells[port]
                for each in self._on(port):
                    self._shut_alone(self._all.index(each))
        for port, farewell in self._farewells.items():
            if farewell.is_settled():
                for index, each in enumerate(self._all):
                    if each.sock.sock is not None and each.sock.getsockname()[1] == port:
                        self._header.listener(index).settled = 1

    def close(self, *, unlink: bool) -> None:
        """Close what this master still holds of them; `unlink` removes the paths of Unix sockets."""
        while self._farewells:
            port, farewell = self._farewells.popitem()
            ours = self._on(port)
            farewell.close(lambda index, ours=ours: self._close(ours[index], unlink=False))  # type: ignore[misc]
        for each in self._all:
            if each.sock.sock is not None:
                self._close(each, unlink=unlink)
        self._server.LISTENERS = []

    def _close(self, each: _Listener, *, unlink: bool) -> None:
        path = each.path
        # gunicorn's own sets `sock` to None and swallows errors.
        each.sock.close()
        if unlink and path:
            # A file that is left behind is in nobody's way; the other listeners are still to be closed.
            with contextlib.suppress(OSError):
                os.unlink(path)


def _who_is_here() -> list[Generation]:
    return [
        Generation(
            pids=(each.pid, *(pid for pid, _ in each.board.worker_pids())),
            since=each.board.header.listening_since,
            stops=each.board.header.phase in (Phase.DRAINING, Phase.STOPPED),
        )
        for each in service.generations()
        if each.pid != os.getpid() and each.board.header.layout == LAYOUT
    ]


def _address_of(fd: int) -> Address:
    with socket.socket(fileno=os.dup(fd)) as look:
        name = look.getsockname()
    if isinstance(name, tuple):
        return name[0], name[1]
    return os.fsdecode(name)
