"""Workers of a successor whose master was killed: they finish what they have, and one that is frozen is killed.

Their own master would have done that, and cannot any more. Without it a worker that is stopped or stuck would be here
for ever, with a copy of the listeners. A stop waits for them until its deadline; none outlives this master.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

from zdd_web.board import Board
from zdd_web.gunicorn.upgrade.heartbeats import Heartbeats, frozen
from zdd_web.system import clock, proc


class Orphans:
    """The workers of one generation; `board` is this object's from now on."""

    def __init__(self, board: Board, send: Callable[[int, int, signal.Signals], None], deadline: int) -> None:
        """`send` signals a worker by its pid and start time, if it is one; after `deadline` those left are killed."""
        self._board, self._send, self._left = board, send, set(board.worker_pids())
        self._deadline = deadline
        self._heartbeats = Heartbeats(board, clock.now_ns())

    def follow(self) -> bool:
        """Kill those that are frozen; tell whether all have ended. To be called until then."""
        with contextlib.suppress(OSError):  # no descriptor left to look with
            self._left = {(pid, start) for pid, start in self._left if proc.alive(pid, start)}
        if not self._left:
            self.forget()
            return True
        if clock.passed(self._deadline):
            self.end()
        for worker in self._heartbeats.look():
            if (worker.pid, worker.start) in self._left and frozen(worker, self._heartbeats.timeout):
                self._send(worker.pid, worker.start, signal.SIGKILL)
        return False

    def end(self) -> None:
        """Kill those that are left, as the last thing that this master does."""
        for pid, start in self._left:
            self._send(pid, start, signal.SIGKILL)

    def forget(self) -> None:
        """Unmap the board."""
        self._board.close()
