"""A takeover: a master that was started, and not forked, is given the listeners of the one that runs.

Another systemd instance, supervisord or a second container that shares a volume starts the new release with a command
line, an environment and a parent of its own; the old one ends when the new one serves. `TAKEOVER` makes a start look
for a running master of this service, and every master offer itself to the next. It is off by default: without it a
second start of the same service by mistake fails with "address in use", and with it it replaces the service.

Theory of operation
-------------------
The active master listens at a Unix socket (system/fd_passing.py), and looks there from its tick. It never waits: a
connection on which nothing comes, or something other than a request, is closed; a few may stay open, the others wait in
the kernel's queue. Any process may connect to an abstract address, so the kernel is asked for the peer's user: only
this user and root may take over. The new master checks the same, since any process may listen there as well.

A connection of any other user is closed as soon as it is accepted, and takes no place among those that may wait. Such
connections can fill the kernel's queue, though: while they come the loop turns as often as in an upgrade, each turn
accepts for `ACCEPTS_FOR`, and the new master waits for its place in the kernel, which serves waiters in their order. At
a path no other user can connect at all.

    new master    -> takeover     name, pid
    active master -> refused      reason
                     inheritance  the fields of `Inheritance`, and the descriptors

From here on the connection is the handover channel (channel.py), the new master is a successor like any other
(external_successor.py, coordinator.py), and readiness, deadline, commit window and outcome are those of SIGUSR2.

Between the commit, where the old master closes its socket, and the first turn of the new one as the active master, no
process listens there. A master that is started just then finds no other, and the address of the service in use.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from zdd_web import log
from zdd_web.errors import ListenerError, UpgradeError
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings
from zdd_web.system import clock, fd_passing, proc

#: How many may be let in and have said nothing yet, how many more may wait to be let in, and for how long, seconds.
MOST_WAITING, BACKLOG = 8, 128
SPEAKS_WITHIN = 3.0

#: For how long connections are accepted in one turn, seconds: a quarter of the loop's time while it is flooded.
ACCEPTS_FOR = 0.005

#: How long a new master waits for an answer, seconds: a master in its loop comes round once a second.
ANSWERS_WITHIN = 10.0

#: A socket that could not be had is tried again after so long, seconds.
TRIED_AGAIN_AFTER = 0.2

#: Those that are turned away are named one a second; the others of that second are counted.
SAID_EVERY = 1.0


class _Waiting(NamedTuple):
    """A connection whose request has not come yet, and its deadline."""

    end: socket.socket
    who: fd_passing.Credentials
    deadline: int


class TakeoverListener:
    """The running master's side: the socket at which it can be found."""

    def __init__(
        self, generation: Generation, admit: Callable[[socket.socket, fd_passing.Credentials, int, str], None]
    ) -> None:
        """`admit` is given each request: its connection, the peer's credentials, the pid and the name that it sent."""
        self._generation, self._admit = generation, admit
        self._where = fd_passing.address(generation.header.name, generation.settings.takeover_socket)
        self._rendezvous: fd_passing.Rendezvous | None = None
        self._waiting: list[_Waiting] = []
        self._not_before = clock.NEVER
        self._failed = False
        self._said_at = clock.NEVER
        self._unsaid = 0
        #: Connections of other users came at the last turn.
        self._crowded = False

    @property
    def _settings(self) -> Settings:
        return self._generation.settings

    @property
    def busy(self) -> bool:
        """Whether a connection has not been answered yet, or others may keep it from being accepted."""
        return bool(self._waiting) or self._crowded

    def open(self) -> None:
        """Listen, at a first start. Raises `ListenerError`."""
        if not self._settings.takeover:
            return
        try:
            self._listen()
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise ListenerError(
                f"{_called(self._settings, self._where)}: {said}: {_remedy(error, self._where)}"
            ) from None

    def _listen(self) -> None:
        self._rendezvous = fd_passing.Rendezvous(self._where, BACKLOG)
        self._failed = False
        log.emit("takeover.offered", address=fd_passing.spell(self._where))

    def follow(self) -> None:
        """Accept connections, and read the requests on those that are accepted; the tick's call."""
        if not self._settings.takeover:
            return
        generation = self._generation
        leaves = generation.header.successor_pid or generation.phase in (Phase.RETIRING, Phase.STOPPED)
        if leaves or generation.awaits_promotion:
            self.close()
            return
        if self._rendezvous is None and not self._listen_again():
            return
        self._let_in()
        self._waiting = [each for each in self._waiting if not self._answered(each)]

    def _listen_again(self) -> bool:
        if self._not_before and not clock.passed(self._not_before):
            return False
        try:
            self._listen()
        except OSError as error:
            self._not_before = clock.after_ns(TRIED_AGAIN_AFTER)
            if not self._failed:
                self._failed = True
                log.emit("takeover.failed", logging.WARNING, address=fd_passing.spell(self._where),
                         error=error.strerror or str(error))  # fmt: skip
            return False
        return True

    def _let_in(self) -> None:
        assert self._rendezvous is not None
        self._crowded = False
        began = clock.now_ns()
        while clock.since(began) < ACCEPTS_FOR:
            if len(self._waiting) >= MOST_WAITING:
                return
            end = self._rendezvous.accept()
            if end is None:
                return
            who = fd_passing.credentials(end)
            if _may(who):
                self._waiting.append(_Waiting(end, who, clock.after_ns(SPEAKS_WITHIN)))
                continue
            self._crowded = True
            reason = f"user {who.uid} may not take over a service of user {os.geteuid()}"
            with contextlib.suppress(OSError):
                fd_passing.send(end, {"kind": "refused", "reason": reason})
            self._reject(end, who, reason)

    def _answered(self, waiting: _Waiting) -> bool:
        end, who = waiting.end, waiting.who
        try:
            fields = fd_passing.receive_now(end)
        except EOFError:
            end.close()
            return True
        except ValueError:
            self._reject(end, who, "what it sent is not a request")
            return True
        if fields is None:
            if clock.passed(waiting.deadline):
                self._reject(end, who, f"it has said nothing for {SPEAKS_WITHIN:g} s")
                return True
            return False
        told, name = fields.get("pid"), fields.get("name")
        if fields.get("kind") != "takeover" or not isinstance(told, int) or not 0 < told < 1 << 31:
            self._reject(end, who, "what it sent is not a request")
            return True
        self._admit(end, who, told, str(name))
        return True

    def _reject(self, end: socket.socket, who: fd_passing.Credentials, reason: str) -> None:
        end.close()
        if self._said_at and clock.since(self._said_at) < SAID_EVERY:
            self._unsaid += 1
            return
        unsaid: dict[str, Any] = {"unsaid": self._unsaid} if self._unsaid else {}
        self._said_at, self._unsaid = clock.now_ns(), 0
        log.emit("takeover.rejected", logging.WARNING, uid=who.uid, peer=who.pid, reason=reason, **unsaid)

    def close(self) -> None:
        """Listen no more, and close the connections that wait."""
        self._forget()
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        self._forget()
        if self._rendezvous is not None:
            self._rendezvous.close_inherited_copy()

    def _forget(self) -> None:
        for each in self._waiting:
            each.end.close()
        self._waiting = []
        self._crowded = False


