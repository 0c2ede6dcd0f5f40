"""Checks at work: each in a thread of its own, so that the time limit holds although Python can end no thread.

One that hangs is not started a second time: whatever it holds, there is one thread and one connection of it. Its
result is late until it has ended.

An async check runs in the worker's own event loop where there is one, since what it uses may belong to that; elsewhere
in a loop of its own.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zdd_web import log
from zdd_web.checks import registry
from zdd_web.checks.registry import Check, registered
from zdd_web.health import Kind, Result
from zdd_web.system import clock
from zdd_web.waitgroup.threads import close_connections

if TYPE_CHECKING:
    import asyncio

#: Seconds between two tries of a check that keeps a worker from getting ready.
AGAIN = 1.0
#: How often a waiting worker beats, seconds.
BEAT = 0.1


class State:
    """A check of this process: how it ended the last time, and when it is due."""

    def __init__(self, check: Check, index: int) -> None:
        self.check, self.index = check, index
        self.result = Result.NONE
        self.message = ""
        #: When that was, and since when it fails, monotonic nanoseconds; 0 for never.
        self.at = 0
        self.failing_since = 0
        self._due = 0.0
        self._began: float | None = None
        self._late = False
        #: For its turn, which does not count for its time limit.
        self._waits = False
        self._ended: tuple[str, float] | None = None
        self._cancel: Callable[[], object] = lambda: None

    @property
    def blocks_readiness(self) -> bool:
        """Whether it keeps a worker from getting ready."""
        return self.result is Result.NONE or (self.check.critical and self.result is not Result.PASSED)

    def turn(self, runner: Runner) -> float:
        """Start it when it is due, take what it found; return when it is to be looked at again."""
        now = time.monotonic()
        if self._began is not None and self._ended is not None:
            error, ended = self._ended
            if not self._late and ended <= self._began + self.check.timeout:
                self._found(Result.FAILED if error else Result.PASSED, error, runner)
            elif not self._late:
                self._found_late(runner)
            again = self.check.interval
            if runner.again is not None and self.result is not Result.PASSED:
                again = min(again, runner.again)
            self._due = max(now, self._began + again)
            if self.check.kind is Kind.STARTUP and self.result is Result.PASSED:
                self._due = float("inf")
            self._began = None
        if self._began is not None:
            if self._waits:
                return now + BEAT
            if now < self._began + self.check.timeout:
                return self._began + self.check.timeout
            if not self._late:
                self._late = True
                self._found_late(runner)
                self._cancel()
            return now + 60
        if now >= self._due and not runner.idle():
            self._began, self._ended, self._late, self._cancel = now, None, False, lambda: None
            name = f"zdd_web-check-{self.check.name}"
            try:
                threading.Thread(target=self._run, args=(runner,), name=name, daemon=True).start()
            except RuntimeError as error:
                # No thread to be had on this machine, for now.
                self._ended = f"{type(error).__name__}: {error}", now
                return now
            return now + self.check.timeout
        return max(self._due, now + BEAT)

    def _found_late(self, runner: Runner) -> None:
        self._found(Result.LATE, f"no answer within {self.check.timeout:g} s", runner)

    def _found(self, result: Result, message: str, runner: Runner) -> None:
        was, was_message, failing_since = self.result, self.message, self.failing_since
        self.result, self.message, self.at = result, message, clock.now_ns()
        if result is Result.PASSED:
            self.failing_since = 0
            if was not in (Result.NONE, Result.PASSED):
                log.emit("check.passed", check=self.check.name, after=round(clock.since(failing_since), 3))
        else:
            self.failing_since = failing_since or self.at
            if was in (Result.NONE, Result.PASSED) or message != was_message:
                log.emit("check.failed", logging.WARNING, check=self.check.name, critical=self.check.critical,
                         error=message)  # fmt: skip
        runner.write(self)

    def _run(self, runner: Runner) -> None:
        try:
            passed = self.check.function()
            if inspect.isawaitable(passed):
                passed = self._wait_for(passed, runner)
            error = "it returned False" if passed is False else ""
        except BaseException as raised:
            error = _words(raised)
        finally:
            # Django's own clean-up knows of requests only.
            close_connections(group="checks", name=self.check.name)
        self._ended = error, time.monotonic()
        runner.wake.set()

    def _wait_for(self, awaitable: Any, runner: Runner) -> Any:
        if runner.loop is not None:
            return self._wait_in_loop(awaitable, runner.loop)
        import asyncio  # takes its time, and most services have no async check

        limited = asyncio.wait_for(_contained(awaitable), self.check.timeout)
        if runner.one_loop is None:
            return asyncio.run(limited)
        self._waits = True
        with runner.one_loop:
            self._began, self._waits = time.monotonic(), False
            return asyncio.run(limited)

    def _wait_in_loop(self, awaitable: Any, loop: asyncio.AbstractEventLoop) -> Any:
        import asyncio

        begun, ended = threading.Event(), threading.Event()

        async def wait() -> Any:
            begun.set()
            try:
                return await _contained(awaitable)
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(wait(), loop)
        self._cancel = future.cancel
        try:
            return future.result()
        finally:
            # Cancelled, the future is over at once; the task may take its time, or not care.
            if begun.is_set():
                ended.wait()


class Runner:
    """The checks of this process.

    `write` is called with each result, `idle` tells whether none should be started now; `loop` is the worker's event
    loop. Without `only`, they are those of all apps, with those that are registered later.
    """

    def __init__(
        self,
        write: Callable[[State], None] = lambda state: None,
        idle: Callable[[], bool] = lambda: False,
        loop: asyncio.AbstractEventLoop | None = None,
        only: list[Check] | None = None,
    ) -> None:
        self.write, self.idle, self.loop = write, idle, loop
        self.states = [State(check, index) for index, check in enumerate(registered() if only is None else only)]
        self._follows = only is None
        self._late_comers: list[State] = []
        self._thread: threading.Thread | None = None
        self.wake = threading.Event()
        #: How soon one that has failed is tried again; None: at its interval.
        self.again: float | None = None
        #: Greenlets are threads to Python and one thread to asyncio, which has one running loop in each. The lock is
        #: made here, when gevent has patched what it is made of.
        self.one_loop = threading.Lock() if _is_patched_by_gevent() else None
        self._stopped = False
        self._pid = os.getpid()

    def turn(self) -> float:
        """Start what is due and take what has ended; return the seconds until the next turn."""
        self.wake.clear()
        while self._late_comers:
            self.states.append(self._late_comers.pop(0))
        due = min((state.turn(self) for state in self.states), default=float("inf"))
        return max(0.0, due - time.monotonic())

    def start(self) -> None:
        """Go on in a thread, each check at its interval, for as long as the process lives."""
        # New workers have been asked.
        self._count = len(self.states)
        self.states = [state for state in self.states if state.check.kind is not Kind.STARTUP]
        if self._follows:
            registry.listener = self._add
        if self.states:
            self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="zdd_web-checks", daemon=True)
        self._thread.start()

    def _add(self, check: Check) -> None:
        # An app that imports its views at the first request, as Django does, registers some then.
        if check.kind is Kind.STARTUP:
            return
        for state in (*self.states, *self._late_comers):
            if state.check.name == check.name:
                # Registered again: the function that was meant last runs from its next time on.
                state.check = check
                return
        state = State(check, self._count)
        self._count += 1
        self.write(state)
        self._late_comers.append(state)
        if self._thread is None:
            self._start()
        self.wake.set()

    def stop(self) -> None:
        """Start no more."""
        self._stopped = True
        if registry.listener == self._add:
            registry.listener = None
        self.wake.set()

    def _work(self) -> None:
        # A greenlet is copied into the processes that the app forks.
        while not self._stopped and os.getpid() == self._pid:
            try:
                self.wake.wait(min(60.0, self.turn()))
            except Exception:
                # Without this thread results would go stale, and readiness with them, for ever.
                log.emit("internal.error", logging.ERROR, where="checks", exc_info=True)
                time.sleep(AGAIN)

    def settle(self, beat: Callable[[], None], until: float) -> None:
        """Take turns until each check has a result, beating meanwhile; at most until then on the monotonic clock."""
        while any(state.result is Result.NONE for state in self.states) and time.monotonic() < until:
            self.wake.wait(min(BEAT, self.turn()))
            beat()

    def trouble(self) -> str:
        """Say what keeps a worker from getting ready; "" for nothing."""
        for state in self.states:
            if state.blocks_readiness and state.message:
                return f"check {state.check.name!r} failed: {state.message}"
        return ""


def _words(error: BaseException) -> str:
    try:
        # In one line, since answers are made of lines.
        return " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:
        return type(error).__name__


async def _contained(awaitable: Any) -> Any:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        # asyncio raises these in the caller that runs the loop: the worker.
        raise RuntimeError(_words(error)) from None
    finally:
        # What async code of Django's opens belongs to the thread that asgiref has for it.
        asgiref, db = sys.modules.get("asgiref.sync"), sys.modules.get("django.db")
        if asgiref is not None and db is not None and sys.modules["django.conf"].settings.configured:
            await asgiref.sync_to_async(db.close_old_connections)()


def _is_patched_by_gevent() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


def pass_all(runner: Runner, beat: Callable[[], None], say: Callable[[str], None]) -> None:
    """Wait until no critical check fails, beating meanwhile; `say` is told what fails, and "" at the end."""
    runner.again, said = AGAIN, ""
    while any(state.blocks_readiness for state in runner.states):
        runner.wake.wait(min(BEAT, runner.turn()))
        beat()
        trouble = runner.trouble()
        if trouble != said:
            said = trouble
            say(said)
    runner.again = None


def failing() -> dict[str, str]:
    """Run all checks once; return those that failed, with the reason."""
    runner = Runner()
    runner.settle(lambda: None, time.monotonic() + max((state.check.timeout for state in runner.states), default=0) + 1)
    return {
        state.check.name: state.message or "no result" for state in runner.states if state.result is not Result.PASSED
    }
