"""The gate: a worker accepts nothing until its generation may serve.

It is a pipe of the master. Its workers wait until the reading end is readable. The master opens the gate by writing a
byte, which no worker reads, and by closing the writing end, so the gate stays open for every later worker. Either of
the two is enough: a worker that reads the byte by mistake does not close the gate, and neither does a child of a
preloaded app that holds the writing end. The master's death ends the pipe too; the phase on the board shows which of
the two happened.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

from zdd_web.board import Board
from zdd_web.lifecycle import Phase


class Gate:
    """The pipe; made by the master before its first fork."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self.opened = False

    def open(self) -> None:
        """Let every worker pass, those waiting and those to come."""
        if not self.opened:
            self.opened = True
            os.write(self._writer, b"\n")
            self.keep_reader()

    def keep_reader(self) -> None:
        """Close the writing end, also in a worker, which must not keep the gate closed."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def leave(self) -> None:
        """Close what is left of the gate, in a worker that has passed."""
        os.close(self._reader)

    def wait(self, board: Board, beat: Callable[[], None], interval: float) -> None:
        """Wait until the gate opens, calling `beat()` at least every `interval` seconds.

        Ends the worker when the master is gone.
        """
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        while True:
            beat()
            if poller.poll(interval * 1000):
                self.look(board)
                return

    def fileno(self) -> int:
        """Return what becomes readable when the wait is over, for a worker that waits in an event loop."""
        return self._reader

    def look(self, board: Board) -> None:
        """Look why the wait has ended; ends the worker if its master is gone."""
        if board.header.phase == Phase.BOOTING:
            sys.exit(0)
