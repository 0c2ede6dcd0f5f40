"""SIGUSR1: every generation of the service opens its log files again.

Log rotation renames the files and signals the pid in the pid file, which names one master. During an upgrade there is
another one, and of those that retire there may be several; each would write on into the renamed files.

Theory of operation
-------------------
The master that gets the signal opens its own files again, has its workers and its probe process do so, and sends
`reopen` over the handover channels (channel.py) to its successor and to its predecessor. Not the signal: a successor
that has not installed its handlers yet would die of it, and on the channel the message waits.

A master that receives it does the same, so it travels along the whole line. Each rotation has a number, which only
grows; one that is not greater than the last is not passed on, so it does not travel back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.system import clock, log_files


class AdjacentGeneration(Protocol):
    """A channel to the generation before or after this one."""

    #: The greatest number of a rotation that was received there.
    reopen_number: int

    def reopen(self, number: int) -> None:
        """Send the number of a rotation."""


class Rotation:
    """One master's part in it."""

    def __init__(self, reopen: Callable[[], None], adjacent: Callable[[], Iterable[AdjacentGeneration]]) -> None:
        """`reopen` opens the files of this generation again."""
        self._reopen, self._adjacent = reopening(reopen), adjacent
        self._number = 0

    def request(self) -> None:
        """SIGUSR1."""
        # Greater than any that is known here, also where another generation's clock is ahead (time namespaces).
        self._begin(max(clock.now_ns(), self._number + 1))

    def follow(self) -> None:
        """Obey the requests of other generations; the tick's call."""
        number = max((each.reopen_number for each in self._adjacent()), default=0)
        if number > self._number:
            self._begin(number)

    def _begin(self, number: int) -> None:
        self._number = number
        self._reopen()
        for each in self._adjacent():
            each.reopen(number)


def reopening(handler: Callable[..., None]) -> Callable[..., None]:
    """Return a handler of SIGUSR1 that logs what it cannot open, and goes on without that file."""
    attempt = guarded("log files", handler)

    def handle(*arguments: object) -> None:
        # Each step on its own: what the first or the last cannot do must not keep the old files open.
        before = guarded("log files", log_files.opened)()
        attempt(*arguments)
        if before is not None:
            guarded("log files", log_files.discard_failed)(before)

    return handle
