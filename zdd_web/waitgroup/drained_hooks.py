"""`on_drained`: what an app does last, when its requests and background work are over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, overload

from zdd_web.waitgroup.threads import DaemonCall, name_of, refuse_coroutines, report

Hook = TypeVar("Hook", bound=Callable[[], object])

_hooks: list[tuple[Callable[[], object], float]] = []


@overload
def on_drained(function: Hook, /, *, timeout: float = ...) -> Hook: ...


@overload
def on_drained(*, timeout: float = ...) -> Callable[[Hook], Hook]: ...


def on_drained(function: Any = None, /, *, timeout: float = 5.0) -> Any:
    """Have a function called when this worker's requests and background work are over; last in, first out.

    Each has `timeout` seconds, and no more than the deadline leaves. The process ends after them.

    >>> @on_drained
    ... def flush():
    ...     print("flushed")
    >>> run_drained_hooks()
    flushed
    """
    if not timeout > 0:
        raise ValueError(f"on_drained(timeout={timeout!r}): give seconds, more than 0")
    if function is None:
        return lambda decorated: on_drained(decorated, timeout=timeout)
    refuse_coroutines(function, "wrap it: on_drained(lambda: asyncio.run(...))")
    _hooks.append((function, timeout))
    return function


def remember_drained_hooks() -> Callable[[], None]:
    """Return what takes the functions of `on_drained` back to those that there are now; for tests."""
    known = list(_hooks)

    def restore() -> None:
        _hooks[:] = known

    return restore


def forget_drained_hooks() -> None:
    """Forget all functions of `on_drained`."""
    _hooks.clear()


def run_drained_hooks(deadline: float | None = None, beat: Callable[[], object] = lambda: None) -> None:
    """Call what `on_drained` has, until `deadline` on the monotonic clock; `beat` is called all the while.

    What fails, hangs or gets no time is logged as `background.failed`. A second call has nothing to do.
    """
    while _hooks:
        function, timeout = _hooks.pop()
        now = time.monotonic()
        until = now + timeout if deadline is None else min(now + timeout, deadline)
        fields = {"hook": "on_drained", "name": name_of(function)}
        if until > now:
            DaemonCall(function, **fields).join(until, beat)
        else:
            report(TimeoutError("not called, the deadline has passed"), **fields)
