"""The board: shared memory in which a generation says what it is doing.

Theory of operation
-------------------
One memfd per generation, mapped by the master before its first fork, so that every worker has it too. A fixed layout
of 64-bit words: a header and an order for each worker, which only the master writes, and slots, one for each worker,
which only that worker writes. One writer per word and stores of whole aligned words mean that no process needs a lock
and that a process killed in the middle of anything leaves nothing locked. `memoryview.cast("Q")` stores a word with
one move; `struct.pack_into` would write zeroes first, and a reader would see them.

What a worker writes is a claim, never an order: the master's user is often root and a worker's is not. A slot is
whole pages, and `restrict()` leaves a worker no writable page but those (system/memory.py). Which process has a slot
and whether it shall leave stands in the orders, written by the master from its own forks. Readers of a slot get
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
from dataclasses import dataclass
from typing import Any, TypeVar

from zdd_web.door import Door
from zdd_web.errors import BoardError
from zdd_web.lifecycle import Phase
from zdd_web.record import WORD, Choice, Count, Record, Text, Word
from zdd_web.system import memory as shared_memory

MEMFD_PREFIX = "zdd_web:"
MAGIC = int.from_bytes(b"ZDDBOARD", "little")
LAYOUT = 4

#: More than any host runs of gunicorn workers; untouched slots cost no memory, a memfd is sparse.
SLOTS = 512

PAGE_WORDS = mmap.PAGESIZE // WORD


class WorkerState(enum.IntEnum):
    """What a worker says of itself. The numbers are written on the board: append, never renumber."""

    FREE = 0
    BOOTING = 1
    READY = 2
    SERVING = 3
    LEAVING = 4

    @property
    def label(self) -> str:
        """The state's name as `status` spells it."""
        return self.name.lower()


class Heartbeat(enum.IntEnum):
    """When a worker sends heartbeats, at least one a second. The numbers are written on the board: append only."""

    #: Another version of zdd_web has the slot: perhaps only one in half of gunicorn's `timeout`.
    UNKNOWN = 0
    #: Whatever its requests do: it has a thread of its own for connections.
    ALWAYS = 1
    #: A request that blocks holds it up.
    BETWEEN_REQUESTS = 2
    #: It has a connection in hand, and sends the next one when it has closed that: with or without a request.
    AFTER_CONNECTION = 3


class UpgradeState(enum.IntEnum):
    """How far the master's last upgrade came. Append, never renumber."""

    NONE = 0
    BOOTING = 1
    COMMITTING = 2
    DONE = 3
    FAILED = 4
    REFUSED = 5


#: More than anybody binds; what is never written costs no memory.
MOST_LISTENERS = 256


class ListenerRecord(Record):
    """A listener and its accept queue; the master's words. Times are monotonic nanoseconds."""

    #: A `Door`, and since when.
    door = Word(0)
    door_since = Word(1)
    #: Nothing is under way to it any more, although others stay on its port.
    settled = Word(2)
    #: Connections that wait in its queue, and how many may.
    length = Word(3)
    limit = Word(4)
    #: What the kernel calls it: masters that share a port know each other's by it.
    inode = Word(5)
    name = Text(6, 128)
    WORDS = 24


