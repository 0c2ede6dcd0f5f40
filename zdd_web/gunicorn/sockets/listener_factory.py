"""How the listeners of a generation come to be: made at a first start, or adopted from the predecessor.

What is inherited is recognised by name and address (listeners/matching.py). What a configuration adds is bound at once
and listens when the gate opens: before that no worker accepts from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from zdd_web import log
from zdd_web.board import MOST_LISTENERS, Header
from zdd_web.errors import ListenerError, UpgradeError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.sockets import (
    adopt_listener,
    bind_listener,
    check_certificates,
    create_listener,
    take_stock_inheritance,
)
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.sockets.listener import LEAST_QUEUES, Listener, how_many
from zdd_web.listeners import socket_file
from zdd_web.listeners.bind_errors import describe_bind_error, refuse_mixed, unlink_stale_socket
from zdd_web.listeners.matching import Address, Place, match, same_bind
from zdd_web.listeners.reuseport import bpf
from zdd_web.settings import Settings
from zdd_web.system import sd_listen_fds

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Listener as RawListener


class ListenerFactory:
    """Done once by each generation; `listeners` is what it has obtained."""

    def __init__(self, server: ArbiterFacade, header: Header, settings: Settings) -> None:
        self._server, self._header, self._settings = server, header, settings
        self._mode = settings.listener
        self._shares = self._mode == "reuseport"
        self._is_first = True
        self.listeners: list[Listener] = []

    def make(self, activated: Sequence[sd_listen_fds.Activated]) -> tuple[int, ...]:
        """Make them, or take systemd's; nothing is dropped. Raises `ListenerError`, `SettingsError`."""
        with self._or_undo(self._own_paths):
            self._make(activated)
        return ()

    def adopt(self, inherited: Inheritance) -> tuple[int, ...]:
        """Take what was inherited, and add what is new; return which of the inherited are not wanted, by index.

        Raises `ListenerError`, `SettingsError`, or `UpgradeError` for what only a restart can change.
        """
        self._is_first = False
        with self._or_undo(lambda: paths_added(self.listeners)):
            return self._adopt(inherited)

    @contextlib.contextmanager
    def _or_undo(self, made: Callable[[], list[str]]) -> Iterator[None]:
        check_certificates(self._server.cfg)
        try:
            yield
        except BaseException:
            # No process knows of them yet.
            for path in made():
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise

    def _own_paths(self) -> list[str]:
        theirs = self._server.has_stock_predecessor
        return [each.path for each in self.listeners if each.path and not each.is_lent and not theirs]

    def _make(self, activated: Sequence[sd_listen_fds.Activated]) -> None:
        server = self._server
        if activated:
            # Not ours to unlink, nor to close for good.
            server.mark_sockets_as_systemds()
            for each in activated:
                if each.role == "app":
                    self._add(f"systemd:{each.name}", each.fd, adopt_listener(server, each.fd))
            return
        stock = take_stock_inheritance() if server.predecessor_pid else []
        if stock:
            binds = self._wanted() if self._mode == "fd" and len(stock) == len(server.cfg.bind) else []
            for at, fd in enumerate(stock):
                bind, address = (binds[at].bind, binds[at].address) if binds else (f"fd://{fd}", fd)
                self._add(bind, address, adopt_listener(server, fd))
            return
        for place in self._wanted():
            if self._shares or str(place.address).startswith("\0"):
                # An abstract Unix socket is bound here too: gunicorn before 27 looks for its file.
                self._bind(place)
            elif isinstance(place.address, int):
                self._add(place.bind, place.address, self._adopt_number(place.bind, place.address))
            else:
                self._create(place)

    def _create(self, place: Place) -> None:
        if isinstance(place.address, str):
            # gunicorn takes the file away from the process that serves there:
            # test_unix_socket_removes_the_file_that_is_there.
            unlink_stale_socket(place.address)
        try:
            self._add(place.bind, place.address, create_listener(self._server, place.address))
        except (SystemExit, OverflowError):
            # It has tried for five seconds, and does not say what to do.
            self._bind(place)

    def _adopt_number(self, bind: str, fd: int) -> RawListener:
        try:
            return adopt_listener(self._server, fd)
        except OSError as error:
            raise ListenerError(
                f"bind = {bind!r}: descriptor {fd} is not a listening socket ({error.strerror}): the program that "
                f"starts gunicorn must leave it open under this number"
            ) from None

    def _add(self, bind: str, address: Address, sock: RawListener, slot: int = 0) -> Listener:
        index = len(self.listeners)
        if index == MOST_LISTENERS:
            raise ListenerError(f"bind = {bind!r}: at most {MOST_LISTENERS} listeners are possible: bind fewer")
        each = Listener(bind, address, slot, sock, self._header.listener(index), index, listens=False)
        self.listeners.append(each)
        if each.is_reachable:
            each.note_file()
        if bpf.listens(each.socket):
            each.note_that_it_listens()
        return each

    def _wanted(self) -> list[Place]:
        cfg = self._server.cfg
        places = [Place(bind, address) for bind, address in zip(cfg.bind, cfg.address, strict=True)]
        if not self._shares:
            return places
        refuse_mixed(places)
        slots = how_many(cfg.workers, len(places), _most())
        return [Place(place.bind, place.address, slot) for slot in range(slots) for place in places]

    def _bind(self, place: Place) -> Listener:
        address = place.address
        if place.slot:
            # Port 0: those behind the first one take the port that it was given.
            address = next(each for each in self.listeners if each.bind == place.bind).sock.getsockname()[:2]
        try:
            if isinstance(address, str):
                unlink_stale_socket(address)
            sock = bind_listener(self._server, address, shared=self._shares)
        except (OSError, OverflowError) as error:
            why = describe_bind_error(error, address, shared=self._shares)
            if self._settings.takeover and self._is_first:
                why += (
                    "; TAKEOVER = True has found no master to take it from: was the running one started with TAKEOVER, "
                    "and with the same NAME and TAKEOVER_SOCKET?"
                )
            raise ListenerError(f"bind = {place.bind!r}: {why}") from None
        if self._shares and place.slot == 0:
            # Once for all of them: the kernel's table of connections may be long.
            self._refuse_overlap(place.bind, sock)
        each = self._add(place.bind, place.address, sock, place.slot)
        each.note_file()
        return each

    @staticmethod
    def _refuse_overlap(bind: str, sock: RawListener) -> None:
        # The kernel allows it to one user, and sends connections to whichever address is the more exact one.
        listening = bpf.entries(sock.getsockname()[1], bpf.LISTEN)
        ours = bpf.local_address(sock.sock)
        if any(bpf.overlap(ours, entry.local) for entry in listening):
            raise ListenerError(
                f"bind = {bind!r}: another socket listens on this port by an address that covers this one, or is "
                f"covered by it (`ss -ltnp` shows which): two masters share a port only where they bind the same "
                f"address; '[::]' takes IPv4 and IPv6"
            )

    def _adopt(self, inherited: Inheritance) -> tuple[int, ...]:
        server = self._server
        if inherited.mode != self._mode:
            self._close_given(inherited.listeners)
            raise UpgradeError(
                f"LISTENER is {self._mode!r} in the new configuration and {inherited.mode!r} in the running one: "
                f"an upgrade keeps the listeners; restore LISTENER, or restart the service"
            )
        binds = (
            inherited.binds if len(inherited.binds) == len(inherited.listeners) else ("",) * len(inherited.listeners)
        )
        slots = inherited.slots if len(inherited.slots) == len(inherited.listeners) else (0,) * len(inherited.listeners)
        # One of a release that names its listeners otherwise goes by its address.
        given = [
            Place(bind, _address_of(fd), slot) for fd, bind, slot in zip(inherited.listeners, binds, slots, strict=True)
        ]
        inherited_only = all(place.bind.startswith("systemd:") for place in given)
        if self._mode == "systemd" or inherited_only:
            wanted = given
        else:
            wanted = self._wanted()
            if self._shares:
                # Those that listen go on to, however many workers there are now: see Port.fit().
                old = [place for place in given if any(same_bind(place, each) for each in wanted)]
                named = [_as_one_of(old, place) for place in wanted]
                wanted = [*old, *_as_many_as_fit([place for place in named if place not in old], _most() - len(old))]
        found = match(wanted, given)
        kept = dict(found.kept)
        for at, place in enumerate(wanted):
            if at in kept:
                sock = adopt_listener(server, inherited.listeners[kept[at]], shared=self._shares)
                self._rebind_unless_reached(place, sock)
                self._add(place.bind, place.address, sock, place.slot)
            elif isinstance(place.address, int):
                raise UpgradeError(
                    f"bind = {place.bind!r} is new: a descriptor cannot be added in an upgrade; restart the service"
                )
            else:
                self._bind(place).added = True
        self._close_given(inherited.listeners[index] for index in found.dropped)
        had = {each.bind for each in given}
        for bind in dict.fromkeys(wanted[at].bind for at in found.added if wanted[at].bind not in had):
            log.emit("listener.added", bind=bind)
        bound = {place.bind for place in wanted}
        for bind in dict.fromkeys(given[index].bind or str(given[index].address) for index in found.dropped):
            if bind not in bound:
                log.emit("listener.dropped", bind=bind)
        return found.dropped

    def _rebind_unless_reached(self, place: Place, sock: RawListener) -> None:
        """Bind a path again whose file is gone, or leads to another socket."""
        name = sock.sock.getsockname()
        if sock.FAMILY != socket.AF_UNIX or not isinstance(name, str) or not name:
            return
        # A relative path is that of the new release's directory.
        path = place.address if isinstance(place.address, str) else name
        if socket_file.leads_to(path, sock.sock):
            return
        if place.bind.startswith(("fd://", "systemd:")):
            # It may be reached by a path of another mount namespace.
            log.emit("listener.unreachable", logging.WARNING, bind=place.bind, path=path,
                     remedy="if clients use this path: have it bound again by what has made it (systemd: restart the "
                     "socket unit)")  # fmt: skip
            return
        # Before the inherited one, which is kept for those who wait in its queue: the next upgrade, which wants one of
        # the two, takes the first.
        self._bind(place).added = True
        log.emit("listener.rebound", logging.WARNING, bind=place.bind, path=path)

    @staticmethod
    def _close_given(fds: Iterable[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def _most() -> int:
    # Every worker has them all, and opens files besides.
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_LISTENERS if files == resource.RLIM_INFINITY else min(MOST_LISTENERS, files // 4)


def _as_many_as_fit(places: list[Place], room: int) -> list[Place]:
    """Leave those out that are only for workers to come, as many for each bind."""
    binds = len({place.bind for place in places})
    return [place for place in places if place.slot < max(LEAST_QUEUES, room // max(1, binds))]


def _as_one_of(old: list[Place], place: Place) -> Place:
    """Name a listener as those are named that share its port."""
    known = next((each for each in old if same_bind(each, place)), place)
    return Place(known.bind, known.address, place.slot)


def paths_added(listeners: Iterable[Listener]) -> list[str]:
    """Return the paths of Unix sockets that a predecessor does not have."""
    return [each.path for each in listeners if each.path and each.added]


def _address_of(fd: int) -> Address:
    with socket.socket(fileno=os.dup(fd)) as look:
        name = look.getsockname()
    if isinstance(name, tuple):
        return name[0], name[1]
    return os.fsdecode(name)
