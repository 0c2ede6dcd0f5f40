"""One group of background work: it counts work, runs it on threads of its own, and waits for it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from zdd_web.errors import GroupClosed
from zdd_web.waitgroup import all_groups
from zdd_web.waitgroup.coroutine import run_coroutine
from zdd_web.waitgroup.entry import Entry, OnAbandon
from zdd_web.waitgroup.executor import Executor
from zdd_web.waitgroup.task import Task
from zdd_web.waitgroup.threads import Threads, close_connections, name_of, refuse_coroutines, report

if TYPE_CHECKING:
    import asyncio

P = ParamSpec("P")
R = TypeVar("R")
AfterClose = Literal["reject", "run_inline"]

#: ThreadPoolExecutor's default (5 on one core) is meant for computing; background work of a web app waits for others.
DEFAULT_THREADS = 32


class WaitGroup:
    """A group of background work that can be waited for.

    Every group is waited for when its worker leaves, also one that the app makes itself. What comes after that is
    refused, or with `after_close="run_inline"` done at once by the caller.

    >>> group = WaitGroup("doctest")
    >>> with group.track("one"):
    ...     len(group)
    1
    >>> group.wait(timeout=0)
    True
    >>> group.go(sum, [1, 2, 3]).result()
    6
    """

    def __init__(
        self, name: str = "background", *, threads: int = DEFAULT_THREADS, after_close: AfterClose = "reject"
    ) -> None:
        if after_close not in ("reject", "run_inline"):
            raise ValueError(f'after_close={after_close!r}: write "reject" or "run_inline"')
        self.name, self.after_close = name, after_close
        self._threads = Threads(threads, f"zdd_web-{name}")
        self._max_workers = threads
        self._reset()
        all_groups.add(self)

    def _reset(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self.closed = False
        #: How many tasks and calls have raised.
        self.failed = 0

    def add(self, name: str, *, on_abandon: OnAbandon | None = None) -> Entry:
        """Begin a piece of work; the caller must call `done()` on the entry. Prefer `track()`, which cannot forget.

        `on_abandon(entry)` is called when the process ends before the work does.
        """
        entry = self._offer(name, on_abandon)
        entry.runs_here()
        return entry

    def _offer(
        self,
        name: str,
        on_abandon: OnAbandon | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Entry:
        entry = Entry(self, name, next(self._numbers), on_abandon, args, dict(kwargs or {}))
        with self._changed:
            if self.closed and self.after_close == "reject":
                raise GroupClosed(
                    f"{name!r} came too late for the group {self.name!r}: this process is about to end. "
                    'Do it without the group, put it on a queue, or make the group with after_close="run_inline"'
                )
            self._entries[entry.number] = entry
        all_groups.notify_observer()
        return entry

    def _has(self, entry: Entry) -> bool:
        # Numbers begin anew after a fork: an entry of the parent's must not end one of the child's.
        return self._entries.get(entry.number) is entry

    def _remove(self, entry: Entry) -> None:
        with self._changed:
            if not self._has(entry):
                return
            del self._entries[entry.number]
            self._changed.notify_all()
        all_groups.notify_observer()

    def _failed(self, entry: Entry, error: BaseException) -> None:
        with self._changed:
            self.failed += 1
        report(error, **entry.fields())

    @contextlib.contextmanager
    def track(self, name: str = "tracked", *, on_abandon: OnAbandon | None = None) -> Iterator[Entry]:
        """Count the body of a `with` as background work, also when it raises."""
        entry = self.add(name, on_abandon=on_abandon)
        try:
            yield entry
        finally:
            entry.done()

    def go(
        self,
        function: Callable[..., R],
        /,
        *args: Any,
        name: str | None = None,
        on_abandon: OnAbandon | None = None,
        **kwargs: Any,
    ) -> concurrent.futures.Future[R]:
        """Run `function(*args, **kwargs)` on one of the group's threads and return its Future.

        Context variables are carried over. What it raises is logged as `background.failed`, and kept in the Future.
        """
        return self._submit(function, args, kwargs, name=name, on_abandon=on_abandon)

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...

    @overload
    def task(self, *, on_abandon: OnAbandon | None = ...) -> Callable[[Callable[P, R]], Task[P, R]]: ...

    def task(self, function: Any = None, *, on_abandon: OnAbandon | None = None) -> Any:
        """Decorate a function so that calling it means `go()`.

        >>> @background.task(on_abandon=lambda entry: print("again:", entry.args))
        ... def add(first, second):
        ...     return first + second
        >>> add(1, 2).result()
        3
        """
        if function is None:
            return functools.partial(Task, self, on_abandon=on_abandon)
        return Task(self, function, on_abandon)

    def create_task(
        self, coro: Coroutine[Any, Any, R], *, name: str | None = None, on_abandon: OnAbandon | None = None
    ) -> asyncio.Task[R]:
        """Run a coroutine as a task of the running event loop; the group keeps it until it is done.

        What it raises is logged as `background.failed`, and kept in the task. No policy can run a coroutine at once:
        a closed group that does not refuse it counts it, and the caller has to await it.
        """
        return run_coroutine(self, coro, name, on_abandon)

    def executor(self, max_workers: int | None = None) -> Executor:
        """Return a `concurrent.futures.Executor` with threads of its own, whose every call is work of this group."""
        return Executor(self, self._max_workers if max_workers is None else max_workers)

    def _submit(
        self,
        function: Callable[..., R],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        name: str | None = None,
        on_abandon: OnAbandon | None = None,
        threads: Threads | None = None,
    ) -> concurrent.futures.Future[R]:
        refuse_coroutines(function, "give its coroutine to create_task()")
        entry = self._offer(name or name_of(function), on_abandon, args, kwargs)
        context = contextvars.copy_context()

        def run() -> R:
            entry.runs_here()
            try:
                return context.run(function, *args, **kwargs)
            except BaseException as error:
                self._failed(entry, error)
                raise

        def run_on_a_thread_of_ours() -> R:
            try:
                if entry.given_up:
                    raise concurrent.futures.CancelledError(f"{entry.name!r} was given up before it was begun")
                return run()
            finally:
                try:
                    close_connections(**entry.fields())
                finally:
                    entry.done()

        if self.closed and self.after_close == "run_inline":
            return _run_inline(run, entry)
        try:
            future = (threads or self._threads).pool().submit(run_on_a_thread_of_ours)
        except BaseException:
            entry.done()
            raise
        entry._future = weakref.ref(future)
        future.add_done_callback(lambda done: entry.done() if done.cancelled() else None)
        return future

    def close(self) -> None:
        """Take no more work, or run it inline: the process is about to end. A fork opens the child's group again.

        >>> group = WaitGroup("shop")
        >>> group.close()
        >>> group.go(print)
        Traceback (most recent call last):
        ...
        zdd_web.errors.GroupClosed: 'print' came too late for the group 'shop': this process is about to end. ...
        """
        with self._changed:
            self.closed = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no work is left, at most `timeout` seconds; tell whether none is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._entries, timeout)

    def entries(self) -> list[Entry]:
        """Return the work in hand, oldest first."""
        with self._changed:
            return list(self._entries.values())

    def _oldest(self, most: int) -> list[Entry]:
        while True:
            try:
                # In the order in which they came. Without the lock, for the reason that `notify_observer` has.
                return list(itertools.islice(self._entries.values(), most))
            except RuntimeError:
                continue

    def __len__(self) -> int:
        return len(self._entries)

    # A group with nothing to do is still a group.
    def __bool__(self) -> bool:
        return True


def _run_inline(run: Callable[[], R], entry: Entry) -> concurrent.futures.Future[R]:
    future: concurrent.futures.Future[R] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    try:
        future.set_result(run())
    except Exception as error:  # not SystemExit: in the main thread a signal's handler raises it
        future.set_exception(error)
    finally:
        entry.done()
    return future


#: `zdd_web.background`
background = WaitGroup()
