"""A `concurrent.futures.Executor` whose every call is background work of a group."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from zdd_web.waitgroup.entry import Group
from zdd_web.waitgroup.threads import Threads

P = ParamSpec("P")
R = TypeVar("R")


class Executor(concurrent.futures.Executor):
    """Threads of its own for calls that a group waits for; made by `WaitGroup.executor()`.

    >>> from zdd_web.waitgroup import WaitGroup
    >>> with WaitGroup("doctest").executor(max_workers=2) as executor:
    ...     list(executor.map(abs, [-1, -2]))
    [1, 2]
    """

    def __init__(self, group: Group, max_workers: int) -> None:
        self._group = group
        self._threads = Threads(max_workers, f"zdd_web-{group.name}-executor")
        self._shut = False

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        """Have a thread call `fn(*args, **kwargs)`, and return its Future."""
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        return self._group._submit(fn, args, kwargs, threads=self._threads)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those in hand unless told not to."""
        self._shut = True
        self._threads.pool().shutdown(wait, cancel_futures=cancel_futures)