class Header(Record):
    """The master's words. Times are monotonic nanoseconds."""

    # Words 0-17 and the name never move: masters and commands of another version of zdd_web read them, and know that
    # there are at least so many.
    FIXED = 64
    magic = Word(0)
    layout = Word(1)
    slots_at = Word(2)
    slot_words = Word(3)
    slot_count = Word(4)
    master_pid = Word(5)
    master_start = Word(6)
    generation = Word(7)
    phase = Word(8)
    phase_since = Word(9)
    deadline = Word(10)
    workers_wanted = Word(11)
    started_at = Word(12)
    ready_at = Word(13)
    tick_at = Word(14)
    predecessor_pid = Word(15)
    successor_pid = Word(16)
    successor_phase = Word(17)
    #: Counts the SIGUSR2 that were handled: a command that sent one waits for this to move, then reads the outcome.
    upgrade_number = Word(18)
    upgrade_state = Word(19)
    upgrade_since = Word(20)
    boot_log_fd = Word(21)
    upgrades_done = Word(22)
    upgrades_failed = Word(23)
    reload_number = Word(24)
    #: When SIGTERM came.
    stop_since = Word(26)
    #: When it was decided what becomes of the listeners' queues: each has its door, see `ListenerRecord`.
    door_since = Word(28)
    #: Where the orders stand; 0 on a board of zdd_web 0.1.0, whose slots hold them.
    orders_at = Word(25)
    #: The user of the workers, plus one; 0 for unknown.
    worker_uid = Word(27)
    name = Text(32, 128)
    #: How many slots were ever used: nobody needs to look at those behind.
    slots_used = Word(50)
    #: gunicorn's `timeout`, nanoseconds; 0 for none.
    worker_timeout = Word(51)
    #: What workers that are no more had counted.
    requests_gone = Word(52)
    server_errors_gone = Word(53)
    late_gone = Word(54)
    workers_lost = Word(55)
    upgrades_refused = Word(56)
    #: How long the last upgrade and the retirement of this generation took, nanoseconds.
    upgrade_took = Word(57)
    drain_took = Word(58)
    #: How many listeners there are, of those that have a record.
    listener_count = Word(59)
    #: The probe port's process; any other than the one named here goes.
    probe_pid = Word(60)
    probe_start = Word(61)
    probe_accepts = Word(62)
    #: It answers on the socket that was inherited, as its predecessor's does.
    probe_shared = Word(63)
    upgrade_reason = Text(64, 1024)
    #: For how long a worker may boot, nanoseconds.
    boot_timeout = Word(194)
    #: There is no gunicorn, and nobody else has this board.
    alone = Word(195)
    #: The worker that was last to end without an order once the gate was open, and its wait status. Written before
    #: `workers_lost`.
    lost_pid = Word(196)
    lost_status = Word(197)
    #: `successor_trouble` as far as it fits; boards of versions without the whole have this alone.
    successor_trouble_cut = Text(200, 120)
    #: Totals of the generations before this one, in the order of `metrics.Totals`.
    BEFORE_AT = 220
    LISTENERS_AT = 240
    #: How many there are in zdd_web 0.1.0.
    LEAST_WORDS = LISTENERS_AT + MOST_LISTENERS * ListenerRecord.WORDS
    #: The names of all checks of a successor, and more: see `successor_trouble`.
    successor_trouble_whole = Text(LEAST_WORDS, 2048)
    WORDS = successor_trouble_whole.index + 2 + successor_trouble_whole.size // WORD

    @property
    def successor_trouble(self) -> str:
        """What fails in a successor that serves, joined by "; "; read by a generation that retires."""
        # The header of an earlier version ends before it.
        has_whole = self.slots_at > Header.successor_trouble_whole.index
        return self.successor_trouble_whole if has_whole else self.successor_trouble_cut

    @successor_trouble.setter
    def successor_trouble(self, value: str) -> None:
        self.successor_trouble_whole = self.successor_trouble_cut = value

    def listener(self, index: int) -> ListenerRecord:
        """Return the record of a listener, with an index from 0."""
        return ListenerRecord(self.memory, self.LISTENERS_AT + index * ListenerRecord.WORDS)


class CheckRecord(Record):
    """What a worker's check found last; that worker's words. Times are monotonic nanoseconds."""

    result = Word(0)
    kind = Word(1)
    critical = Word(2)
    at = Word(3)
    fresh_until = Word(4)
    failing_since = Word(5)
    name = Text(6, 48)
    message = Text(14, 192)
    WORDS = 40


#: More than any app asks; what is never written costs no memory.
MAX_CHECKS = 32


class Order(Record):
    """Which worker has a slot, and what it is told: the master's words. Times are monotonic nanoseconds.

    The indices are those that these words had in a slot of zdd_web 0.1.0: there the slot is read as the order.
    """

    #: As the master knows it from its own fork; 0 until then.
    pid = Word(0)
    start = Word(1)
    #: A worker has the slot.
    taken = Word(2)
    age = Word(8)
    retire = Word(9)
    retire_deadline = Word(10)
    WORDS = 16


