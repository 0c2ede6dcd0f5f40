"""SIGHUP: prove first, in a child process, that config and app load; then reload, and replace workers one by one.

gunicorn's own reload runs the configuration file in the master, where an error is a `sys.exit(1)`, sends SIGTERM to the
old workers before the new ones have booted, and from 24 on blocks its loop until they went. See tests/contract:
test_reload_retires_workers_before_new_ones_have_booted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from zdd_web import log
from zdd_web.errors import NeedsUpgrade, ZddError
from zdd_web.gunicorn import settings_in_force
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.kept_interface import are_taken
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.master.worker_count import too_many_workers
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.systemd_notifier import SystemdNotifier
from zdd_web.settings import Settings
from zdd_web.system import clock, pauses, proc, stdio
from zdd_web.system.captured_output import CapturedOutput, last_line

#: Exit status of a proof that found a change which SIGHUP cannot make. Not one of gunicorn's own (1, 3, 4).
NEEDS_UPGRADE = 10


_REMEDIES = {
    errno.EMFILE: "raise the master's limit of open files (nofile), then send it again",
    errno.ENFILE: "raise the host's limit of open files (fs.file-max), then send it again",
    errno.EAGAIN: "raise the limit of processes (nproc, pids.max), then send it again",
}

#: How much of what a failed proof has printed goes to the log.
PRINTED_BYTES = 8_192


class Proof:
    """A child process that tries the configuration and the app. What it prints is kept, the end of it."""

    def __init__(self, pid: int, output: CapturedOutput, timeout: float) -> None:
        self.pid, self._output, self.timeout = pid, output, timeout
        self._began = clock.now_ns()
        self.status: int | None = None

    @classmethod
    def begin(cls, server: ArbiterFacade, settings: Settings, slots: int) -> Proof:
        """Fork the child. Raises OSError when there can be no fork, or no descriptor is left."""
        output = CapturedOutput()
        try:
            pid = os.fork()
        except OSError:
            output.close()
            raise
        if pid == 0:
            _try(server, settings, slots, output.writer)
        # Nothing from here on can fail: the child would be tracked by no object, and its outcome reach no log.
        output.close_writer()
        return cls(pid, output, settings.upgrade_timeout)

    def reaped(self, status: int) -> None:
        """Take note of the child's exit status, from the master's reaper."""
        self.status = status

    def poll(self) -> str | None:
        """Return why the reload is refused, "" when nothing is against it, None while the child still tries."""
        self._output.drain()
        if self.status is None:
            if pauses.since(self._began) <= self.timeout:
                return None
            self.end()
            return f"config and app did not load within UPGRADE_TIMEOUT = {self.timeout:g} s"
        if self.status == 0:
            return ""
        self._output.drain_all()
        return last_line(self._output.text()) or f"the child that tried it ended with status {self.status}"

    @property
    def remedy(self) -> str:
        """What the operator can do about a proof that failed."""
        return _remedy(self.status)

    def end(self) -> None:
        """Kill the child if it still tries."""
        if self.status is None:
            # Our own child, not reaped yet: its pid is its own. Not by way of /proc, which needs a descriptor.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def forget(self) -> None:
        """Close the pipe, in another child of the master."""
        self._output.close()

    def close(self) -> str:
        """Return the end of what the child has printed, and close its pipe."""
        self._output.drain_all()
        printed = self._output.text(PRINTED_BYTES)
        self._output.close()
        return printed


class Reload:
    """The master's side of SIGHUP."""

    def __init__(
        self,
        server: ArbiterFacade,
        generation: Generation,
        listening: ListenerManager,
        notifier: SystemdNotifier,
        *,
        forwards: Callable[[signal.Signals], bool],
        obstacle: Callable[[], str],
        has_room: Callable[[], bool],
        done: Callable[[], None],
        note: Callable[[str, float, str], None],
        release: Callable[[], str],
    ) -> None:
        """`forwards` sends a signal to the process that it is meant for, and returns False when that is this one.

        `obstacle` returns why no reload can begin now, or ""; `has_room`
        whether the board has a slot for one more worker. `done` is called when a new configuration is in force.
        `note` takes the outcome, the seconds and the reason into the history; `release` returns what the release that
        is in force is called.
        """
        self._server, self._generation = server, generation
        self._listening, self._notifier = listening, notifier
        self._forwards, self._obstacle, self._has_room, self._done = forwards, obstacle, has_room, done
        self._history, self._release = note, release
        self.proof: Proof | None = None
        self._began = clock.NEVER

    def after_fork(self) -> None:
        """Close, in a worker, the pipe of a proof: a process that has it could make the master's reads block."""
        if self.proof is not None:
            self.proof.forget()

    @property
    def under_way(self) -> bool:
        """Whether a child still tries."""
        return self.proof is not None

    def request(self) -> None:
        """SIGHUP: try config and app in a child; the rest happens when it has succeeded."""
        self._generation.read_predecessor()
        if self._forwards(signal.SIGHUP):
            return
        self._began = clock.now_ns()
        if self._server.cfg.preload_app:
            # The app is imported in this process, and a module is imported once.
            reason = "preload_app: the master has loaded the app, and SIGHUP would start workers with that code again"
            guarded("systemd", self._notifier.refused)("reload", reason)
            self._refuse(logging.WARNING, reason, "use an upgrade (SIGUSR2, zdd-web upgrade)")
            return
        obstacle = self._obstacle()
        if obstacle:
            self._refuse(logging.WARNING, obstacle, "send it again later")
            return
        if not self._has_room():
            slots = self._generation.header.slot_count
            reason = f"all {slots} slots of the board are taken, and a new worker starts before an old one retires"
            guarded("systemd", self._notifier.refused)("reload", reason)
            self._refuse(logging.WARNING, reason, "use an upgrade (SIGUSR2, zdd-web upgrade), or send SIGTTOU before")
            return
        unreachable = self._listening.unreachable_paths()
        if unreachable:
            reason = f"the file of a Unix socket is gone, or leads to another socket: {', '.join(unreachable)}"
            guarded("systemd", self._notifier.refused)("reload", reason)
            self._refuse(logging.WARNING, reason, "use an upgrade (SIGUSR2, zdd-web upgrade), which binds it again")
            return
        try:
            self.proof = Proof.begin(self._server, self._generation.settings, self._generation.header.slot_count)
        except OSError as error:
            reason = f"config and app cannot be tried in a child process: {error.strerror}"
            guarded("systemd", self._notifier.refused)("reload", reason)
            self._refuse(logging.WARNING, reason, _REMEDIES.get(error.errno or 0, "send it again later"))
            return
        guarded("systemd", self._notifier.reload_began)()
        log.emit("reload.started", child=self.proof.pid)

    def follow(self) -> None:
        """Put the new configuration in force when the child has proved it; the tick's call."""
        proof = self.proof
        reason = proof.poll() if proof is not None else None
        if proof is None or reason is None:
            return
        self.proof = None
        said = proof.close()
        if not reason:
            reason = apply(self._server)
        guarded("systemd", self._notifier.reload_ended)(reason)
        if reason:
            stdio.write_stderr(said)
            self._refuse(logging.ERROR, reason, f"{proof.remedy}; the old workers serve on")
            return
        # Before a worker is told to leave.
        self._generation.header.keeps_none = not are_taken(self._server.cfg)
        self._done()
        self._note("done")
        log.emit("reload.done", workers=self._server.num_workers, release=self._release())

    def cancel(self) -> None:
        """End a proof under way, because the service is being stopped."""
        if self.proof is not None:
            self.proof.end()
            self.proof.close()
            self.proof = None
            self._note("cancelled", "the service was stopped")
            guarded("systemd", self._notifier.reload_ended)("the service was stopped")

    def _note(self, outcome: str, reason: str = "") -> None:
        guarded("history", self._history)(outcome, clock.since(self._began), reason)

    def _refuse(self, level: int, reason: str, remedy: str) -> None:
        self._note("failed" if level == logging.ERROR else "refused", reason)
        log.emit("refused", level, signal="HUP", reason=reason, remedy=remedy)


