"""Workers of a successor whose master was killed: they finish what they have, and one that is frozen is killed.

Their own master would have done that, and cannot any more. Without it a worker that is stopped or stuck would be here
for ever, with a copy of the listeners.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from zdd_web import clock, proc
from zdd_web.board import Board
from zdd_web.gunicorn.heartbeats import Heartbeats, frozen

#: Two heartbeats, seconds: no time is left to wait for more.
SILENT_AT_THE_END = 2.0


class Orphans:
    """The workers of one generation; `board` is this object's from now on."""

    def __init__(self, board: Board, send: Callable[[int, int, signal.Signals], None]) -> None:
        """`send` signals a worker by its pid and start time, if it is one."""
        self._board, self._send, self._left = board, send, set(board.worker_pids())
        self._heartbeats = Heartbeats(board, clock.now_ns())

    def follow(self) -> bool:
        """Kill those that are frozen; tell whether all have ended. To be called until then."""
        self._left = {(pid, start) for pid, start in self._left if proc.alive(pid, start)}
        if not self._left:
            self.forget()
            return True
        for worker in self._heartbeats.look():
            if (worker.pid, worker.start) in self._left and frozen(worker, self._heartbeats.timeout):
                self._send(worker.pid, worker.start, signal.SIGKILL)
        return False

    def end(self) -> None:
        """Kill those that show no sign of life, as the last thing that this master does."""
        for worker in self._heartbeats.look():
            silent = not worker.occupied and worker.silence > SILENT_AT_THE_END
            if (worker.pid, worker.start) in self._left and silent:
                self._send(worker.pid, worker.start, signal.SIGKILL)

    def forget(self) -> None:
        """Unmap the board."""
        self._board.close()