class Slot(Record):
    """A worker's words: claims, see the module's text. Times are monotonic nanoseconds."""

    # pid and start never move: a master of zdd_web 0.1.0 looks for its successor's workers here.
    pid = Word(0)
    start = Word(1)
    #: A worker that claims a state that there is not is replaced.
    state = Choice(2, WorkerState, WorkerState.LEAVING)
    state_since = Word(3)
    in_flight = Count(4)
    requests = Count(5)
    tasks = Count(6)
    #: Background tasks that were given up at the deadline.
    abandoned = Count(7)
    #: The last heartbeat. It outlives the worker: see `claim()`.
    beat_at = Word(11)
    #: How many of the records behind are in use.
    checks = Count(15, most=MAX_CHECKS)
    #: The worker has answered `max_requests` and asks for a replacement.
    weary = Word(12)
    # 8 to 10 were the master's orders in zdd_web 0.1.0.
    #: Requests that came after SIGTERM; how late the last of them, nanoseconds, and from where.
    late = Count(13)
    late_by = Count(14)
    error = Text(16, 512)
    late_peer = Text(82, 88)
    #: Replies with a status of 500 or more, probes aside.
    server_errors = Count(95)
    #: When the oldest background task was offered.
    oldest_task = Word(96)
    #: A `Heartbeat`.
    heartbeat = Word(97)
    #: Of the late requests those that came on new connections, by quarter of the lame duck; and `late_by` of those.
    LATE_QUARTERS = (Count(98), Count(99), Count(100), Count(101))
    late_new_by = Count(102)
    CHECKS_AT = 104
    #: Connections accepted from each listener, by all workers that have had this slot.
    ACCEPTS_AT = CHECKS_AT + MAX_CHECKS * CheckRecord.WORDS
    WORDS = ACCEPTS_AT + MOST_LISTENERS

    def __init__(self, memory: memoryview, base: int, order: Order) -> None:
        super().__init__(memory, base)
        self.order = order

    @property
    def retire(self) -> int:
        """Whether the master has told this worker to leave."""
        return self.order.retire

    @property
    def retire_deadline(self) -> int:
        """Until when it may take."""
        return self.order.retire_deadline

    @property
    def late_quarters(self) -> tuple[int, ...]:
        """Return how many requests came on new connections in each quarter of the lame duck."""
        return tuple(count.__get__(self, Slot) for count in self.LATE_QUARTERS)

    def count_late_quarter(self, index: int) -> None:
        """Count a request on a new connection in that quarter of the lame duck, from 0; the worker's call."""
        self.words[self.base + self.LATE_QUARTERS[index].index] += 1

    def count_accept(self, index: int) -> None:
        """Count a connection accepted from the listener with that index; the worker's call."""
        self.words[self.base + self.ACCEPTS_AT + index] += 1

    def check(self, index: int) -> CheckRecord:
        """Return the record of a check, with an index from 0."""
        return CheckRecord(self.memory, self.base + self.CHECKS_AT + index * CheckRecord.WORDS)


@dataclass(frozen=True)
class WorkerView:
    """One worker as the board had it at an instant."""

    pid: int
    start: int
    age: int
    state: WorkerState
    retiring: bool
    in_flight: int
    requests: int
    tasks: int
    error: str


@dataclass(frozen=True)
class ListenerView:
    """One listener as the board had it: connections that wait, how many may, and how many were accepted from it.

    `accepted` is counted where there are several on a port (LISTENER = "reuseport"), and 0 elsewhere.
    """

    name: str
    length: int
    limit: int
    accepted: int