def _remedy(status: int | None) -> str:
    """Return the remedy by the wait status of a proof, None for one that was killed.

    >>> _remedy(NEEDS_UPGRADE << 8), _remedy(1 << 8)
    ('use an upgrade', 'fix it and send SIGHUP again')
    """
    # A wait status has the exit status in its second byte.
    return "use an upgrade" if status == NEEDS_UPGRADE << 8 else "fix it and send SIGHUP again"


def _try(server: ArbiterFacade, settings: Settings, slots: int, output: int) -> None:
    """Load config and app, in the forked child; never returns."""
    status = 1
    try:
        # SIGCHLD too: gunicorn 23 reaps in its handler, which would take the child that reads Django's settings.
        for sig in (*server.signals, signal.SIGCHLD):
            signal.signal(sig, signal.SIG_DFL)
        proc.die_with_parent(signal.SIGKILL, server.pid)
        os.dup2(output, 2)
        before = server.cfg
        # As `apply()` and `setup()` will have it: config and app may ask for variables of `raw_env`.
        _reset_environ(before)
        cfg = server.load_configuration()
        os.environ.update(cfg.env)
        with _no_traceback():
            _refuse_unchangeable(before, cfg)
            too_many = too_many_workers(cfg.workers, slots)
            if too_many:
                raise ZddError(too_many)
            settings_in_force.refuse_changes(cfg)
        server.load_app()
        with _no_traceback():
            settings_in_force.apply_app_settings(settings)
        status = 0
    except NeedsUpgrade as error:
        status = NEEDS_UPGRADE
        stdio.print_error(str(error))
    except SystemExit as stop:
        if isinstance(stop.code, str):
            stdio.print_error(stop.code)
    except BaseException:
        stdio.print_error(traceback.format_exc())
    finally:
        # Nothing else may raise here: above is gunicorn's loop, in a copy of the live master.
        with contextlib.suppress(Exception):
            stdio.TolerantStream(sys.stderr).flush()
        os._exit(status)


