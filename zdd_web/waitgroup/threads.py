"""Calls of the app's code on threads: pools that are made when they are needed, and calls that may hang."""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from zdd_web import log

#: The longest that a wait goes without a heartbeat, seconds.
BEAT = 0.1


class Threads:
    """A pool of at most `count` threads, made when it is first used: not before gevent has patched, not before a fork.

    >>> Threads(2, "doctest").pool().submit(sum, [1, 2]).result()
    3
    """

    def __init__(self, count: int, name: str) -> None:
        if count < 1:
            raise ValueError(f"{count!r} threads for {name!r}: give 1 or more")
        self._count, self._name = count, name
        # By process, since the threads of a parent do not exist here.
        self._pools: dict[int, concurrent.futures.ThreadPoolExecutor] = {}

    def pool(self) -> concurrent.futures.ThreadPoolExecutor:
        """Return this process's pool."""
        pid = os.getpid()
        if pid not in self._pools:
            # One step for the interpreter: of two threads that come at once, one's pool is dropped before it is used.
            self._pools.setdefault(pid, concurrent.futures.ThreadPoolExecutor(self._count, self._name))
        return self._pools[pid]


class DaemonCall:
    """A call in a daemon thread of its own: however it hangs, the process can end. What it raises is logged.

    >>> DaemonCall(lambda: print("called"), name="doctest").join(time.monotonic() + 60)
    called
    """

    def __init__(self, call: Callable[[], object], **fields: str) -> None:
        self._call, self._fields, self._began = call, fields, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="zdd_web-apart", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads are to be had
            self._failed(error)

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._failed(error)
        finally:
            close_connections(**self._fields)

    def _failed(self, error: BaseException) -> None:
        report(error, **self._fields)

    def join(self, until: float, beat: Callable[[], object] = lambda: None) -> None:
        """Wait for its end until then on the monotonic clock, with a heartbeat; log when it goes on."""
        while self._thread.is_alive():
            left = until - time.monotonic()
            if left <= 0:
                return self._failed(TimeoutError(f"still running after {time.monotonic() - self._began:.1f} s"))
            beat()
            self._thread.join(min(left, BEAT))
        return None


def report(error: BaseException, **fields: str) -> None:
    """Log what background work raised."""
    text = f"{type(error).__name__}: {error}"
    log.emit("background.failed", logging.ERROR, **fields, error=text, exc_info=error)


def close_connections(**fields: str) -> None:
    """Close this thread's connections of Django, which does so for requests only; a failure is logged."""
    connections: Any = getattr(sys.modules.get("django.db"), "connections", None)
    if connections is None or not sys.modules["django.conf"].settings.configured:
        return
    try:
        connections.close_all()
    except Exception as error:
        report(error, **fields)


def name_of(function: Any) -> str:
    """Return what a log calls a function.

    >>> name_of(name_of)
    'name_of'
    """
    while isinstance(function, functools.partial):
        function = function.func  # its own name would be all of its arguments
    return getattr(function, "__qualname__", None) or repr(function)


def refuse_coroutines(function: Any, remedy: str) -> None:
    """Raise `TypeError` for an async function: to call it does nothing but make a coroutine."""
    if not callable(function):
        why = remedy if inspect.iscoroutine(function) else "it is called"
        raise TypeError(f"{function!r} is not a function: {why}")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name_of(function)} is an async function, which no thread can call: {remedy}")