@dataclass(frozen=True)
class Snapshot:
    """The board as it was at an instant: what probes, commands and tests decide upon."""

    name: str
    generation: int
    phase: Phase
    phase_since: int
    deadline: int
    master_pid: int
    master_start: int
    workers_wanted: int
    started_at: int
    ready_at: int
    tick_at: int
    predecessor_pid: int
    successor_pid: int
    successor_phase: Phase | None
    upgrade_number: int
    upgrade_state: UpgradeState
    upgrade_reason: str
    boot_log_fd: int
    upgrades_done: int
    upgrades_failed: int
    workers: tuple[WorkerView, ...]
    listeners: tuple[ListenerView, ...]

    @property
    def in_flight(self) -> int:
        """Requests in hand in all workers."""
        return sum(worker.in_flight for worker in self.workers)

    @property
    def tasks(self) -> int:
        """Background tasks in hand in all workers."""
        return sum(worker.tasks for worker in self.workers)


#: A board of this version has `SLOTS` slots and a tenth of these bytes.
MOST_SLOTS = 4096
LARGEST_BYTES = 1 << 26


def shape(start: bytes, size: int) -> int:
    """Return how many bytes the board has in a file of `size` bytes; `start` holds its words before `Header.FIXED`.

    Readers loop and multiply by the counts in it. Raises `BoardError` when the counts cannot be true.

    >>> shape(bytes(Header.FIXED * WORD), 1 << 20)
    Traceback (most recent call last):
    zdd_web.errors.BoardError: this is no board of zdd_web
    """
    if len(start) < Header.FIXED * WORD:
        raise BoardError(f"this file holds {size} bytes, too few for a board of zdd_web")
    header = Header(memoryview(start), 0)
    if header.magic != MAGIC:
        raise BoardError("this is no board of zdd_web")
    # Another layout has at least the words that never move.
    ours = header.layout == LAYOUT
    header_words, slot_words = (Header.LEAST_WORDS, Slot.WORDS) if ours else (Header.FIXED, Slot.start.index + 1)
    needed = (header.slots_at + header.slot_count * header.slot_words) * WORD
    if (
        header.slots_at < header_words
        or (header.orders_at and header.orders_at + header.slot_count * Order.WORDS > header.slots_at)
        or header.slot_words < slot_words
        or header.slot_count > MOST_SLOTS
        or needed > min(size, LARGEST_BYTES)
    ):
        raise BoardError(
            f"this is no board of zdd_web that can be read: slots_at = {header.slots_at}, slot_words = "
            f"{header.slot_words}, slot_count = {header.slot_count} in {size} bytes"
        )
    return needed


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
        return Slot(self.memory, self._slot_at(index), self.order(index))

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

    def claim(self, age: int) -> Slot:
        """Take a free slot for a worker that is about to be forked; the master's call.

        Raises `BoardError` when none is free.
        """
        for index, slot in enumerate(self.slots()):
            if not slot.order.taken:
                words, order = slot.words, slot.order
                # Workers that die one after the other have not beaten, whatever their slots' numbers.
                beat_at = slot.beat_at
                for word in range(slot.base, slot.base + Slot.error.index):
                    words[word] = 0
                slot.beat_at = beat_at
                self.header.slots_used = max(self.header.slots_used, index + 1)
                slot.error = slot.late_peer = ""
                slot.server_errors = slot.oldest_task = slot.heartbeat = slot.late_new_by = 0
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
            if record.door == Door.IDLE:
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
                )
            )
        fields: dict[str, Any] = {
            name: getattr(header, name)
            for name in Snapshot.__dataclass_fields__
            if name not in ("phase", "successor_phase", "upgrade_state", "workers", "listeners")
        }
        successor_phase = header.successor_phase
        return Snapshot(
            phase=_member(Phase, header.phase, "phase"),
            successor_phase=_member(Phase, successor_phase, "successor_phase") if successor_phase else None,
            upgrade_state=_member(UpgradeState, header.upgrade_state, "upgrade_state"),
            workers=tuple(sorted(views, key=lambda view: view.age)),
            listeners=tuple(self.listeners()),
            **fields,
        )


def _whole_pages(words: int) -> int:
    return -(-words // PAGE_WORDS) * PAGE_WORDS


def _slots_at(slots: int) -> int:
    return _whole_pages(Header.WORDS + slots * Order.WORDS)
