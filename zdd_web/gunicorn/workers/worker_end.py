"""The end of a worker: background work, threads of the app, and Python's own exit.

An event loop cancels its tasks as it ends, so an asyncio worker finishes its background work, or gives it up, before
that. Workers of the other classes do it when their loop is over.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Protocol

from zdd_web import log, waitgroup
from zdd_web.gunicorn import process_exit
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.workers.exit_states import STATUS, Event, StateMachine
from zdd_web.lifecycle import Phase
from zdd_web.process import Process
from zdd_web.system import clock

#: The part of the time between deadline and kill in which background work is given up; `on_drained` comes after it.
GIVE_UP_SHARE = 0.65

#: Python's `sys.setswitchinterval()` from the deadline on, seconds.
LAST_SWITCH_INTERVAL = 0.0002


class Threads(Protocol):
    """What differs from one worker class to the next."""

    has_cut: bool
    beat: Callable[[], None]

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""

    def own_threads(self) -> set[threading.Thread]:
        """Return the worker's threads, which are not the app's."""

    def frames(self) -> Mapping[int, FrameType]:
        """Return where each thread stands, by its `ident`."""


class WorkerEnd:
    """The waits of one worker after its loop, and its exit."""

    def __init__(self, worker: WorkerFacade, process: Process, machine: StateMachine, adapter: Threads) -> None:
        assert process.slot is not None
        self._worker, self._process, self._slot, self._machine = worker, process, process.slot, machine
        self._adapter = adapter
        self._given_up = threading.Lock()
        #: Set when the thread that has given the background work up has logged it.
        self._is_named = threading.Event()
        #: When background work and threads are given up where nothing else bounds them; set as the wait begins.
        self._background_own = self._threads_own = clock.NEVER
        #: The threads that were left at the end of the wait for them; None before it.
        self._left_behind: list[threading.Thread] | None = None
        self._last_beat: Callable[[], None] = lambda: None

    def finish(self) -> None:
        """Wait for background work and for threads of the app; what is left at its deadline is named in the log."""
        self._left_behind = []
        # The second time for work that was begun before the groups were closed.
        for close in (waitgroup.close_all, lambda: None):
            while not self.background_is_over():
                self._adapter.beat()
                left = clock.remaining(self.background_deadline(self._background_own))
                for entry in waitgroup.all_entries()[:1]:
                    entry.group.wait(timeout=0.1 if left is None else min(0.1, left))
            close()
        self.give_up_background()
        self._wait_for_names()
        self._run_drained_hooks()
        self._left_behind = process_exit.wait(self.threads_left, self.threads_deadline, self._adapter.beat)
        process_exit.name(self._left_behind, self._adapter.frames)
        self._last_beat = self._worker.lasting_heartbeat()

    # -- background work

    def background_is_over(self) -> bool:
        """Tell whether no background work is left, or what is left is given up; the first call that waits is logged."""
        entries = waitgroup.all_entries()
        if not entries or self._given_up.locked():
            return True
        if not self._background_own:
            self._background_own = clock.after_ns(self._process.settings.recycle_timeout)
            log.emit("background.waiting", pid=os.getpid(), tasks=len(entries))
        return clock.passed(self.background_deadline(self._background_own))

    def background_deadline(self, own: int) -> int:
        """When background work is given up: at the stop's deadline; at this worker's `own` while the service goes on.

        A retiring generation has RETIRE_TIMEOUT until a stop brings a deadline; one whose master is gone has less.
        """
        header = self._process.board.header
        if self._is_orphaned():
            return own
        if header.phase in (Phase.RETIRING, Phase.DRAINING):
            return header.deadline or self._slot.retire_deadline
        return self._slot.retire_deadline or own

    def give_up_background(self) -> None:
        """Log what is left of the background work, once: in an event loop before its end, which cancels tasks."""
        # From any thread: at the deadline the loop may still be in a request.
        if not self._given_up.acquire(blocking=False):
            return
        try:
            waitgroup.close_all()
            # Threads that compute would each keep the interpreter for 5 ms whenever this one has written a line.
            sys.setswitchinterval(LAST_SWITCH_INTERVAL)
            timeout = GIVE_UP_SHARE * self._abandon_window
            waitgroup.abandon(waitgroup.all_entries(), timeout, self._adapter.beat, self._count_abandoned)
        finally:
            self._is_named.set()

    def _wait_for_names(self) -> None:
        # The thread that watches the deadline may have been the first, and the process must not end before it is done.
        until = time.monotonic() + GIVE_UP_SHARE * self._abandon_window
        while not self._is_named.wait(0.05) and time.monotonic() < until:
            self._adapter.beat()

    def _count_abandoned(self, tasks: int) -> None:
        # Before any code of the app is called, which may end the process.
        self._slot.abandoned += tasks

    def _run_drained_hooks(self) -> None:
        deadline = self._process.deadline_ns
        until = None if deadline == clock.NEVER else deadline / 1e9 + 0.8 * self._abandon_window
        waitgroup.run_drained_hooks(until, self._adapter.beat)

    @property
    def _abandon_window(self) -> float:
        return self._process.settings.stop_budget().abandon_window

    # -- threads

    def threads_left(self, *, pools_only: bool = False) -> list[threading.Thread]:
        """Return the app's threads that Python would wait for, except those that do background work."""
        tracked = {entry.thread_id for entry in waitgroup.all_entries()}
        threads = process_exit.waited_for(self._adapter.own_threads(), self._adapter.frames, pools_only=pools_only)
        return [thread for thread in threads if thread.ident not in tracked]

    def threads_deadline(self) -> int:
        """When threads are left behind: at the stop's deadline, and after RECYCLE_TIMEOUT while the service goes on.

        Not when background work is: most of these threads have no end of their own, and a generation that retires would
        stay, with its consumers at work, for as long as it may.
        """
        if not self._threads_own:
            self._threads_own = clock.after_ns(self._process.settings.recycle_timeout)
        if self._is_orphaned():
            return self._threads_own
        header = self._process.board.header
        if header.phase == Phase.DRAINING:
            return header.deadline or self._threads_own
        return process_exit.earlier(header.deadline, self._slot.retire_deadline, self._threads_own)

    def _is_orphaned(self) -> bool:
        return os.getppid() != self._worker.ppid

    # -- the exit

    def exit(self) -> None:
        """Called last of all, after the `worker_exit` of the user."""
        status = STATUS.get(self._machine.state)
        self._machine.move(Event.EXIT)
        if status is not None:
            process_exit.end(status)
        if self._slot.abandoned or self._adapter.has_cut:
            # Python would wait for the threads of the abandoned work.
            process_exit.end(1)
        status = process_exit.status_under_way()
        left = self._left_behind
        if left is None:
            # Before its loop it has accepted nothing, so its threads get no time.
            left = process_exit.waited_for(frames=self._adapter.frames)
        if left:
            process_exit.end(status)
        process_exit.bound(self.threads_deadline(), self._last_beat, status, self._adapter.interval)
