"""One piece of background work: whose it is, which thread does it, and where that stands now."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

    from zdd_web.waitgroup.threads import Threads

R = TypeVar("R")

#: The request that this code runs for: a text, or anything with `method` and `path`; set where
#: requests are answered.
current_request: contextvars.ContextVar[Any] = contextvars.ContextVar("zdd_web_current_request", default="")


#: Is given what was not finished when its process had to end.
OnAbandon = Callable[["Entry"], object]


def _request() -> str:
    # Only put into words when work is begun: it is set for every request.
    request = current_request.get()
    return request if isinstance(request, str) else f"{request.method} {request.path}"


class Group(Protocol):
    """A `WaitGroup`, as a type for the modules that its own module imports; see there."""

    name: str
    closed: bool
    failed: int
    _changed: threading.Condition

    def add(self, name: str, *, on_abandon: OnAbandon | None = None) -> Entry: ...

    def track(
        self, name: str = "tracked", *, on_abandon: OnAbandon | None = None
    ) -> contextlib.AbstractContextManager[Entry]: ...

    def go(
        self,
        function: Callable[..., R],
        /,
        *args: Any,
        name: str | None = None,
        on_abandon: OnAbandon | None = None,
        **kwargs: Any,
    ) -> concurrent.futures.Future[R]: ...

    def create_task(
        self, coro: Coroutine[Any, Any, R], *, name: str | None = None, on_abandon: OnAbandon | None = None
    ) -> asyncio.Task[R]: ...

    def executor(self, max_workers: int | None = None) -> concurrent.futures.Executor: ...

    def wait(self, timeout: float | None = None) -> bool: ...

    def close(self) -> None: ...

    def entries(self) -> list[Entry]: ...

    def __len__(self) -> int: ...

    def _offer(self, name: str, on_abandon: OnAbandon | None) -> Entry: ...

    def _submit(
        self,
        function: Callable[..., R],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        on_abandon: OnAbandon | None = None,
        threads: Threads | None = None,
    ) -> concurrent.futures.Future[R]: ...

    def _has(self, entry: Entry) -> bool: ...

    def _remove(self, entry: Entry) -> None: ...

    def _failed(self, entry: Entry, error: BaseException) -> None: ...

    def _oldest(self, most: int) -> list[Entry]: ...

    def _reset(self) -> None: ...


@dataclass(eq=False)
class Entry:
    """One piece of background work; `done()` may be called any number of times.

    `thread` and `thread_id` are empty while the work waits for a thread. `args` and `kwargs` are what a function was
    offered with, for an `on_abandon` that offers it elsewhere.
    """

    group: Group
    name: str
    number: int
    on_abandon: OnAbandon | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    request: str = field(default_factory=_request)
    thread: str = ""
    thread_id: int = 0
    started: float = field(default_factory=time.monotonic)
    #: Its deadline has passed. Said to ten thousand of them in a moment, in which twenty times fewer are cancelled.
    given_up: bool = field(default=False, repr=False)
    task: asyncio.Task[Any] | None = field(default=None, repr=False)
    _greenlet: Any = field(default=None, repr=False)
    # Weak, since the future holds the entry; a pool holds it for as long as there is something to cancel.
    _future: weakref.ref[concurrent.futures.Future[Any]] | None = field(default=None, repr=False)

    @property
    def age(self) -> float:
        """Seconds since the work was offered."""
        return time.monotonic() - self.started

    @property
    def in_hand(self) -> bool:
        """Whether the work is not over yet."""
        return self.group._has(self)

    def fields(self) -> dict[str, str]:
        """Return what each log line about this work says."""
        request = {"request": self.request} if self.request else {}
        return {"group": self.group.name, "name": self.name, **request}

    def done(self) -> None:
        """Say that the work is over. A second call does nothing."""
        self.group._remove(self)

    def cancel(self) -> bool:
        """Take the work back if it still waits for a thread; tell whether it did."""
        future = self._future() if self._future is not None else None
        return future is not None and future.cancel()

    def runs_here(self) -> None:
        """Note the caller's thread, task and greenlet as those that do the work."""
        self.thread, self.thread_id = threading.current_thread().name, threading.get_ident()
        self.task = _current_task()
        # Not imported: a process with greenlets has loaded it.
        if (greenlet := sys.modules.get("greenlet")) is not None:
            self._greenlet = greenlet.getcurrent()

    def stack(self) -> str:
        """Return where the work stands now, as a traceback has it; empty when it has no thread or is over."""
        if not self.in_hand:
            return ""
        if self.task is not None and (frames := _awaiting(self.task)):
            return "".join(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames).format())
        # A greenlet has a frame of its own only while another one runs.
        frame = getattr(self._greenlet, "gr_frame", None) or sys._current_frames().get(self.thread_id)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _current_task() -> asyncio.Task[Any] | None:
    # Not imported: code in a task has loaded it, and gevent wants to patch `ssl` before asyncio imports it.
    if (loaded := sys.modules.get("asyncio")) is None:
        return None
    try:
        task: asyncio.Task[Any] | None = loaded.current_task()
    except RuntimeError:
        return None  # no loop runs in this thread
    return task


def _awaiting(task: asyncio.Task[Any]) -> list[types.FrameType]:
    """Return the frames from a task's coroutine to what it waits for; none while it runs, or when it is over.

    `Task.get_stack()` has the outermost one only.
    """
    frames: list[types.FrameType] = []
    at: Any = task.get_coro()
    if getattr(at, "cr_running", False):
        return frames
    while (frame := getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None)) is not None:
        frames.append(frame)
        at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)
    return frames
