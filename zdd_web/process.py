"""This process's handle: its board, its slot, its settings. Looked up on each call, never kept by the app.

In a gunicorn worker `attach()` was called after the fork. Anywhere else (`runserver`, `flask run`, a test client, a
shell) the first call makes a private board on which the phase is `serving`, so that the same app code runs.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from zdd_web import checks, waitgroup
from zdd_web.board import NAMED_TASKS, Board, Header, Order, Slot, WorkerState
from zdd_web.checks import registry
from zdd_web.errors import LifecycleError
from zdd_web.lifecycle import LEAVING, Phase
from zdd_web.settings import FrameworkSettings, Settings, merge
from zdd_web.system import clock
from zdd_web.waitgroup import all_groups

App = TypeVar("App")

#: How often a waiting `DrainEvent` looks, seconds.
LOOK = 0.05

#: A check's result is late by what a busy machine takes to start a thread, seconds; after that it is out of date.
STALE_SLACK = 5.0


class Process:
    """What this process knows of itself and of its generation."""

    def __init__(self, board: Board, slot: Slot | None, settings: Settings, fixed: Collection[str] = ()) -> None:
        self.board, self.slot = board, slot
        self.settings = settings
        #: The settings that no app may set for itself, by name.
        self.fixed = fixed
        #: This worker alone is on its way out.
        self.going = False
        self.is_leaving = self._make_is_leaving()
        self._writes_tasks, self._tasks_unwritten = threading.Lock(), False
        self._named_tasks: list[waitgroup.Entry | None] = [None] * NAMED_TASKS
        # Made once: these are written at each change of the work in hand.
        self._task_records = [slot.task(index) for index in range(NAMED_TASKS)] if slot is not None else []
        if slot is not None:
            all_groups.observer = self._tasks_changed
        #: There is no gunicorn.
        self.alone = bool(board.header.alone)
        self._runner: checks.Runner | None = None
        #: Which checks `self._runner` runs, for which app, and as of which `registry.version`.
        self._run_for: checks.Registry | None = None
        self._run_checks: list[checks.Check] = []
        self._run_latest = 0
        self._results = board
        self._make_runner_once = threading.Lock()

    def _tasks_changed(self, count: int) -> None:
        assert self.slot is not None
        self._tasks_unwritten = True
        # Any thread calls this, and the garbage collector, which ends work too, even in the middle of another call. A
        # thread that has released the lock looks again, so what others have changed meanwhile is written.
        while self._tasks_unwritten and self._writes_tasks.acquire(blocking=False):
            try:
                self._tasks_unwritten = False
                self._write_tasks(self.slot)
            finally:
                self._writes_tasks.release()
        self.slot.tasks = count

    def _write_tasks(self, slot: Slot) -> None:
        oldest = waitgroup.oldest(NAMED_TASKS)
        slot.oldest_task = int(oldest[0].started * 1e9) if oldest else 0
        for index, record in enumerate(self._task_records):
            entry = oldest[index] if index < len(oldest) else None
            if entry is self._named_tasks[index]:
                continue
            self._named_tasks[index] = entry
            # A reader that comes between the two must not give one task's age to the other.
            record.started = 0
            if entry is not None:
                record.name = entry.name
                record.started = int(entry.started * 1e9)

    @property
    def phase(self) -> Phase:
        """The phase of this process's generation, read from the board."""
        return Phase(self.board.header.phase)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings
        registry.changed()

    def _make_is_leaving(self) -> Callable[[], bool]:
        # A closure, since it is called for each reply. Without a slot there is no order.
        words, phase, leaving = self.board.header.words, Header.phase.index, LEAVING
        retire = self.slot.order.base + Order.retire.index if self.slot is not None else -1

        def is_leaving() -> bool:
            """Tell whether the generation, or this worker, is on its way out."""
            return words[phase] in leaving or self.going or (retire >= 0 and words[retire] != 0)

        return is_leaving

    @property
    def deadline_ns(self) -> int:
        """When the work in hand is cut off, monotonic nanoseconds; `clock.NEVER` for never."""
        header = self.board.header
        if header.deadline:
            return header.deadline
        return self.slot.retire_deadline if self.slot is not None else clock.NEVER

    def checks_runner(self, loop: Any = None) -> checks.Runner:
        """Make what runs the checks of this process, and have the board hold them, without a result yet."""
        # On a private board it is this process's anyway.
        return self._runner_on(self.slot if self.slot is not None else self.board.slot(0), loop)

    def _runner_on(self, slot: Slot, loop: Any = None, only: list[checks.Check] | None = None) -> checks.Runner:
        runner = checks.Runner(lambda state: _write(slot, state), self.is_leaving, loop, only)
        slot.checks = 0
        for state in runner.states:
            _write(slot, state)
        return runner

    def results(self, of: checks.Registry) -> Board:
        """Return the board on which the results of an app's checks are.

        Where there is no gunicorn, that app's checks run from now on, and this waits for the first results. Those of
        another app, that was asked before, end: a test run makes thousands of apps.
        """
        if not self.alone:
            return self.board
        with self._make_runner_once:
            if self.must_run_checks(of):
                self._run_only(of)
            return self._results

    def _run_only(self, of: checks.Registry) -> None:
        self.stop_checks()
        latest, found = registry.version, of.registered()
        # Each app has its own: a runner that has been stopped may still write.
        self._results = self.board if of is registry.shared else Board.private()
        runner = self._runner_on(self._results.slot(0), only=found)
        limit = max((state.check.timeout for state in runner.states), default=0.0)
        runner.settle(lambda: None, time.monotonic() + limit + 1)
        runner.start()
        self._runner, self._run_for, self._run_checks, self._run_latest = runner, of, found, latest

    def must_run_checks(self, of: checks.Registry) -> bool:
        """Whether there is no gunicorn, and the checks of an app are not those that run."""
        if not self.alone:
            return False
        if self._run_for is of and self._run_latest == registry.version:
            return False
        return self._run_for is not of or self._run_checks != of.registered()

    def stop_checks(self) -> None:
        """End what `results()` has begun."""
        if self._runner is not None:
            self._runner.stop()
        self._runner, self._run_for = None, None

    def set_state(self, state: WorkerState) -> None:
        """Write this worker's state on the board."""
        assert self.slot is not None
        self.slot.state_since = clock.now_ns()
        self.slot.state = state


