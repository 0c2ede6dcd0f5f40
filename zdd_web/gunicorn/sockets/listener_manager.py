"""The master's listeners: how they come to be, how they travel to a successor, and how they go.

A mode (`LISTENER`) decides how they come to be and go, and nothing else:

    fd          one socket for each bind, which all workers share
    reuseport   as many as there are workers, with SO_REUSEPORT (listener.py). The master holds them all: none closes
                when a worker does, and every worker accepts from all, so that no connection waits behind a busy one
    systemd     systemd's, received by LISTEN_FDS

A successor inherits them, with what each is called (listener_factory.py). Those that it does not want are drained by
the predecessor: no new connection is let in, its workers accept what waits, and when the last of them accepts no more
they are closed.

Other masters may be on a port of ours in `reuseport` mode: shared_ports.py has what concerns them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

from zdd_web import log
from zdd_web.board import Slot
from zdd_web.board.admission import Admission
from zdd_web.errors import ListenerError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.sockets import bind_listener
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.sockets.listener import Listener, Port
from zdd_web.gunicorn.sockets.listener_factory import ListenerFactory, paths_added
from zdd_web.gunicorn.sockets.shared_ports import SharedPorts, name_others
from zdd_web.listeners.accept_queue import allow_new_connections, block_new_connections, queue
from zdd_web.system import clock, sd_listen_fds


class ListenerManager:
    """The listeners of this generation."""

    def __init__(self, server: ArbiterFacade, generation: Generation, inherited: Inheritance | None) -> None:
        """Take what systemd has passed. Raises `ListenerError`."""
        self._server, self._generation, self._header = server, generation, generation.header
        settings = generation.settings
        self._inherited = inherited
        self._mode = settings.listener
        self._shares = self._mode == "reuseport"
        self._all: list[Listener] = []
        #: In `reuseport` mode, one for each bind.
        self._ports: list[Port] = []
        self._shared_ports = SharedPorts()
        #: As a successor was given them: it speaks of them by their index.
        self._given: list[Listener] = []
        self._activated: tuple[sd_listen_fds.Activated, ...] = ()
        if inherited is None and (self._mode == "systemd" or os.environ.get("LISTEN_PID") == str(os.getpid())):
            if self._shares:
                raise ListenerError(
                    "LISTENER = 'reuseport' and LISTEN_FDS contradict each other: systemd has made the sockets; use "
                    "LISTENER = 'systemd', or start the service without its socket unit"
                )
            self._activated = sd_listen_fds.take(os.environ, os.getpid(), settings.systemd_names)
        elif inherited is None and settings.systemd_names:
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
        obtaining = ListenerFactory(self._server, self._header, self._generation.settings)
        dropped = obtaining.adopt(self._inherited) if self._inherited is not None else obtaining.make(self._activated)
        self._all = obtaining.listeners
        self._publish()
        if self._shares:
            self._share_ports()
        return dropped

    def _publish(self) -> None:
        self._header.listener_count = len(self._all)
        usable = [each for each in self._all if each.is_open]
        for each in usable:
            each.record.name = str(each.sock).replace("\0", "@") + (f"#{each.slot}" if self._shares else "")
        # What gunicorn names when it says where it listens; see for_worker().
        self._server.set_listeners([each.sock for each in usable if not (self._shares and each.slot)])

    def _share_ports(self) -> None:
        groups = {
            number: (ordered, earlier)
            for number, ordered, earlier in (self._inherited.groups if self._inherited else ())
        }
        backlog = self._server.cfg.backlog
        for _, members in groupby(sorted(self._all, key=attrgetter("bind")), attrgetter("bind")):
            ours = list(members)
            ordered, earlier = groups.get(ours[0].sock.getsockname()[1], (True, ()))
            self._ports.append(Port(ours, backlog, earlier, ordered=ordered))

    @property
    def added_paths(self) -> list[str]:
        """Paths that this generation has made beside a predecessor's, which removes them if this one fails."""
        return paths_added(self._all)

    def unreachable_paths(self) -> list[str]:
        """Return the paths of Unix sockets of ours by which no client reaches this service."""
        ours = [each for each in self._all if each.is_open and each.listens and not each.is_lent]
        reached = {each.path for each in ours if each.is_reachable}
        return sorted({each.path for each in ours} - reached)

    def open(self) -> None:
        """Listen on what was only bound so far, now that workers are about to accept. Raises OSError."""
        for port in self._ports:
            port.open(self._server.num_workers)
        guarded("listeners", name_others)(self._ports)
        for each in [] if self._ports else self._all:
            if not each.listens and each.is_open:
                each.listen(self._server.cfg.backlog)

    # -- how they travel

    def inheritance(self) -> dict[str, Any]:
        """Return what a successor is given of them, as fields of `Inheritance`."""
        self.hold()
        given = [each for port in self._ports for each in port.in_order()] or self._all
        self._given = [each for each in given if each.is_open]
        return {
            "listeners": tuple(each.sock.fileno() for each in self._given),
            "binds": tuple(each.bind for each in self._given),
            "slots": tuple(each.slot for each in self._given),
            "mode": self._mode,
            "groups": tuple(port.group for port in self._ports),
        }

    # -- in a worker

    def for_worker(self, worker: WorkerFacade, slot: Slot) -> dict[int, int]:
        """Give a worker what it accepts from; return the index of each listener, by descriptor."""
        if self._ports:
            worker.set_sockets([port.for_worker(slot) for port in self._ports])
        return {each.socket.fileno(): each.index for each in self._all if each.is_open}

    # -- what is to be seen of them

    def note(self) -> None:
        """Note the queues on the board; the tick's call."""
        for each in self._all:
            if each.is_open and each.listens:
                each.record.length, each.record.limit = queue(each.socket)

    # -- how many they are, in `reuseport` mode

    @property
    def is_busy(self) -> bool:
        """Whether a queue is on its way out."""
        return any(port.is_busy for port in self._ports)

    def fit(self, workers: int) -> None:
        """Have a queue for each worker; the tick's call while this generation alone serves."""
        for port in self._ports:
            port.fit(workers)

    def hold(self) -> None:
        """Let their number be as it is: another process uses them too, or will."""
        for port in self._ports:
            port.hold()

    # -- how they go

    def drop(self, indices: Collection[int]) -> None:
        """Begin to empty those that a successor does not want, before the workers are told to leave."""
        # First of all: without it no worker goes by the doors.
        self._header.blocked_since = clock.now_ns()
        for each in [self._given[index] for index in indices if index < len(self._given)]:
            # One that is lent stays as it is, open too: it could not be had again.
            each.dropped = not each.is_lent
            if not each.dropped:
                each.set_admission(Admission.HANDED_OFF)
        self._shared_ports.leave([port for port in self._ports if port.members[0].dropped])
        for each in self._all:
            if each.dropped and each.listens and not self._is_left_to_others(each):
                each.set_admission(block_new_connections(each.socket))

    def close_dropped(self) -> None:
        """Close them, when no worker accepts any more."""
        dropped = [each for each in self._all if each.dropped and each.is_open]
        for each in dropped:
            if isinstance(each.address, tuple):
                # As it was bound: it may have to be bound again, and port 0 would be another one.
                each.address = each.sock.getsockname()[:2]
        for port in self._ports:
            if port.members[0] in dropped:
                port.close(partial(self._close, for_good=True))
        for each in dropped:
            self._close(each, for_good=True)
        for bind in dict.fromkeys(each.bind for each in dropped):
            log.emit("listener.closed", bind=bind)

    def take_back(self) -> None:
        """Listen on them again, as far as possible: the successor that did not want them is gone."""
        self._header.blocked_since = 0
        dropped = [each for each in self._all if each.dropped]
        for port in self._ports:
            port.stop_steering()
        lost: dict[str, str] = {}
        for each in dropped:
            each.dropped = False
            try:
                self._reopen(each)
            except OSError as error:
                lost[each.bind] = error.strerror or str(error)
        for each in dropped:
            if each.bind in lost:
                # No worker could be forked with it; nor does anybody accept from others on its port.
                each.sock.close()
                each.listens = False
                each.set_admission(Admission.BOUND)
        for bind, why in lost.items():
            log.emit("listener.lost", logging.ERROR, bind=bind, error=why)
        for each in self._all:
            if each.listens:
                each.set_admission(Admission.OPEN)
        self._ports = [self._taken_back(port, dropped) for port in self._ports if port.members[0].is_open]
        self._publish()

    def _taken_back(self, port: Port, dropped: list[Listener]) -> Port:
        return Port(port.members, self._server.cfg.backlog) if port.members[0] in dropped else port

    def _reopen(self, each: Listener) -> None:
        backlog = self._server.cfg.backlog
        if not each.is_open:
            each.sock = bind_listener(self._server, each.address, shared=self._shares)
            each.note_file()
            if each.listens:
                each.listen(backlog)
        elif each.listens:
            allow_new_connections(each.socket, backlog)

    def keep(self, *, but_added: bool) -> None:
        """Leave the queues to another generation; `but_added`: shut those that only this one has."""
        self.hold()
        self._header.blocked_since = clock.now_ns()
        for each in self._all:
            if but_added and each.added:
                self._shut_alone(each)
            elif each.listens:
                each.set_admission(Admission.HANDED_OFF)

    def shut(self) -> None:
        """Let no new connection in, for good: the service stops."""
        # First of all: what fails below is not tried at each turn.
        self._header.blocked_since = clock.now_ns()
        self._shared_ports.leave(self._ports)
        for each in self._all:
            if each.is_lent:
                each.set_admission(Admission.HANDED_OFF)
            elif not self._is_left_to_others(each):
                self._shut_alone(each)

    def _shut_alone(self, each: Listener) -> None:
        if each.listens and each.is_open:
            each.set_admission(block_new_connections(each.socket))
        if not self._shares:
            # The workers have their own: the last of them closes the queue, right after it has found it empty.
            self._close(each, for_good=True)

    def _is_left_to_others(self, each: Listener) -> bool:
        return any(port.is_left_to_others and each in port.members for port in self._ports)

    @property
    def is_left_to_others(self) -> bool:
        """Whether others on all of our ports are to serve new connections."""
        return bool(self._ports) and all(port.is_left_to_others for port in self._ports)

    def follow(self) -> None:
        """See whether what was under way to steered listeners is over; the tick's call while the service stops."""
        self._shared_ports.follow(self._ports, self._shut_port)

    def _shut_port(self, port: Port) -> None:
        for each in port.members:
            self._shut_alone(each)

    def close(self, *, for_good: bool) -> None:
        """Close what this master still holds of them; `for_good` when no process is to use them any more."""
        for port in self._ports:
            port.close(partial(self._close, for_good=for_good))
        for each in self._all:
            self._close(each, for_good=for_good and not each.is_lent)
        self._server.set_listeners([])

    def _close(self, each: Listener, *, for_good: bool) -> None:
        if for_good:
            # A file that is left behind does no harm; the other listeners are still to be closed.
            with contextlib.suppress(OSError):
                each.unlink()
        if for_good and self._shares and each.is_open and each.listens:
            # A process that still has a copy, such as a child of the app's, would keep clients waiting
            # that the kernel sends there, beside the next master on the port.
            with contextlib.suppress(OSError):
                each.stop_listening()
        # gunicorn's own sets `sock` to None, and does nothing the second time.
        each.sock.close()
