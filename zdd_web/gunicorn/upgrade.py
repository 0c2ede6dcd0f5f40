"""An upgrade as the old generation sees it: fork, exec, follow, and end it when it fails.

Theory of operation
-------------------
`Upgrade.begin()` forks; the child makes the inherited descriptors inheritable and execs the recorded command line.
Between fork and exec it is a copy of the live master: whatever fails there ends in `os._exit`, because an exception
that reached gunicorn's loop would stop the live service from inside the copy.

The master then calls `poll()` from its tick. It returns nothing while all goes its way, and a `Verdict` when the
successor asks to serve, or has failed. What to do about it is the master's business.

`end()` kills: the new master first, so that it forks no more, then every worker on its board. Before `go` nobody there
has taken a request, so SIGKILL costs nothing; afterwards the workers get SIGTERM and finish what they have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from zdd_web import clock, proc
from zdd_web.board import LAYOUT, Board
from zdd_web.errors import BoardError
from zdd_web.gunicorn import bootlog
from zdd_web.gunicorn.handover import ENV, Channel, Inheritance, Message
from zdd_web.gunicorn.launch import Launch

#: Seconds that a new generation must stay alive after it began to serve, before the old one lets go.
COMMIT_WINDOW = 1.0

#: A master in its loop ticks at least once a second; one that has not for so long is stopped or stuck.
STALE_AFTER = 5.0
STALE_AFTER_OFFICE = 15.0


class Stage(enum.Enum):
    """How far the successor has come."""

    BOOTING = "before it was ready"
    COMMITTING = "in the commit window"
    IN_OFFICE = "after the handover"


@dataclass(frozen=True)
class Verdict:
    """`ready` when the successor asks for the gate; otherwise it failed, and `reason` says how."""

    ready: bool
    reason: str = ""
    workers: int = 0


class Upgrade:
    """One successor, from its fork to the end of this master."""

    #: Whether it was forked here, and this process is told by the kernel how it ends.
    is_child = True

    def __init__(self, pid: int, channel: Channel, boot_log: int, timeout: float) -> None:
        self.pid, self.boot_log = pid, boot_log
        self.start = proc.start_time(pid)
        self.began = clock.now_ns()
        self.deadline = clock.after_ns(timeout)
        self.timeout = timeout
        self.stage = Stage.BOOTING
        self.went_at = 0
        self.pid_file = ""
        #: Indices of the listeners that it does not want, and paths of Unix sockets that it has made.
        self.dropped: tuple[int, ...] = ()
        self.added_paths: tuple[str, ...] = ()
        self.board: Board | None = None
        self.status: int | None = None
        self.released = False
        self.speaks = False
        self._channel = channel

    @classmethod
    def begin(
        cls,
        launch: Launch,
        inheritance: Inheritance,
        timeout: float,
        pre_exec: Callable[[Launch], Launch] = lambda launch: launch,
    ) -> Upgrade:
        """Fork and exec a successor; `pre_exec` is called in between. Raises OSError when there can be no fork."""
        ours, theirs = Channel.pair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            _exec(launch, inheritance, theirs, pre_exec)
        theirs.close()
        return cls(pid, ours, inheritance.boot_log, timeout)

    @property
    def seconds(self) -> float:
        """How long ago it began."""
        return clock.since(self.began)

    def reaped(self, status: int) -> None:
        """Take note of the successor's exit status, from the master's reaper."""
        self.status = status

    @property
    def gone(self) -> bool:
        """Whether the successor has ended."""
        return self._channel.ended or self.status is not None

    def poll(self) -> Verdict | None:
        """Hear what the successor says, and judge. None: nothing new."""
        while message := self._channel.receive():
            if message.kind == "hello":
                self._meet(message)
            elif message.kind == "speaks":
                self.speaks = True
            elif message.kind == "ready" and self.stage is Stage.BOOTING:
                return Verdict(ready=True, workers=int(message.fields.get("workers", 0)))
            elif message.kind == "failed":
                return Verdict(ready=False, reason=str(message.fields.get("reason", "")))
            elif message.kind == "release":
                self.released = True
        if self.released and self.stage is Stage.IN_OFFICE:
            return None
        if self.released:
            return Verdict(ready=False, reason=f"the new generation was told to stop {self.stage.value}")
        if self.gone:
            return Verdict(ready=False, reason=f"the new master ended {self.stage.value}: {self._how_it_ended()}")
        if self.stage is Stage.BOOTING and clock.passed(self.deadline):
            return Verdict(
                ready=False,
                reason=f"not ready within UPGRADE_TIMEOUT = {self.timeout:g} s: {self._how_far()}",
            )
        if self.stands_still():
            reason = f"the new master has stood still for {self._patience:g} s {self.stage.value}"
            return Verdict(ready=False, reason=reason)
        return None

    def _meet(self, message: Message) -> None:
        self.pid_file = str(message.fields.get("pid_file", ""))
        self.dropped = tuple(map(int, message.fields.get("dropped", ())))
        self.added_paths = tuple(map(str, message.fields.get("added_paths", ())))
        self._read_board(message.fd)

    @property
    def _patience(self) -> float:
        return STALE_AFTER_OFFICE if self.stage is Stage.IN_OFFICE else STALE_AFTER

    def stands_still(self) -> bool:
        """Tell whether a new master that serves has not turned for longer than one in its loop can take."""
        if self.stage is Stage.BOOTING or self.board is None:
            return False
        return clock.since(self.board.header.tick_at) > self._patience

    def go(self) -> None:
        """Let the successor open its gate."""
        self.stage = Stage.COMMITTING
        self.went_at = clock.now_ns()
        self._channel.send("go")

    @property
    def committed(self) -> bool:
        """Whether the commit window is over, and the successor still turning since it began."""
        return (
            self.stage is Stage.COMMITTING
            and clock.since(self.went_at) >= COMMIT_WINDOW
            # It must have turned *after* the window, not just once in it: a stopped master looks alive for a while.
            and (self.board is None or (self.board.header.tick_at - self.went_at) / 1e9 >= COMMIT_WINDOW)
        )

    def hand_over_office(self) -> None:
        """Tell the successor that it is the service now."""
        self.stage = Stage.IN_OFFICE
        self._channel.send("office")

    def end(self, *, now: bool, reason: str = "") -> None:
        """Kill the new master and its workers; `now` spares no request. Idempotent."""
        # Our own child, so its pid is its own until it is reaped. Not by way of /proc, which cannot be read when this
        # process has run out of descriptors: the successor would live on, and serve.
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._reap()
        while message := self._channel.receive():
            # Not heard yet: which workers and paths there are.
            if message.kind == "hello":
                self._meet(message)
        self._end_workers(now=now)
        self.forget()

    def _end_workers(self, *, now: bool) -> None:
        # Only when the master can fork no more. One that has not written its pid yet finds its parent gone.
        for pid, start in self._workers():
            proc.kill(pid, start, signal.SIGKILL if now or self.stage is Stage.BOOTING else signal.SIGTERM)
        if now and self.board is not None and self.board.header.layout == LAYOUT and self.board.header.probe_pid:
            # It would go by itself, a moment later.
            proc.kill(self.board.header.probe_pid, self.board.header.probe_start, signal.SIGKILL)

    def ask_to_stop(self, sig: signal.Signals) -> None:
        """Pass on to the new master what this one was told: it has requests in hand."""
        proc.kill(self.pid, self.start, sig)

    def forget(self) -> None:
        """Let go of the channel and the board."""
        self._channel.close()
        if self.board is not None:
            self.board.close()
            self.board = None

    def _workers(self) -> list[tuple[int, int]]:
        return self.board.worker_pids() if self.board is not None else []

    def _reap(self) -> None:
        # A killed process is gone in microseconds; bounded because one in uninterruptible sleep is not.
        for _ in range(200):
            if self.status is not None:
                return
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                self.status = status
                return
            time.sleep(0.005)

    def _read_board(self, fd: int) -> None:
        if fd < 0:
            return
        try:
            self.board = Board.open(fd)
        except (BoardError, OSError, ValueError):
            self.board = None
        finally:
            os.close(fd)

    def _how_it_ended(self) -> str:
        self._reap()
        ended = "without a status" if self.status is None else proc.describe(self.status)
        return "; ".join([ended, *self._errors()])

    def _how_far(self) -> str:
        if self.board is None:
            return "zdd_web was not installed yet (a configuration file that hangs, or one without install()?)"
        try:
            workers = self.board.snapshot().workers
        except BoardError as error:
            return str(error)
        states = [worker.state.label for worker in workers]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none yet"
        return "; ".join([f"workers: {counts}", *self._errors()])

    def _errors(self) -> list[str]:
        if self.board is None:
            # The last thing that a broken configuration file had printed.
            return [line for line in [bootlog.last_line(self.boot_log)] if line]
        try:
            return sorted({worker.error for worker in self.board.snapshot().workers if worker.error})[:1]
        except BoardError:
            return []


def _exec(launch: Launch, inheritance: Inheritance, theirs: Channel, pre_exec: Callable[[Launch], Launch]) -> None:
    """Become the new master, in the forked child; never returns."""
    try:
        stderr = os.dup(2)
        os.dup2(inheritance.boot_log, 2)
        heir = dataclasses.replace(inheritance, channel=theirs.fileno(), stderr=stderr)
        for fd in heir.descriptors:
            os.set_inheritable(fd, True)
        launch = pre_exec(launch)
        environ = dict(launch.environ)
        environ[ENV] = heir.to_environ()
        if environ.get("WATCHDOG_PID") == str(inheritance.predecessor):
            # systemd's watchdog is the main process's, which this one is to be.
            environ["WATCHDOG_PID"] = str(os.getpid())
        # For a release without install(): gunicorn reads the second as numbers before it binds (arbiter.py:201), and
        # ends there. It would unlink a live Unix socket otherwise, and serve ungated. With install(), the second also
        # keeps --daemon from detaching again (util.py:526). Both are taken out before gunicorn looks.
        environ["GUNICORN_PID"] = str(inheritance.predecessor)
        environ["GUNICORN_FD"] = "inherited-by-zdd_web"
        os.chdir(launch.directory)
        os.execvpe(launch.command[0], launch.command, environ)
    except BaseException as error:
        try:
            theirs.send("failed", reason=f"the new generation could not be started: {type(error).__name__}: {error}")
        finally:
            os._exit(127)
