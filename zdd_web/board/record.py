"""What the board is made of: words, texts and runs of them in shared memory. See board.py for the theory.

A worker may write anything into its own part of the board, so what is read is a claim: `Count` and `Choice` return
values that are safe to compute with, and a text is at most as long as its field.
"""

from __future__ import annotations

import enum
from typing import Generic, TypeVar, overload

#: Bytes.
WORD = 8
#: The largest word.
LARGEST = 2**64 - 1
#: No counter reaches it, and five hundred of them can be added up in one word.
LARGEST_COUNT = 2**48

E = TypeVar("E", bound=enum.IntEnum)


def one_of(choices: type[E], value: int, otherwise: E) -> E:
    """Return the member with that number, or `otherwise` for a number that is not one of theirs."""
    try:
        return choices(value)
    except ValueError:
        return otherwise


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
        # Sums may hold what a worker claims: a number that does not fit must not raise in the master.
        record.words[record.base + self.index] = value if 0 <= value <= LARGEST else min(max(value, 0), LARGEST)


class Count(Word):
    """A counter, at most `most` when it is read, whatever stands there."""

    def __init__(self, index: int, most: int = LARGEST_COUNT) -> None:
        super().__init__(index)
        self.most = most

    @overload
    def __get__(self, record: None, owner: type) -> Count: ...
    @overload
    def __get__(self, record: Record, owner: type) -> int: ...
    def __get__(self, record: Record | None, owner: type) -> int | Count:
        if record is None:
            return self
        return min(record.words[record.base + self.index], self.most)


class Choice(Generic[E]):
    """A member of an enumeration; a number that is not one of theirs reads as `otherwise`."""

    def __init__(self, index: int, choices: type[E], otherwise: E) -> None:
        self.index, self.choices, self.otherwise = index, choices, otherwise

    @overload
    def __get__(self, record: None, owner: type) -> Choice[E]: ...
    @overload
    def __get__(self, record: Record, owner: type) -> E: ...
    def __get__(self, record: Record | None, owner: type) -> E | Choice[E]:
        if record is None:
            return self
        return one_of(self.choices, record.words[record.base + self.index], self.otherwise)

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
        # Wraps: the master writes into workers' slots too, and finds any number there.
        writing = record.words[at] | 1
        record.words[at] = writing
        record.memory[start : start + len(data)] = data
        record.words[at + 1] = len(data)
        record.words[at] = (writing + 1) & LARGEST


class Record:
    """A run of words on the board."""

    def __init__(self, memory: memoryview, base: int, words: memoryview[int] | None = None) -> None:
        """`words` is a view of the memory's words that another record has, and that is released with that."""
        self.memory = memory
        self.words: memoryview[int] = memory.cast("Q") if words is None else words
        self.base = base
