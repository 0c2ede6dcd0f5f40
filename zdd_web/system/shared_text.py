"""A text in shared memory that its maker writes, whole, as often as it likes, and that others read.

The memory is sealed (shared_memory.py), so that no other process can write it, whatever descriptor it holds. It has two
halves, and a word that tells which of them counts: a writer fills the other one and changes the word last, and a
process killed in the middle of that leaves the earlier text as it was. A reader looks at the word again when it has
read: if it has changed meanwhile, the half that was read may have been written anew.
"""

from __future__ import annotations

import mmap
import os

from zdd_web.system import shared_memory

#: How many times the text was written, then the length of each half, as 64-bit words of this machine.
_WORDS = 3
_HEAD = mmap.PAGESIZE

_TRIES = 100


class Document:
    """A text in shared memory, on its maker's side.

    >>> document = Document("zdd_web-doctest", 100)
    >>> document.write(b"one"); document.write(b"two")
    >>> read(document.fd)
    b'two'
    >>> document.close()
    """

    def __init__(self, name: str, size: int) -> None:
        """Make one for texts of at most `size` bytes; `fd` is -1 where there is no memfd. Raises OSError."""
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(os, "memfd_create"):
            self.fd, self._mapping = shared_memory.create(name, _HEAD + 2 * self.size)
        else:
            self.fd, self._mapping = -1, mmap.mmap(-1, _HEAD + 2 * self.size)
        self._words: memoryview[int] | None = memoryview(self._mapping)[: 8 * _WORDS].cast("Q")

    def write(self, text: bytes) -> None:
        """Put a text in the place of the one before. Raises ValueError for one that is too long."""
        if len(text) > self.size:
            raise ValueError(f"{len(text)} bytes, and there is room for {self.size}")
        if self._words is None:
            return
        count = self._words[0] + 1
        at = _HEAD + count % 2 * self.size
        self._mapping[at : at + len(text)] = text
        self._words[1 + count % 2] = len(text)
        self._words[0] = count

    def close(self) -> None:
        """Unmap it and close the descriptor; a child of its maker has no way to write from then on."""
        if self._words is None:
            return
        self._words.release()
        self._words = None
        self._mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def read(fd: int) -> bytes:
    """Return the text behind a descriptor. Raises ValueError for what is not such a memory, and OSError."""
    size = (os.fstat(fd).st_size - _HEAD) // 2
    for _ in range(_TRIES):
        words = _words(fd)
        length = words[1 + words[0] % 2]
        if length > size:
            raise ValueError(f"a text of {length} bytes in {size}")
        text = os.pread(fd, length, _HEAD + words[0] % 2 * size)
        if _words(fd)[0] == words[0]:
            return text
    raise ValueError("it is written faster than it can be read")


def _words(fd: int) -> memoryview[int]:
    head = os.pread(fd, 8 * _WORDS, 0)
    if len(head) < 8 * _WORDS:
        raise ValueError(f"a file of {os.fstat(fd).st_size} bytes")
    return memoryview(head).cast("Q")
