"""The gate: a worker accepts nothing until its generation may serve.

A pipe of the master. Its workers wait until the reading end is readable; the master opens the gate by
writing a byte, which no worker reads, and closing the writing end: it stands open for every later worker, at once. A
worker that reads the byte all the same does not shut it, since the end of a pipe cannot be taken away; a child of a
preloaded app that keeps the writing end does not either. The master's death ends the pipe too: the phase on the board
tells which of the two it was.
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
        """Close the writing end, in a worker: it may not keep the gate closed."""
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
        """Return what becomes readable when the wait is over, for those who wait in a loop."""
        return self._reader

    def look(self, board: Board) -> None:
        """Tell which end the wait had: ends the worker when the master is gone."""
        if board.header.phase == Phase.BOOTING:
            sys.exit(0)
