"""The board: shared memory in which a generation says what it is doing.

Theory of operation
-------------------
One memfd per generation, mapped by the master before its first fork, so that every worker has it too. A fixed layout
of 64-bit words: a header and an order for each worker, which only the master writes, and slots, one for each worker,
which only that worker writes. One writer per word and stores of whole aligned words mean that no process needs a lock
and that a process killed in the middle of anything leaves nothing locked. `memoryview.cast("Q")` stores a word with
one move; `struct.pack_into` would write zeroes first, and a reader would see them.

What a worker writes is a claim, never an order: the master's user is often root and a worker's is not. A slot is
whole pages, and `restrict()` leaves a worker no writable page but those (system/shared_memory.py). Which process has a
slot and whether it shall leave stands in the orders, written by the master from its own forks. Readers of a slot get
numbers within bounds and states that exist (record.py); no process is signalled because a slot names it.

Texts are longer than a word: they stand under a sequence counter that is odd while the text is being written. A reader
that does not get an even, unchanged counter in a few tries gives up on the text, never on the numbers.

Other processes (`zdd-web status`, the predecessor) find the board by its name, `zdd_web:<NAME>`, under
/proc/<pid>/fd: the kernel decides who may look, and nothing is left behind by a crash. The first words describe the
layout, so that a predecessor of another version can still find the pids on a board whose other fields it does not know.

Where there is no memfd the memory is anonymous: workers still have it, the commands do not.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
from collections.abc import Iterator
from typing import Any, TypeVar

from zdd_web.board.admission import Admission
from zdd_web.board.layout import (
    LAYOUT,
    MAGIC,
    MOST_LISTENERS,
    NAMED_TASKS,
    Header,
    ListenerRecord,
    Order,
    Slot,
    UpgradeState,
    WorkerState,
    shape,
)
from zdd_web.board.record import WORD
from zdd_web.board.snapshot import ListenerView, Snapshot, TaskView, WorkerView
from zdd_web.errors import BoardError
from zdd_web.lifecycle import Phase
from zdd_web.system import clock, shared_memory

MEMFD_PREFIX = "zdd_web:"

#: More than any host runs of gunicorn workers; untouched slots cost no memory, a memfd is sparse.
SLOTS = 512

PAGE_WORDS = mmap.PAGESIZE // WORD

E = TypeVar("E", bound=enum.Enum)


def _member(kind: type[E], value: int, word: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise BoardError(f"{word} = {value} on the board, which is not a {kind.__name__}") from None


class Board:
    """A mapped board; see the module's text.

    >>> board = Board.private(name="doctest")
    >>> board.header.generation = 3
    >>> board.snapshot().generation
    3
    """

    def __init__(self, mapping: mmap.mmap, fd: int = -1) -> None:
        self._mapping = mapping
        self.fd = fd
        self.memory = memoryview(mapping)
        self.header = Header(self.memory, 0)
        #: All slots before it are taken: to look through them for each worker of many would take longer than the forks.
        self._first_free = 0

    @classmethod
    def create(cls, name: str, *, slots: int = SLOTS) -> Board:
        """Make a new, empty board of a generation under the memfd name `zdd_web:<name>`."""
        # Whole pages, so that a worker can have its slot and nothing else.
        slot_words = _whole_pages(Slot.WORDS)
        size = (_slots_at(slots) + slots * slot_words) * WORD
        if hasattr(os, "memfd_create"):
            fd, mapping = shared_memory.create(MEMFD_PREFIX + name, size)
            board = cls(mapping, fd)
        else:
            board = cls(mmap.mmap(-1, size))
        board._format(name, slots, slot_words)
        board.header.phase = Phase.BOOTING
        # Last: a reader that sees the magic may believe the rest.
        board.header.magic = MAGIC
        return board

    @classmethod
    def private(cls, name: str = "") -> Board:
        """Make a board that no other process has: for `runserver`, `flask run` and test clients."""
        board = cls(mmap.mmap(-1, (_slots_at(1) + Slot.WORDS) * WORD))
        board._format(name, 1, Slot.WORDS)
        header = board.header
        header.generation, header.phase, header.magic = 1, Phase.SERVING, MAGIC
        header.master_pid, header.slots_used, header.alone = os.getpid(), 1, 1
        return board

    def _format(self, name: str, slots: int, slot_words: int) -> None:
        header = self.header
        header.layout, header.slots_at, header.slot_words, header.slot_count = (
            LAYOUT,
            _slots_at(slots),
            slot_words,
            slots,
        )
        header.orders_at = Header.WORDS
        header.name = name

    @classmethod
    def open(cls, fd: int) -> Board:
        """Map the board behind a descriptor, which stays the caller's, to read it.

        Raises `BoardError` when it is not a board, or its counts cannot be true.
        """
        size = os.fstat(fd).st_size
        # A pipe has a size of 0, and cannot be read at a position.
        length = shape(os.pread(fd, Header.FIXED * WORD, 0) if size else b"", size)
        own = fd
        # A mapping made with a descriptor that can write could be made writable again, where the board is not sealed.
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(own, length, prot=mmap.PROT_READ))
        finally:
            if own != fd:
                os.close(own)

    def close(self) -> None:
        """Unmap the board, and close its descriptor where this object made it."""
        header = self.header
        header.words.release()
        with contextlib.suppress(BufferError):  # a slot that is still held keeps the mapping, not the board
            self.memory.release()
            self._mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def restrict(self, own: Slot | None = None) -> None:
        """Leave this process, a child of the master, no page to write but those of its `own` slot, for good.

        Where there is no memfd the pages stay writable. Raises OSError.
        """
        if self.fd < 0:
            return
        at, size = shared_memory.address_of(self._mapping), len(self._mapping)
        begin, end = size, size
        if own is not None:
            begin, end = own.base * WORD, (own.base + self.header.slot_words) * WORD
        shared_memory.make_read_only(at, 0, begin, self.fd)
        shared_memory.make_read_only(at, end, size - end, self.fd)

    def slot(self, index: int) -> Slot:
        """Return the slot with an index from 0."""
        return Slot(self.memory, self._slot_at(index), self.order(index), self.header.slot_words)

    def order(self, index: int) -> Order:
        """Return the order to the worker that has the slot with that index."""
        orders_at = self.header.orders_at
        return Order(self.memory, orders_at + index * Order.WORDS if orders_at else self._slot_at(index))

    def _slot_at(self, index: int) -> int:
        return self.header.slots_at + index * self.header.slot_words

    def slots(self) -> Iterator[Slot]:
        """Return all slots, used or not."""
        return (self.slot(index) for index in range(self.header.slot_count))

    def used_slots(self) -> Iterator[Slot]:
        """Return the slots that were ever used."""
        header = self.header
        return (self.slot(index) for index in range(min(header.slots_used, header.slot_count)))

    def taken_slots(self) -> Iterator[Slot]:
        """Return the slots that a worker has now."""
        return (slot for slot in self.used_slots() if slot.order.taken)

    def answered(self) -> tuple[int, int]:
        """Return how many requests this generation has answered, and how many of them with a status of 500 or above."""
        header, slots = self.header, list(self.taken_slots())
        requests = header.requests_gone + sum(slot.requests for slot in slots)
        return requests, header.server_errors_gone + sum(slot.server_errors for slot in slots)

    def claim(self, age: int) -> Slot:
        """Take a free slot for a worker that is about to be forked; the master's call.

        Raises `BoardError` when none is free.
        """
        for index in range(self._first_free, self.header.slot_count):
            slot = self.slot(index)
            if not slot.order.taken:
                self._first_free = index + 1
                words, order = slot.words, slot.order
                # Workers that die one after the other have not beaten, whatever their slots' numbers.
                beat_at = slot.beat_at
                for word in range(slot.base, slot.base + Slot.error.index):
                    words[word] = 0
                slot.beat_at = beat_at
                self.header.slots_used = max(self.header.slots_used, index + 1)
                slot.error = slot.late_peer = ""
                slot.handed_over = slot.received = slot.closed_idle = 0
                slot.server_errors = slot.oldest_task = slot.heartbeat = slot.late_new_by = 0
                for task in range(NAMED_TASKS):
                    slot.task(task).started = 0
                for quarter in Slot.LATE_QUARTERS:
                    words[slot.base + quarter.index] = 0
                slot.state = WorkerState.BOOTING
                order.pid = order.start = order.retire = order.retire_deadline = 0
                order.age = age
                order.taken = 1
                return slot
        raise BoardError(f"all {self.header.slot_count} slots of the board are taken: run fewer workers")

    def free(self, slot: Slot) -> None:
        """Give up the slot of a worker that has ended; the master's call."""
        slot.order.taken = slot.order.pid = slot.pid = 0
        self._first_free = min(self._first_free, (slot.base - self.header.slots_at) // self.header.slot_words)
        slot.beat_at = min(slot.beat_at, clock.now_ns())
        slot.state = WorkerState.FREE

    def worker_pids(self) -> list[tuple[int, int]]:
        """Return (pid, start time) of every worker, as the master knows them from its forks."""
        orders = (self.order(index) for index in range(self.header.slot_count))
        return [(order.pid, order.start) for order in orders if order.pid]

    @property
    def names_its_workers(self) -> bool:
        """Whether `worker_pids()` is the master's word; on a board of zdd_web 0.1.0 it is what the workers claim."""
        return bool(self.header.orders_at)

    def listener_records(self) -> Iterator[tuple[ListenerRecord, int]]:
        """Return the records that are in use, each with its index."""
        for index in range(min(self.header.listener_count, MOST_LISTENERS)):
            yield self.header.listener(index), index

    def listeners(self) -> Iterator[ListenerView]:
        """Return the listeners that have a record, and are more than bound."""
        for record, index in self.listener_records():
            if record.door == Admission.BOUND:
                continue
            accepted = sum(slot.words[slot.base + Slot.ACCEPTS_AT + index] for slot in self.used_slots())
            yield ListenerView(record.name, record.length, record.limit, accepted)

    def snapshot(self) -> Snapshot:
        """Read the whole board.

        Raises `BoardError` when another version of zdd_web wrote it, or a phase or an outcome on it is invalid.
        """
        header = self.header
        if header.layout != LAYOUT:
            raise BoardError(
                f"the board has layout {header.layout}, this zdd_web reads {LAYOUT}: use the commands of its version"
            )
        views: list[WorkerView] = []
        for slot in self.taken_slots():
            order = slot.order
            views.append(
                WorkerView(
                    # Between the fork and the master's note of it the worker itself knows better.
                    pid=order.pid or slot.pid,
                    start=order.start or slot.start,
                    age=order.age,
                    state=slot.state,
                    retiring=bool(order.retire),
                    in_flight=slot.in_flight,
                    requests=slot.requests,
                    tasks=slot.tasks,
                    error=slot.error,
                    handed_over=slot.handed_over,
                    received=slot.received,
                    closed_idle=slot.closed_idle,
                    oldest_tasks=tuple(TaskView(*task) for task in slot.oldest_tasks()) if slot.tasks else (),
                )
            )
        fields: dict[str, Any] = {
            name: getattr(header, name)
            for name in Snapshot._fields
            if name not in ("phase", "successor_phase", "upgrade_state", "workers", "listeners")
            and not name.startswith("connections_")
        }
        successor_phase = header.successor_phase
        return Snapshot(
            phase=_member(Phase, header.phase, "phase"),
            successor_phase=_member(Phase, successor_phase, "successor_phase") if successor_phase else None,
            upgrade_state=_member(UpgradeState, header.upgrade_state, "upgrade_state"),
            workers=tuple(sorted(views, key=lambda view: view.age)),
            listeners=tuple(self.listeners()),
            connections_handed_over=header.handed_over_gone + sum(view.handed_over for view in views),
            connections_received=header.received_gone + sum(view.received for view in views),
            connections_closed_idle=header.closed_idle_gone + sum(view.closed_idle for view in views),
            **fields,
        )


def _whole_pages(words: int) -> int:
    return -(-words // PAGE_WORDS) * PAGE_WORDS


def _slots_at(slots: int) -> int:
    return _whole_pages(Header.WORDS + slots * Order.WORDS)
