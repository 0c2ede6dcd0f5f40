"""The probe port, the master's side: its socket, and the process that answers on it.

Theory of operation
-------------------
The listening socket is the master's for the whole of the master's life. It is bound before the pid file is written, so
that a port that cannot be had ends the start; a successor with the same `PROBE_BIND` inherits it, like the listeners.
Its process may die and be forked again: meanwhile clients wait in the kernel's queue, and none is refused.

The process (zdd_web.probe_server) is forked, without exec: there may be no virtualenv left to exec from. It is a copy
of the master, so everything of the master's is taken from it first: signal handlers, descriptors, the user. It is told
by two words of the board's header which of them is meant and whether it accepts; see there.

Its end is noticed and reaped by pid, before gunicorn's reaper sees it. It is ended, and waited for, in `on_exit`, the
last thing that gunicorn does: the next start of the service finds the port free. A retired master leaves it alone,
with the connections that are still to be closed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from zdd_web import log
from zdd_web.board import LAYOUT, Board
from zdd_web.errors import ListenerError, SettingsError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.ownership import change_user, set_process_title
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.log_rotation import reopening
from zdd_web.gunicorn.master.worker_roster import BACKOFF_FACTOR, BACKOFF_FIRST, BACKOFF_MOST
from zdd_web.gunicorn.upgrade.predecessor_link import PredecessorLink
from zdd_web.gunicorn.upgrade.successor_process import Upgrade
from zdd_web.lifecycle import STOPPING, Phase
from zdd_web.settings import APP_SETTINGS, Settings
from zdd_web.system import clock, proc

#: Clients that may wait while the process is forked again.
BACKLOG = 1024
#: Seconds in which the process of a master that was killed has let go of the port.
BIND_PATIENCE = 2.0
#: One that has lived for so long, in seconds, is forked again at once when it dies.
LIVED = 10.0
#: A killed process is gone in microseconds; one in uninterruptible sleep is not waited for any longer, seconds.
END_WITHIN = 1.0

#: Where others have PROBE_BIND, a socket of systemd's has its name behind this.
SYSTEMD = "systemd:"

WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound

_REMEDIES = {
    errno.EADDRINUSE: "another process has this port (`ss -ltnp` shows which): end it, or choose another port",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address: 0.0.0.0 means all of them",
    errno.EACCES: "ports below 1024 are root's: choose one from 1024 on",
}


def address(bind: str) -> tuple[str, int]:
    """Take `HOST:PORT` apart.

    >>> address("0.0.0.0:8081"), address("[::]:8081")
    (('0.0.0.0', 8081), ('::', 8081))
    """
    host, _, port = bind.rpartition(":")
    return host.strip("[]"), int(port)


def spell(bound: tuple[Any, ...] | str) -> str:
    """Spell a socket's address as `PROBE_BIND` does; the path of a Unix socket, which only systemd makes, as a bind.

    >>> spell(("::1", 8081, 0, 0))
    '[::1]:8081'
    """
    if isinstance(bound, str):
        return f"unix:{bound}"
    return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"


def refuse_if_taken(bind: str, binds: Iterable[object]) -> None:
    """Raise `SettingsError` when the port is one of gunicorn's own `binds`, as gunicorn has parsed them."""
    host, port = address(bind)
    for each in binds:
        if not port or not isinstance(each, tuple) or each[1] != port:
            continue
        if each[0] == host or host in WILDCARDS or each[0] in WILDCARDS:
            raise SettingsError(
                f"PROBE_BIND = {bind!r}: the app itself is served there (bind {spell(each)}): choose another port"
            )


def listen(bind: str, patience: float = BIND_PATIENCE) -> socket.socket:
    """Return a listening socket. Raises `ListenerError`."""
    host, port = address(bind)
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host or "0.0.0.0",  # noqa: S104 - what was asked for
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenerError(f"PROBE_BIND = {bind!r}: {error.strerror}: write an address of this machine") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline = time.monotonic() + patience
    while True:
        try:
            listener.bind(where)
            listener.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            listener.close()
            said = (error.strerror or str(error)).lower()
            remedy = _REMEDIES.get(error.errno or 0, "choose another address")
            raise ListenerError(f"PROBE_BIND = {bind!r}: {said}: {remedy}") from None
        listener.setblocking(False)
        return listener


