"""A copy of another user's board.

A mapping is only as long as the file behind it: its owner can truncate that at any time, and the next read of a mapped
page ends the reader by SIGBUS. So what belongs to another user is read into memory of our own.
"""

from __future__ import annotations

import mmap
import os

from zdd_web.board import Board, Header, Snapshot, shape
from zdd_web.board.record import WORD
from zdd_web.errors import BoardError


class BoardCopy(Board):
    """A board as it was at the last `refresh()`; records of it stay valid and are refreshed with it."""

    def __init__(self, fd: int) -> None:
        """Copy the board behind a descriptor, which becomes this object's. Raises `BoardError` and OSError."""
        try:
            super().__init__(mmap.mmap(-1, shape(_start(fd), os.fstat(fd).st_size)), fd)
            self._shape: tuple[int, int, int] | None = None
            self.refresh()
        except BaseException:
            os.close(fd)
            self.fd = -1
            raise

    def refresh(self) -> None:
        """Read the board again, as far as its slots are used. Raises `BoardError` when it is not one any more."""
        start = _start(self.fd)
        shape(start, os.fstat(self.fd).st_size)
        header = Header(memoryview(start), 0)
        found = header.slots_at, header.slot_words, header.slot_count
        if self._shape not in (None, found):
            raise BoardError(f"the board of {header.name!r} has changed its shape")
        self._shape = found
        used = header.slots_at + min(header.slots_used, header.slot_count) * header.slot_words
        os.preadv(self.fd, [self.memory[: used * WORD]], 0)
        # Those that were checked: the file may have changed since.
        self.memory[: len(start)] = start

    def snapshot(self) -> Snapshot:
        """Read the board again, and return it. Raises `BoardError` as `Board.snapshot()` does."""
        self.refresh()
        return super().snapshot()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def _start(fd: int) -> bytes:
    return os.pread(fd, Header.FIXED * WORD, 0)
