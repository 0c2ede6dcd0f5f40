"""Checks: what must be there before a worker may say that it is ready.

    @zdd_web.check("database", timeout=2)
    def database():
        connection.ensure_connection()

A new worker runs every check when its app is loaded and warm, again each second, until all critical ones pass; only
then it stands at the gate. So a release that cannot reach its database does not take over: the upgrade fails when
`UPGRADE_TIMEOUT` is over, and says which check has failed.

Each check runs in a thread of its own: the time limit holds although Python can end no thread. One that still hangs is
not started a second time.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from zdd_web import log
from zdd_web.errors import SettingsError

F = TypeVar("F", bound=Callable[[], Any])

#: Seconds between two rounds.
AGAIN = 1.0
#: How often a waiting worker beats, seconds.
BEAT = 0.1


@dataclass
class Check:
    """One check; `critical` ones keep a worker from getting ready."""

    name: str
    function: Callable[[], Any]
    timeout: float
    critical: bool
    _thread: threading.Thread | None = field(default=None, repr=False)
    _error: str = ""
    _ended: float = 0.0

    def start(self) -> None:
        """Begin to run it, unless it still runs."""
        if self._thread is None or not self._thread.is_alive():
            self._error = "it has not ended"
            self._thread = threading.Thread(target=self._run, name=f"zdd_web-check-{self.name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            passed = self.function()
            if inspect.iscoroutine(passed):
                passed = asyncio.run(passed)
            self._error = "it returned False" if passed is False else ""
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}"
        self._ended = time.monotonic()

    def result(self, until: float, beat: Callable[[], None]) -> str:
        """Wait for its end, at most until an instant of `time.monotonic()`; return why it failed, "" if it passed."""
        assert self._thread is not None
        while self._thread.is_alive() and time.monotonic() < until:
            self._thread.join(min(BEAT, max(0.0, until - time.monotonic())))
            beat()
        in_time = not self._thread.is_alive() and self._ended <= until
        return self._error if in_time else f"no answer within {self.timeout:g} s"


_checks: dict[str, Check] = {}


def check(name: str, *, timeout: float = 2.0, critical: bool = True) -> Callable[[F], F]:
    """Register a function, sync or async, as a check. It fails when it raises, returns False or takes too long.

    `timeout` is in seconds. Raises `SettingsError` for a name that another function has, or that cannot be logged.

    >>> @check("doctest", critical=False)
    ... def always():
    ...     return True
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise SettingsError(f"check {name!r}: a name must be letters, digits and '_', such as 'database'")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 60:
        raise SettingsError(f"check {name!r}: timeout = {timeout!r} must be seconds between 0 and 60")

    def register(function: F) -> F:
        known = _checks.get(name)
        if known is not None and _place(known.function) != _place(function):
            raise SettingsError(
                f"check {name!r} is registered twice, by {_place(known.function)} and {_place(function)}: "
                f"give one of them another name"
            )
        _checks[name] = Check(name, function, float(timeout), critical)
        return function

    return register


def _place(function: Callable[[], Any]) -> str:
    # A module may be imported again, under pytest or after a failed import: the same place is the same check.
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def failing(beat: Callable[[], None]) -> dict[str, str]:
    """Run all checks at once; return those that failed, with the reason."""
    began, started = time.monotonic(), list(_checks.values())
    for each in started:
        each.start()
    results = {each.name: each.result(began + each.timeout, beat) for each in started}
    return {name: error for name, error in results.items() if error}


def pass_all(beat: Callable[[], None], say: Callable[[str], None]) -> None:
    """Wait until no critical check fails, beating meanwhile; `say` is told what fails, and "" at the end."""
    told: dict[str, str] = {}
    while True:
        failed = failing(beat)
        for name, error in failed.items():
            if told.get(name) != error:
                log.emit("check.failed", logging.WARNING, check=name, critical=_checks[name].critical, error=error)
        told = failed
        critical = [name for name in failed if _checks[name].critical]
        say(f"check {critical[0]!r} failed: {failed[critical[0]]}" if critical else "")
        if not critical:
            return
        again = time.monotonic() + AGAIN
        while time.monotonic() < again:
            beat()
            time.sleep(BEAT)
