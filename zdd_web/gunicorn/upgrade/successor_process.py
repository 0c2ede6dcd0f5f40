"""An upgrade as the old generation sees it: fork, follow, and end it when it fails.

Theory of operation
-------------------
`Upgrade.begin()` forks, and the child execs (exec_successor.py). The master then calls `poll()` from its tick. It
returns nothing while all goes its way, and a `Verdict` when the successor asks to serve, or has failed. What to do
about it is the master's business.

`end()` kills: the new master first, so that it forks no more, then every worker that it has written on its board.
Before `go` none of them has taken a request, so SIGKILL costs nothing; afterwards they get SIGTERM and finish what they
have. A pid on a board is signalled only when the process is the new master's child, or an orphan that one of its
ancestors has adopted, and runs as a user that it may run as. On a board of zdd_web 0.1.0 the workers themselves write
their pids: there only children of the new master are signalled, which is stopped meanwhile; its orphans end by the
kernel (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from zdd_web.board import LAYOUT, Board
from zdd_web.errors import BoardError
from zdd_web.gunicorn.boot_progress import progress
from zdd_web.gunicorn.handoff.channel import MOST_QUEUED, Channel, Message
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.upgrade.commit_window import CommitWindow, Judgement
from zdd_web.gunicorn.upgrade.exec_successor import become_successor
from zdd_web.gunicorn.upgrade.states import (
    BEFORE_GO,
    HANDED_OVER,
    RELEASED,
    SERVES_BESIDE,
    SUCCESSOR,
    Successor,
    SuccessorEvent,
    after,
    knows,
    when,
)
from zdd_web.system import clock, pauses, proc
from zdd_web.system.boot_log import BootLog

#: How long the commit window waits for workers that are late, also when UPGRADE_TIMEOUT is nearly over, seconds.
LATE_AT_LEAST = 8.0

#: How many of the workers' errors, or steps, a reason quotes.
MOST_ERRORS = 3

#: A master in its loop ticks at least once a second; one that has not for so long is stopped or stuck.
STALE_AFTER = 5.0
STALE_AFTER_HANDOVER = 15.0


class Verdict(NamedTuple):
    """`ready` when the successor asks for the gate; otherwise it failed, and `reason` says how."""

    ready: bool
    reason: str = ""
    workers: int = 0


class Upgrade:
    """One successor, from its fork to the end of this master."""

    #: Whether it was forked here, and this process is told by the kernel how it ends.
    is_child = True

    def __init__(self, pid: int, channel: Channel, boot_log: BootLog, timeout: float, commit_window: float) -> None:
        self.pid, self.boot_log = pid, boot_log
        self.start = proc.start_time(pid)
        self.began = clock.now_ns()
        self.timeout, self.commit_window = timeout, commit_window
        self.state = Successor.STARTING
        self.went_at = 0
        self.pid_file = ""
        #: Indices of the listeners that it does not want, and paths of Unix sockets that it has made.
        self.dropped: tuple[int, ...] = ()
        self.added_paths: tuple[str, ...] = ()
        #: It takes kept connections from the exchange.
        self.takes_connections = False
        #: With how many workers it serves until its watch is passed; 0 for all.
        self.canary = 0
        self.board: Board | None = None
        self.status: int | None = None
        self.reopen_number = 0
        #: Whether its board outlives this object, see `orphaned_workers.py`.
        self.keeps_board = False
        self._channel = channel
        #: These adopt its workers when it has ended.
        self._adopters = proc.ancestors(pid)
        self._user = proc.owner(pid)
        self._window: CommitWindow | None = None
        self._window_at = 0
        self._judgement = Judgement()
        #: What to compare its boot with, if it takes too long.
        self.hint = ""

    @classmethod
    def begin(
        cls,
        launch: Launch,
        inheritance: Inheritance,
        boot_log: BootLog,
        timeout: float,
        commit_window: float,
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
            ours.close()
            become_successor(launch, inheritance, boot_log, theirs, pre_exec)
        boot_log.output.close_writer()
        # Before /proc is read for its start time, which needs a descriptor.
        theirs.close()
        return cls(pid, ours, boot_log, timeout, commit_window)

    def move(self, event: SuccessorEvent) -> None:
        """Enter the state that follows; what it means is for the caller to do. Raises `LifecycleError`."""
        self.state = after(SUCCESSOR, self.state, event)

    @property
    def has_own_stderr(self) -> bool:
        """Whether what it prints goes to its own stderr, and no longer to the boot log."""
        return self.boot_log.spoke

    @property
    def has_accepted(self) -> bool:
        """Whether it was sent `go`, and may have accepted requests since."""
        return bool(self.went_at)

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
        """Read what the successor has printed and sent, and judge. None: nothing new."""
        self.boot_log.drain()
        told_to_stop = False
        for message in self._channel.receive_some():
            if message.kind == "hello":
                self._handle_hello(message)
                if knows(SUCCESSOR, self.state, SuccessorEvent.HELLO):
                    self.move(SuccessorEvent.HELLO)
            elif message.kind == "speaks":
                self.boot_log.speaks()
            elif message.kind == "ready" and knows(SUCCESSOR, self.state, SuccessorEvent.READY):
                self.move(SuccessorEvent.READY)
                return Verdict(ready=True, workers=_number(message.fields.get("workers")))
            elif message.kind == "failed":
                return Verdict(ready=False, reason=str(message.fields.get("reason", "")))
            elif message.kind == "release" and knows(SUCCESSOR, self.state, SuccessorEvent.RELEASED):
                self.move(SuccessorEvent.RELEASED)
            elif message.kind == "release":
                told_to_stop = self.state not in RELEASED
            elif message.kind == "reopen":
                self.reopen_number = max(self.reopen_number, message.number("number"))
        if self.state in RELEASED:
            return None
        if told_to_stop:
            return Verdict(ready=False, reason=f"the new generation was told to stop {when(self.state)}")
        if self.gone:
            return Verdict(ready=False, reason=f"the new master ended {when(self.state)}: {self._how_it_ended()}")
        if self.state in BEFORE_GO and pauses.since(self.began) > self.timeout:
            return Verdict(
                ready=False,
                reason=f"not ready within UPGRADE_TIMEOUT = {self.timeout:g} s: "
                + "; ".join(filter(None, [self._how_far(), self.hint])),
            )
        if self.is_stalled():
            reason = f"the new master has stood still for {self._patience:g} s {when(self.state)}"
            return Verdict(ready=False, reason=reason)
        if self.state in SERVES_BESIDE and self._window is not None:
            self._judgement = self._window.judge()
            if self._judgement.reason:
                errors = self._errors() if self.state is Successor.GROWING else []
                return Verdict(ready=False, reason="; ".join([self._judgement.reason, *errors]))
        return None

    def _handle_hello(self, message: Message) -> None:
        self.pid_file = str(message.fields.get("pid_file", ""))
        self.dropped = tuple(map(_number, _list(message.fields.get("dropped"))))
        self.added_paths = tuple(map(str, _list(message.fields.get("added_paths"))))
        self.takes_connections = message.fields.get("exchange") is True
        self.canary = _number(message.fields.get("canary"))
        self._read_board(message.fd)

    @property
    def _patience(self) -> float:
        return STALE_AFTER_HANDOVER if self.state in HANDED_OVER else STALE_AFTER

    def is_stalled(self) -> bool:
        """Tell whether a new master that serves has not turned for longer than one in its loop can take."""
        if not self.has_accepted or self.board is None:
            return False
        return pauses.since(self.board.header.tick_at) > self._patience

    def go(self) -> None:
        """Let the successor open its gate."""
        self.move(SuccessorEvent.GO)
        self.went_at = self._window_at = clock.now_ns()
        if self.board is not None and self.board.header.layout == LAYOUT:
            left = self.timeout - pauses.since(self.began)
            self._window = CommitWindow(self.board, self.commit_window, max(left, LATE_AT_LEAST))
            self._judgement = Judgement(waits_for="a first look")
        self._channel.send("go")

    def grow(self, seconds: float) -> bool:
        """Have a canary that has passed its watch start its other workers, and begin the window in which it does.

        It lasts `seconds`, and until all serve, for UPGRADE_TIMEOUT at most. Returns False for one that has all.
        """
        if not self.canary or self.state is not Successor.COMMITTING or self._window is None or self.board is None:
            return False
        self.move(SuccessorEvent.GROW)
        self.commit_window, self._window_at = seconds, clock.now_ns()
        self._window = CommitWindow(self.board, seconds, self.timeout, grows=True)
        self._judgement = Judgement(waits_for="a first look")
        self._channel.send("grow")
        return True

    @property
    def committed(self) -> bool:
        """Whether the commit window is over: the successor's master turns, and its workers are confirmed."""
        return (
            self.state in SERVES_BESIDE
            and clock.since(self._window_at) >= self.commit_window
            # It must have turned *after* the window, not just once in it: a stopped master looks alive for a while.
            and (self.board is None or (self.board.header.tick_at - self._window_at) / 1e9 >= self.commit_window)
            and self._judgement.confirmed
        )

    def promote_successor(self) -> None:
        """Tell the successor that it is the service now."""
        self.move(SuccessorEvent.CONFIRMED)
        self._channel.send("office")

    def reopen(self, number: int) -> None:
        """Have the successor open its log files again; see log_rotation.py."""
        self._channel.send("reopen", number=number)

    def end(self, *, now: bool, reason: str = "") -> None:
        """Kill the new master and its workers; `now` spares no request. Idempotent."""
        # Our own child, so its pid is its own until it is reaped. Not by way of /proc, which cannot be read when this
        # process has run out of descriptors: the successor would live on, and serve.
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                if self.board is not None and not self.board.names_its_workers:
                    os.kill(self.pid, signal.SIGSTOP)
                    self._end_workers(now=now)
                os.kill(self.pid, signal.SIGKILL)
        self._reap()
        for message in self._channel.receive_some(MOST_QUEUED):
            # Not read yet: it names the workers and the paths.
            if message.kind == "hello":
                self._handle_hello(message)
        self._end_workers(now=now)
        self.forget()

    def _end_workers(self, *, now: bool) -> None:
        # Only when the master can fork no more. A worker that it has not noted yet finds its parent gone.
        board = self.board
        if board is None:
            return
        sig = signal.SIGKILL if now or not self.has_accepted else signal.SIGTERM
        for pid, start in board.worker_pids():
            self.signal_worker(pid, start, sig)
        header = board.header
        if now and header.layout == LAYOUT and header.probe_pid:
            # It would go by itself, a moment later.
            self.signal_worker(header.probe_pid, header.probe_start, signal.SIGKILL)

    def signal_worker(self, pid: int, start: int, sig: signal.Signals) -> None:
        """Signal a process that the successor's board names, if it is one of its workers; see the module's text."""
        assert self.board is not None
        parents, users = (self.pid, *self._adopters), None
        if not self.board.names_its_workers:
            parents = (self.pid,)
        elif self.board.header.worker_uid:
            # A worker is of the master's user until it has changed it.
            users = (self._user, self.board.header.worker_uid - 1)
        proc.kill(pid, start, sig, parents=parents, users=users)

    def ask_to_stop(self, sig: signal.Signals) -> None:
        """Pass on to the new master what this one was told: it has requests in hand."""
        proc.kill(self.pid, self.start, sig)

    def forget(self) -> None:
        """Let go of the channel and the board."""
        self._channel.close()
        if self.board is not None and not self.keeps_board:
            self.board.close()
            self.board = None

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
        if self.board is not None:
            self.board.close()
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
            return progress(self.board.snapshot(), of_wanted=False, most_errors=MOST_ERRORS)
        except BoardError as error:
            return str(error)

    def _errors(self) -> list[str]:
        if self.board is None:
            # The last thing that a broken configuration file had printed.
            return [line for line in [self.boot_log.last_line()] if line]
        try:
            return sorted({worker.error for worker in self.board.snapshot().workers if worker.error})[:MOST_ERRORS]
        except BoardError:
            return []


def _number(value: object) -> int:
    # What another release sends may be anything that JSON can spell, infinity included.
    return value if isinstance(value, int) else 0


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