def _may(who: fd_passing.Credentials) -> bool:
    return who.uid in (os.geteuid(), 0)


def _called(settings: Settings, where: str) -> str:
    return f"TAKEOVER_SOCKET = {where!r}" if settings.takeover_socket else f"TAKEOVER = True, {fd_passing.spell(where)}"


def _remedy(error: OSError, where: str) -> str:
    if where.startswith("\0"):
        return "another program has this address: end it, or set TAKEOVER_SOCKET to a path"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"make the directory {os.path.dirname(where)!r}, this user's alone"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let this user reach and write to the directory, or choose a path in one that is its own"
    if os.path.lexists(where) and not stat.S_ISSOCK(os.lstat(where).st_mode):
        return "it is not a socket: choose another path, or remove it"
    return "another program listens there: choose a path that nothing else uses, no `bind` either"


# -- the new master's side


def ask(settings: Settings, name: str, pid_file: str) -> Inheritance | None:
    """Ask the running master of this service for what it has; None when none runs, and this is a start like any other.

    Raises `UpgradeError` when there is one and it does not give it, and OSError for a pid file that cannot be read.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        raise UpgradeError("TAKEOVER = True needs Linux, whose kernel says who is at the other end: remove it")
    where = fd_passing.address(name, settings.takeover_socket)
    called = _called(settings, where)
    until = time.monotonic() + ANSWERS_WITHIN
    while True:
        try:
            end = fd_passing.connect(where, until)
        except OSError as error:
            # Also a TimeoutError.
            said = (error.strerror or str(error)).lower()
            raise UpgradeError(f"{called}: no master answers there: {said}: {_remedy(error, where)}") from None
        if end is None:
            return None
        who = fd_passing.credentials(end)
        start = proc.start_time(who.pid)
        _refuse(called, who, pid_file)
        try:
            # A master that refuses this user does not read the request: its answer is to be read all the same.
            with contextlib.suppress(ConnectionError):
                fd_passing.send(end, {"kind": "takeover", "name": name, "pid": os.getpid()})
            fields, descriptors = fd_passing.receive(end, until)
        except (EOFError, OSError, ValueError) as error:
            end.close()
            if isinstance(error, EOFError) and time.monotonic() < until:
                # It has ended meanwhile, or was succeeded.
                time.sleep(0.05)
                continue
            said = "it has not answered" if isinstance(error, (TimeoutError, EOFError)) else str(error)
            raise UpgradeError(
                f"{called}: the running master (pid {who.pid}) cannot be taken over from: {said}: look what it does, "
                f"and end it if it is stuck"
            ) from None
        if fields.get("kind") == "refused":
            end.close()
            raise UpgradeError(f"{called}: the running master (pid {who.pid}) refuses: {fields.get('reason')}")
        inherited = Inheritance.from_message(fields, descriptors, end.detach(), who.pid, start)
        log.emit("takeover.found", predecessor=who.pid, listeners=len(inherited.listeners))
        return inherited


def _refuse(called: str, who: fd_passing.Credentials, pid_file: str) -> None:
    if not _may(who):
        raise UpgradeError(
            f"{called} is user {who.uid}'s, and this is user {os.geteuid()}: start it as the same user, or set "
            f"TAKEOVER_SOCKET to a path in a directory that is yours"
        )
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        raise UpgradeError(
            f"{called}: systemd has passed sockets to this process (LISTEN_FDS), and it would take over those of the "
            f"running master (pid {who.pid}): start it without a socket unit, or without TAKEOVER"
        )
    if not pid_file:
        return
    file = PidFile(pid_file, os.getpid())
    file.remove_if_stale()
    named = file.read()
    # The pid of one in another pid namespace says nothing here.
    if who.pid and named not in (0, who.pid) and proc.state(named):
        raise UpgradeError(
            f"pidfile = {pid_file!r} names process {named}, which runs and is not the running master (pid {who.pid}): "
            f"set another pidfile, or end that process"
        )


def decline(inherited: Inheritance | None, reason: str) -> None:
    """Tell a master that was asked why this one ends before it could do anything with what it was given."""
    if inherited is not None and inherited.taken:
        with contextlib.suppress(OSError):
            channel = Channel(socket.socket(fileno=os.dup(inherited.channel)))
            channel.send("failed", reason=reason)
            channel.close()
