"""`on_stop`: what an app does when its worker begins to leave, with requests and background work still in hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from zdd_web.waitgroup.threads import name_of, refuse_coroutines, report

Hook = TypeVar("Hook", bound=Callable[[], object])

_hooks: list[Callable[[], object]] = []


def on_stop(function: Hook, /) -> Hook:
    """Have a function called once when this worker begins to leave, instead of a signal handler of the app's own.

    It runs in the worker's main thread, in its event loop under asgi and uvicorn, and in a greenlet under gevent. It is
    to return at once: to set an event, to start a task. What it raises is logged as `background.failed`.

    >>> @on_stop
    ... def end_streams():
    ...     print("stopping")
    >>> run_stop_hooks()
    stopping
    >>> run_stop_hooks()
    """
    refuse_coroutines(function, "wrap it: on_stop(lambda: zdd_web.background.create_task(...))")
    _hooks.append(function)
    return function


def run_stop_hooks() -> None:
    """Call what `on_stop` has, in the order in which it came; a second call has nothing to do."""
    while _hooks:
        function = _hooks.pop(0)
        try:
            function()
        except (Exception, SystemExit) as error:
            report(error, hook="on_stop", name=name_of(function))


def remember_stop_hooks() -> Callable[[], None]:
    """Return what takes the functions of `on_stop` back to those that there are now; for tests."""
    known = list(_hooks)

    def restore() -> None:
        _hooks[:] = known

    return restore


def forget_stop_hooks() -> None:
    """Have none of them called: for tests that make one app after the other."""
    _hooks.clear()