class ProbePort:
    """The socket, and the process of this generation."""

    def __init__(
        self,
        server: ArbiterFacade,
        board: Board,
        settings: Settings,
        inherited: Inheritance | None,
        activated: tuple[int, str] = (-1, ""),
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind, or take what was inherited or what systemd has `activated` (descriptor and name; -1 for nothing).

        `forget` unmaps, in the process that answers, memory that only the master may write. Raises `SettingsError` or
        `ListenerError`.
        """
        self._server, self._board, self._header = server, board, board.header
        self._forget = forget
        #: What the process knows; app settings may change at a reload.
        self.settings = settings
        self._bind = settings.probe_bind
        self._listener: socket.socket | None = None
        #: The board of the generation that answers for the service when this master is killed.
        self._predecessors: Board | None = None
        self._pid = 0
        self._status: int | None = None
        self._forked_at = 0
        self._not_before = clock.NEVER
        self._deaths = 0
        if inherited is not None and inherited.probe >= 0:
            listener = socket.socket(fileno=inherited.probe)
            if self._bind == inherited.probe_bind or (not self._bind and inherited.probe_bind.startswith(SYSTEMD)):
                self._bind = inherited.probe_bind
                self._listener = listener
                self._header.probe_shared = 1
            else:
                listener.close()
        if activated[0] >= 0:
            fd, name = activated
            if self._bind:
                raise SettingsError(
                    f"PROBE_BIND = {self._bind!r}, and SYSTEMD_NAMES has systemd's socket {name!r} for probes: there "
                    f"is one probe port; remove one of the two"
                )
            self._bind, self._listener = f"{SYSTEMD}{name}", socket.socket(fileno=fd)
            self._listener.setblocking(False)
        elif self._bind and not self._bind.startswith(SYSTEMD):
            # systemd's sockets are not where `bind` says.
            refuse_if_taken(self._bind, () if settings.listener == "systemd" else server.cfg.address)
            self._listener = self._listener or listen(self._bind)

    @property
    def inheritance(self) -> tuple[int, str]:
        """What a successor is given: the descriptor, -1 for none, and what it was bound by."""
        return (-1, "") if self._listener is None else (self._listener.fileno(), self._bind)

    # -- in the master

    def start(self, predecessor_link: PredecessorLink | None) -> None:
        """Fork the process, if there is to be one and there is none yet."""
        if self._listener is None or self._pid:
            return
        if predecessor_link is not None:
            self._predecessors = predecessor_link.predecessors
        self._header.probe_accepts = predecessor_link is None
        if guarded("probe port", self._fork)():
            log.emit("probes.listening", address=spell(self._listener.getsockname()), pid=self._pid)

    def follow(self, generation: Generation, successor: Upgrade | None, any_serves: Callable[[], bool]) -> None:
        """Tell the process whether it accepts, and fork it again when it has died; the tick's call.

        `any_serves` returns whether a worker of this generation serves.
        """
        if self._listener is None:
            return
        self._header.probe_accepts = self._accepts(generation, successor, any_serves)
        self.look()
        if (self._pid and self._status is None) or generation.phase is Phase.STOPPED:
            return
        if self._pid:
            self._died()
        if self._not_before == clock.NEVER or clock.passed(self._not_before):
            ended = "it could not be forked" if self._status is None else proc.describe(self._status)
            if guarded("probe port", self._fork)():
                log.emit("probes.restarted", logging.WARNING, pid=self._pid, ended=ended)
            else:
                self._died()

    def _died(self) -> None:
        self._pid = 0
        self._deaths = 0 if clock.since(self._forked_at) >= LIVED else self._deaths + 1
        if self._deaths <= 1:
            self._not_before = clock.NEVER
            return
        wait = min(BACKOFF_MOST, BACKOFF_FIRST * BACKOFF_FACTOR ** min(self._deaths - 2, 20))
        self._not_before = clock.after_ns(wait)

    def look(self) -> None:
        """Reap the process if it has ended: by pid, so that gunicorn's reaper never asks itself whose child it was."""
        if not self._pid or self._status is not None:
            return
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self._pid, 0  # reaped by gunicorn, between two looks
        if pid:
            self._status = status

    @staticmethod
    def _accepts(generation: Generation, successor: Upgrade | None, any_serves: Callable[[], bool]) -> bool:
        if generation.phase is Phase.BOOTING:
            # While another generation serves, no client gets an answer of this one until it serves too.
            return generation.predecessor is None or generation.predecessor.alone
        if generation.awaits_promotion and not any_serves():
            return False  # the gate was opened a moment ago
        if not generation.header.successor_pid:
            # Two that answer in turn would each tell their own counts.
            board = successor.board if successor is not None and not successor.gone else None
            return board is None or not (
                board.header.layout == LAYOUT and board.header.probe_shared and board.header.probe_accepts
            )
        if successor is None:
            return True
        board = successor.board
        if board is None or board.header.layout != LAYOUT:
            return False
        if not board.header.probe_shared:
            # Only this one answers here, and it answers as its successor would.
            return True
        # One that was stopped, and not succeeded, has ended while this generation still finishes what it has.
        return successor.gone and board.header.phase in (*STOPPING, Phase.STOPPED) and not board.header.successor_pid

    def renew(self, settings: Settings) -> None:
        """Have another process answer when what it knows has changed; the old one lets its clients go."""
        changed = any(getattr(settings, name) != getattr(self.settings, name) for name in APP_SETTINGS)
        self.settings = settings
        if self._listener is not None and changed and self._pid and guarded("probe port", self._fork)():
            log.emit("probes.restarted", pid=self._pid, ended="replaced: its settings have changed")

    def reopen_logs(self) -> None:
        """SIGUSR1: have the process open its log files again."""
        self._kill(signal.SIGUSR1)

    def end(self) -> None:
        """Close the port, as the last thing that this master does; a retired one leaves it to its successor."""
        if self._listener is None:
            return
        self._listener.close()
        if self._header.successor_pid and not self._header.probe_accepts:
            # Its process has been replaced by the successor's, and goes when it has closed its last connection.
            self._header.probe_pid = 0
            return
        self._kill(signal.SIGKILL)
        deadline = clock.after_ns(END_WITHIN)
        while self._pid and self._status is None and not clock.passed(deadline):
            self.look()
            time.sleep(0.001)

    def _kill(self, sig: signal.Signals) -> None:
        if self._pid and self._status is None:
            # Our own child, not reaped yet: its pid is its own.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, sig)

    def _fork(self) -> bool:
        master = os.getpid()
        # Also of a fork that fails: the next one is not tried at once for ever.
        self._forked_at = clock.now_ns()
        pid = os.fork()
        if pid == 0:
            self._become_the_process(master)
        self._pid, self._status = pid, None
        try:
            start = proc.start_time(pid)
        except OSError:  # no descriptor left
            # It would wait to be named for ever, and another one beside it after each try.
            self._kill(signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._header.probe_start = start
        # It does nothing until it finds itself named.
        self._header.probe_pid = pid
        return True

    # -- in the children

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        if self._listener is not None:
            self._listener.close()

    def _become_the_process(self, master: int) -> NoReturn:
        """Be the probe port's process. Never returns: above is gunicorn's loop, in a copy of the live master."""
        status = 1
        try:
            self._serve(master)
            status = 0
        except BaseException:
            log.emit("internal.error", logging.ERROR, where="probe port", exc_info=True)
        finally:
            os._exit(status)

    def _serve(self, master: int) -> None:
        assert self._listener is not None
        # First of all: whatever hangs below ends with the master. Forgotten when the user changes, hence said again.
        if not proc.die_with_parent(signal.SIGKILL, master):
            return
        _forget_imports()
        server = self._server
        for sig in (*server.signals, signal.SIGCHLD):
            # They reach whole groups, and mean the master. SIGTERM is handled later, SIGUSR1 too.
            signal.signal(sig, signal.SIG_DFL if sig == signal.SIGCHLD else signal.SIG_IGN)
        # Not the arbiter's `proc_name`, which is set after the first hook runs:
        # test_first_hook_comes_before_pid_file_and_process_name.
        set_process_title(f"probes [{server.cfg.proc_name}]")
        # Here workers' code does not run, but what a client sends does arrive.
        self._board.restrict()
        self._forget()
        keep = {0, 1, 2, self._listener.fileno(), *log.own_streams()}
        _close_fds_except(keep)
        # Here, since neither the master nor a worker shall load asyncio before gevent has patched what is below it.
        from zdd_web.probe_server.server import Server

        change_user(server.cfg)
        # After the change of the user, which makes the kernel forget it.
        if not proc.die_with_parent(signal.SIGTERM, master):
            return
        Server(
            self._board, self._listener, self.settings, master, reopening(server.log.reopen_files), self._predecessors
        ).run()


def _forget_imports() -> None:
    """Forget what threads of a preloaded app were importing: they are not here to go on, nor to release its locks."""
    bootstrap: Any = sys.modules["importlib._bootstrap"]
    for name in ("_module_locks", "_blocking_on"):
        getattr(bootstrap, name, {}).clear()
    for name, module in list(sys.modules.items()):
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            del sys.modules[name]


def _close_fds_except(keep: set[int]) -> None:
    """Let go of every other descriptor.

    /dev/null takes their places: objects of the master's that are collected later close a number that was theirs.
    """
    try:
        there = [int(entry) for entry in os.listdir("/proc/self/fd")]
    except OSError:
        there = list(range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096)))
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in there:
        if fd not in keep:
            with contextlib.suppress(OSError):
                os.fstat(fd)  # not one that is closed
                os.dup2(nothing, fd, inheritable=False)