@contextlib.contextmanager
def _no_traceback() -> Iterator[None]:
    """End with the message alone of an error of ours, which says all; one of the app's is to be found in its code."""
    try:
        yield
    except NeedsUpgrade:
        raise
    except ZddError as error:
        raise SystemExit(str(error)) from None


def _refuse_unchangeable(before: Config, after: Config) -> None:
    if before.address != after.address:
        raise NeedsUpgrade(
            f"bind changed from {before.bind} to {after.bind}: SIGHUP cannot do that without loss; "
            f"use an upgrade (SIGUSR2), which drains what is bound no more"
        )
    if before.worker_class != after.worker_class:
        raise NeedsUpgrade(
            f"worker_class changed from {before.worker_class_str!r} to {after.worker_class_str!r}: "
            f"use an upgrade (SIGUSR2), which takes it over"
        )


def apply(server: ArbiterFacade) -> str:
    """Put the new configuration in force; the workers are the roster's business.

    Returns why that cannot be done, with the old configuration in force again, or "".
    """
    before, environ = server.cfg, dict(os.environ)
    _reset_environ(before)
    try:
        try:
            server.load_configuration()
        except SystemExit:
            # So gunicorn ends for a file that raises, which it has printed:
            # test_configuration_file_that_raises_ends_the_process.
            server.take_back_configuration(before)
            raise ZddError("the configuration loaded a moment ago and does not now: see stderr") from None
        _put_in_force(server, before)
    except Exception as error:
        server.take_back_configuration(before)
        os.environ.clear()
        os.environ.update(environ)
        # It sets the configuration before anything in it can fail, such as a logger_class without setup().
        with contextlib.suppress(Exception):
            server.set_up()
        return str(error) if isinstance(error, ZddError) else f"{type(error).__name__}: {error}"
    return ""


def _put_in_force(server: ArbiterFacade, before: Config) -> None:
    server.set_up()
    server.log.reopen_files()
    server.call_on_reload()
    if server.cfg.pidfile != before.pidfile:
        if server.pid_file is not None:
            server.pid_file.unlink()
        server.set_pid_file(None)
        if server.cfg.pidfile is not None:
            pid_file = PidFile(server.cfg.pidfile, os.getpid())
            server.set_pid_file(pid_file)
            pid_file.create(os.getpid())
    server.set_process_title()


def _reset_environ(cfg: Config) -> None:
    # `raw_env` of the old configuration must not survive in the new one: test_reload_takes_raw_env_back.
    for key in cfg.env:
        if key in cfg.env_orig:
            os.environ[key] = cfg.env_orig[key]
        else:
            os.environ.pop(key, None)