def _write(slot: Slot, state: checks.State) -> None:
    record = slot.check(state.index)
    if state.index >= slot.checks:
        record.name, record.kind, record.critical = state.check.name, state.check.kind, state.check.critical
    record.message = state.message
    record.at, record.failing_since = state.at, state.failing_since
    limit = state.check.interval + state.check.timeout + STALE_SLACK
    record.fresh_until = state.at + int(limit * 1e9) if state.at else 0
    record.result = state.result
    # Last: a reader that sees it counted sees all of it.
    slot.checks = max(slot.checks, state.index + 1)


_current: Process | None = None


def attach(board: Board, slot: Slot | None, settings: Settings, fixed: Collection[str] = ()) -> Process:
    """Make a board this process's own; the gunicorn hooks call it, in the master and after each fork."""
    made = Process(board, slot, settings, fixed)
    use(made)
    return made


def use(handle: Process | None) -> None:
    """Have this be the handle of this process; None has the next call of `current()` make one."""
    global _current
    _current = handle
    registry.changed()


def current() -> Process:
    """Return this process's handle, with a private board where there is no gunicorn."""
    if _current is None:
        alone = merge({}, os.environ)
        return attach(Board.private(), None, alone.settings, alone.fixed)
    return _current


_apps: weakref.WeakKeyDictionary[Any, Callable[[Any], FrameworkSettings]] = weakref.WeakKeyDictionary()


def register_app_settings(app: App, read: Callable[[App], FrameworkSettings]) -> None:
    """Note an app with settings of its own; `read(app)` is called when it has been loaded.

    The app is not kept alive: a test run makes thousands.
    """
    _apps[app] = read


def reset() -> None:
    """Forget what was registered for all apps of this process, as if no app had been made yet; between two tests.

    That is: shared checks, functions of `on_drained`, and what groups of background work hold or refuse. Apps keep
    their own checks. Raises `LifecycleError` in a worker of gunicorn.
    """
    if _current is not None and not _current.alone:
        raise LifecycleError("reset() is for tests: this process is a worker of gunicorn, which serves")
    if _current is not None:
        _current.stop_checks()
    registry.shared.clear()
    waitgroup.reset()


def remember() -> Callable[[], None]:
    """Return what takes this process back to how it is now: checks, apps with settings, hooks, groups; for tests.

    The settings of this process are then read anew when they are needed. That function raises `LifecycleError` in a
    worker of gunicorn.
    """
    apps, restore_checks, restore_hooks = set(_apps), registry.remember(), waitgroup.remember_hooks()

    def restore() -> None:
        reset()
        restore_checks()
        restore_hooks()
        for app in set(_apps) - apps:
            del _apps[app]
        # With its board and the settings of the environment as it was.
        use(None)
        all_groups.observer = None

    return restore


def app_settings() -> list[FrameworkSettings]:
    """Return what the apps of this process bring. Raises `SettingsError` for what cannot work."""
    return [read(app) for app, read in list(_apps.items())]


def phase() -> Phase:
    """Return the phase of this generation.

    >>> phase().label
    'serving'
    """
    return current().phase


def generation() -> int:
    """Return the number of this generation, from 1 along a chain of upgrades.

    >>> generation()
    1
    """
    return current().board.header.generation


def successor_serves() -> bool:
    """Tell whether a later generation has taken over from this one: in `on_exit`, whether the service goes on.

    >>> successor_serves()
    False
    """
    return bool(current().board.header.successor_pid)


def draining() -> bool:
    """Tell whether this process is on its way out: long-running work should come to an end.

    >>> draining()
    False
    """
    return current().is_leaving()


class DrainEvent:
    """Is set once this process is on its way out; looks at the board, and starts no thread.

    >>> drain_event().wait(timeout=0)
    False
    """

    def is_set(self) -> bool:
        """Tell whether the process is on its way out."""
        return current().is_leaving()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is, at most `timeout` seconds; tell whether it is."""
        ends = clock.NEVER if timeout is None else clock.after_ns(timeout)
        while not self.is_set() and not clock.passed(ends):
            left = clock.remaining(ends)
            time.sleep(LOOK if left is None else min(LOOK, left))
        return self.is_set()

    async def wait_async(self) -> None:
        """Wait until it is, in asyncio code."""
        import asyncio

        while not self.is_set():
            await asyncio.sleep(LOOK)


def drain_event() -> DrainEvent:
    """Return what streaming handlers and loops wait on: `while not zdd_web.drain_event().wait(5): poll()`.

    >>> drain_event().is_set()
    False
    """
    return DrainEvent()


def deadline() -> float | None:
    """Return when work in hand will be cut off, as `time.monotonic()` has it; None while no end is in sight.

    >>> deadline() is None
    True
    """
    at = current().deadline_ns
    return None if at == clock.NEVER else at / 1e9
