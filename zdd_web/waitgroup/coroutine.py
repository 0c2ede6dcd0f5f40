"""A coroutine as background work: a task of the running event loop, which a group keeps until it is done."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from zdd_web.errors import GroupClosed
from zdd_web.waitgroup.entry import Group, OnAbandon
from zdd_web.waitgroup.threads import name_of

if TYPE_CHECKING:
    import asyncio

R = TypeVar("R")


def run_coroutine(
    group: Group, coro: Coroutine[Any, Any, R], name: str | None, on_abandon: OnAbandon | None
) -> asyncio.Task[R]:
    """Run a coroutine as `WaitGroup.create_task()` does."""
    import asyncio  # not before gevent has patched what it imports

    if not asyncio.iscoroutine(coro):
        raise TypeError(f"create_task() takes a coroutine, not {coro!r}: call the async function, or use go()")
    name = name or name_of(coro)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        coro.close()  # or Python warns that it was never awaited
        raise RuntimeError(f"create_task() of {name!r} outside a running event loop: call it in one") from None
    try:
        entry = group._offer(name, on_abandon)
    except GroupClosed:
        coro.close()
        raise
    entry.runs_here()

    def end(task: asyncio.Task[R]) -> None:
        try:
            if not task.cancelled() and (error := task.exception()) is not None:
                group._failed(entry, error)
        finally:
            entry.done()

    try:
        entry.task = task = loop.create_task(coro, name=name)
    except BaseException:
        entry.done()
        raise
    task.add_done_callback(end)
    return task
