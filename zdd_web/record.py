"""What the board is made of: words, texts and runs of them in shared memory. See board.py for the theory."""

from __future__ import annotations

from typing import overload

#: Bytes.
WORD = 8


class Word:
    """An unsigned 64-bit field at a fixed index of a record."""

    def __init__(self, index: int) -> None:
        self.index = index

    @overload
    def __get__(self, record: None, owner: type) -> Word: ...
    @overload
    def __get__(self, record: Record, owner: type) -> int: ...
    def __get__(self, record: Record | None, owner: type) -> int | Word:
        if record is None:
            return self
        return record.words[record.base + self.index]

    def __set__(self, record: Record, value: int) -> None:
        record.words[record.base + self.index] = value


class Text:
    """A UTF-8 text of at most `size` bytes (a multiple of eight) under a sequence counter."""

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size

    @overload
    def __get__(self, record: None, owner: type) -> Text: ...
    @overload
    def __get__(self, record: Record, owner: type) -> str: ...
    def __get__(self, record: Record | None, owner: type) -> str | Text:
        if record is None:
            return self
        at = record.base + self.index
        start = (at + 2) * WORD
        for _ in range(100):
            sequence = record.words[at]
            text = bytes(record.memory[start : start + min(record.words[at + 1], self.size)])
            if sequence % 2 == 0 and record.words[at] == sequence:
                return text.decode("utf-8", "replace")
        return ""

    def __set__(self, record: Record, value: str) -> None:
        at = record.base + self.index
        start = (at + 2) * WORD
        data = value.encode("utf-8", "replace")[: self.size]
        record.words[at] |= 1
        record.memory[start : start + len(data)] = data
        record.words[at + 1] = len(data)
        record.words[at] += 1


class Record:
    """A run of words on the board."""

    def __init__(self, memory: memoryview, base: int) -> None:
        self.memory = memory
        self.words: memoryview[int] = memory.cast("Q")
        self.base = base
