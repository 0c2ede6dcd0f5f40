"""The generation that is active after this one has handed over, where this process keeps its pid.

With KEEP_PID the pid of the first master still means the service: it is sent signals that are meant for whichever
generation is active, and its exit status is to be that of the service.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.upgrade.successor_process import Upgrade
from zdd_web.lifecycle import STOPPING, Phase
from zdd_web.service import Line
from zdd_web.system import proc


class Descendants:
    """This master's successor and those after it, and what this process owes them."""

    def __init__(self, generation: Generation, successor: Callable[[], Upgrade | None], *, was_started: bool) -> None:
        """`successor` returns this master's own; `was_started` is false of a process that another master has forked."""
        self._generation, self._header = generation, generation.header
        self._successor, self._was_started = successor, was_started
        self._line: Line | None = None

    def forget(self) -> None:
        """Forget which generation was active: the successor through which it was found has gone."""
        self._line = None

    def forwards(self, sig: signal.Signals, *, unless_it_stops: bool = False) -> bool:
        """Send a signal on to the successor: where the pid must stay, it still means the service."""
        upgrade = self._successor()
        if not (self.leaves_a_keeper and self._generation.phase is Phase.RETIRING and upgrade is not None):
            return False
        current = self._line_of(upgrade).is_active()
        if current is not None and not (unless_it_stops and current.board.header.phase in STOPPING):
            proc.kill(current.pid, current.board.header.master_start, sig)
        return True

    def _line_of(self, upgrade: Upgrade) -> Line:
        # One for all ticks: once it has found the active generation it asks that one's board, and not all of /proc.
        if self._line is None:
            self._line = Line(os.getpid(), self._header.name, upgrade.pid)
        return self._line

    @property
    def leaves_a_keeper(self) -> bool:
        """Whether this pid must stay for a successor: with KEEP_PID, unless that was started on its own."""
        upgrade = self._successor()
        return self._generation.settings.keep_pid and upgrade is not None and upgrade.is_child

    @property
    def becomes_the_keeper(self) -> bool:
        """Whether this is the process that stays: the first of those that have forked each other."""
        return self.leaves_a_keeper and self._was_started

    def identity_status(self) -> int | None:
        """Return the exit status of the service that this master's successors were; None while one of them lives."""
        upgrade = self._successor()
        if upgrade is None or upgrade.status is None:
            return None
        if self._line_of(upgrade).is_active() is not None:
            return None
        code = os.waitstatus_to_exitcode(upgrade.status)
        return 128 - code if code < 0 else code
