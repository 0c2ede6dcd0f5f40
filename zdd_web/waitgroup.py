"""WaitGroup: background work that a worker finishes before it exits.

As Go's `sync.WaitGroup`, with what a stop needs on top: each entry has a name and an age, so that what was not finished
can be named, and work is counted from the moment it is offered, not from when a thread picks it up.

    with zdd_web.background.track("send-receipt"):
        ...
    zdd_web.background.go(send_receipt, order.id)

    @zdd_web.background.task
    def rebuild_index(): ...
    rebuild_index()            # returns a Future; runs on the group's own threads

The group owns its threads: an executor of somebody else may be shut down while requests still want to hand it work.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import logging
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

from zdd_web import log

P = ParamSpec("P")
R = TypeVar("R")

#: ThreadPoolExecutor's default (5 on one core) is meant for computing; background work of a web app waits for others.
DEFAULT_THREADS = 32

_groups: weakref.WeakSet[WaitGroup] = weakref.WeakSet()

#: Called with the number of entries in all groups whenever it changes; `process` points it at the board.
observer: Callable[[int], None] | None = None


@dataclass(eq=False)
class Entry:
    """One piece of background work; `done()` may be called any number of times."""

    group: WaitGroup
    name: str
    number: int
    thread: str = field(default_factory=lambda: threading.current_thread().name)
    started: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since the work was offered."""
        return time.monotonic() - self.started

    def done(self) -> None:
        """Say that the work is over. A second call does nothing."""
        self.group._remove(self)


class Task(Generic[P, R]):
    """A function that runs in the background when called; `.function` is the function itself."""

    def __init__(self, group: WaitGroup, function: Callable[P, R], name: str) -> None:
        functools.update_wrapper(self, function)
        self.group, self.function, self.name = group, function, name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an object, as a function does: a method may be a task."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        return self.group._submit(self.name, functools.partial(self.function, *args, **kwargs))


class WaitGroup:
    """A group of background work that can be waited for.

    Every group is waited for when its worker leaves, also one that the app makes itself.

    >>> group = WaitGroup("doctest")
    >>> with group.track("one"):
    ...     len(group)
    1
    >>> group.wait(timeout=0)
    True
    >>> group.go(sum, [1, 2, 3]).result()
    6
    """

    def __init__(self, name: str = "background", *, threads: int = DEFAULT_THREADS) -> None:
        self.name = name
        self._threads = threads
        self._reset()
        _groups.add(self)

    def _reset(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def add(self, name: str) -> Entry:
        """Begin a piece of work; the caller must call `done()` on the entry. Prefer `track()`, which cannot forget."""
        entry = Entry(self, name, next(self._numbers))
        with self._changed:
            self._entries[entry.number] = entry
        _tell()
        return entry

    def _remove(self, entry: Entry) -> None:
        with self._changed:
            # Numbers begin anew after a fork: an entry of the parent's must not end one of the child's.
            if self._entries.get(entry.number) is not entry:
                return
            del self._entries[entry.number]
            self._changed.notify_all()
        _tell()

    @contextlib.contextmanager
    def track(self, name: str = "tracked") -> Iterator[Entry]:
        """Count the body of a `with` as background work, also when it raises."""
        entry = self.add(name)
        try:
            yield entry
        finally:
            entry.done()

    def go(
        self, function: Callable[..., R], /, *args: Any, name: str | None = None, **kwargs: Any
    ) -> concurrent.futures.Future[R]:
        """Run `function(*args, **kwargs)` on one of the group's threads and return its Future.

        Context variables are carried over. What it raises is logged as `background.failed`, and kept in the Future.
        """
        return self._submit(name or _name_of(function), functools.partial(function, *args, **kwargs))

    def task(self, function: Callable[P, R]) -> Task[P, R]:
        """Decorate a function so that calling it means `go()`."""
        return Task(self, function, _name_of(function))

    def _submit(self, name: str, call: Callable[[], R]) -> concurrent.futures.Future[R]:
        entry = self.add(name)
        context = contextvars.copy_context()

        def run() -> R:
            entry.thread = threading.current_thread().name
            try:
                return context.run(call)
            except BaseException as error:
                log.emit(
                    "background.failed",
                    logging.ERROR,
                    group=self.name,
                    name=name,
                    error=f"{type(error).__name__}: {error}",
                    exc_info=error,
                )
                raise
            finally:
                entry.done()

        try:
            future = self._pool().submit(run)
        except BaseException:
            entry.done()
            raise
        future.add_done_callback(lambda done: entry.done() if done.cancelled() else None)
        return future

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._changed:
            if self._executor is None:
                self._executor = concurrent.futures.ThreadPoolExecutor(self._threads, f"zdd_web-{self.name}")
            return self._executor

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no work is left, at most `timeout` seconds; tell whether none is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._entries, timeout)

    def entries(self) -> list[Entry]:
        """Return the work in hand, oldest first."""
        with self._changed:
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    # A group with nothing to do is still a group.
    def __bool__(self) -> bool:
        return True


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def all_entries() -> list[Entry]:
    """Return the work in hand in all groups of this process, oldest first."""
    return sorted((entry for group in _all_groups() for entry in group.entries()), key=lambda entry: entry.started)


def _all_groups() -> list[WaitGroup]:
    while True:
        try:
            return list(_groups)
        except RuntimeError:
            continue  # another thread made a group meanwhile, which a WeakSet does not bear


def _tell() -> None:
    # Whoever has told looks again, so the last count told is the right one in whatever order threads come here. A
    # lock would order them too, until the garbage collector ends work (a generator that stands in `track()`) in it.
    told = -1
    while observer is not None and told != (count := sum(len(group) for group in _all_groups())):
        observer(count)
        told = count


def _after_fork() -> None:
    # What the parent's threads were doing they are not doing here, and a lock that one of them held stays held. The
    # observer writes into the slot of the parent; a worker gets its own when it is attached.
    global observer
    observer = None
    for group in _all_groups():
        group._reset()


os.register_at_fork(after_in_child=_after_fork)

#: `zdd_web.background`
background = WaitGroup()
