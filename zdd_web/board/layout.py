"""The fixed layout of a board: which word and which text stands where. See board.py for the theory.

The numbers are interface between versions of zdd_web: append, never renumber.
"""

from __future__ import annotations

import enum
from typing import overload

from zdd_web.board.record import WORD, Choice, Count, Record, Text, Word
from zdd_web.errors import BoardError

MAGIC = int.from_bytes(b"ZDDBOARD", "little")
LAYOUT = 4


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

    #: A `Admission`, and since when.
    door = Word(0)
    blocked_since = Word(1)
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
    blocked_since = Word(28)
    #: Where the orders stand; 0 on a board of zdd_web 0.1.0, whose slots hold them.
    orders_at = Word(25)
    #: The user of the workers, plus one; 0 for unknown.
    worker_uid = Word(27)
    #: The master's descriptors of its history (history.py) and of its request box (deploy_request.py); 0 for none.
    history_fd = Word(29)
    request_fd = Word(30)
    #: How many workers there are to be; `workers_wanted` are fewer while this generation serves as a canary. 0 on the
    #: board of a version without canaries.
    workers_full = Word(31)
    name = Text(32, 128)
    #: How many slots were ever used: no reader needs to look at those behind.
    slots_used = Word(50)
    #: gunicorn's `timeout`, nanoseconds; 0 for none.
    worker_timeout = Word(51)
    #: What workers that have ended had counted.
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
    #: There is no gunicorn, and no other process has this board.
    alone = Word(195)
    #: The worker that was last to end without an order once the gate was open, and its wait status. Written before
    #: `workers_lost`.
    lost_pid = Word(196)
    lost_status = Word(197)
    #: The pid of a successor that serves and takes kept connections from the exchange.
    successor_takes = Word(198)
    #: Kept connections: what workers that are no more had counted, see `Slot`.
    handed_over_gone = Word(199)
    received_gone = Word(218)
    closed_idle_gone = Word(219)
    #: `successor_trouble` as far as it fits; boards of versions without the whole have this alone.
    successor_trouble_cut = Text(200, 120)
    #: Totals of the generations before this one, in the order of `metrics.Totals`.
    BEFORE_AT = 220
    LISTENERS_AT = 240
    #: How many there are in zdd_web 0.1.0.
    LEAST_WORDS = LISTENERS_AT + MOST_LISTENERS * ListenerRecord.WORDS
    #: The names of all checks of a successor, and more: see `successor_trouble`.
    successor_trouble_whole = Text(LEAST_WORDS, 2048)
    #: Why the request with that `upgrade_number` was refused: a word of its own, since `upgrade_reason` and
    #: `upgrade_state` tell how an upgrade goes that is under way meanwhile. Masters of earlier versions write neither.
    refused_number = Word(217)
    refused_reason = Text(successor_trouble_whole.index + 2 + successor_trouble_whole.size // WORD, 1024)
    #: Workers with the configuration in force take no kept connections: a reload has brought it. For this generation's
    #: own workers.
    keeps_none = Word(LEAST_WORDS + 1023)
    #: Which code this generation runs: see `release`. Some words before it are left to texts of other parts.
    _release = Text(LEAST_WORDS + 1024, 256)
    WORDS = _release.index + 2 + _release.size // WORD

    @property
    def release(self) -> str:
        """What this generation's release is called (release.py); "" on the board of a version that does not tell."""
        # The header of an earlier version ends before it, and the orders begin.
        has_it = (self.orders_at or self.slots_at) > Header._release.index
        return self._release if has_it else ""

    @release.setter
    def release(self, value: str) -> None:
        self._release = value

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


class TaskRecord(Record):
    """A background task in hand; that worker's words. `started` is monotonic nanoseconds, 0 for none."""

    started = Word(0)
    name = Text(1, 64)
    WORDS = 12


#: How many tasks a worker names, the oldest: those that a stop or a generation that retires waits for.
NAMED_TASKS = 4


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


class LaterCount(Count):
    """A counter of a slot that boards of earlier versions have no word for: 0 there."""

    @overload
    def __get__(self, record: None, owner: type) -> Count: ...
    @overload
    def __get__(self, record: Record, owner: type) -> int: ...
    def __get__(self, record: Record | None, owner: type) -> int | Count:
        if record is None:
            return self
        assert isinstance(record, Slot)
        return super().__get__(record, owner) if self.index < record.length else 0


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
    recycle_requested = Word(12)
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
    #: Kept connections that this worker has handed over, received, and closed while they were idle because it, or the
    #: service, ends. Behind the words of earlier versions, whose slots are whole pages and have room.
    LEAST_WORDS = ACCEPTS_AT + MOST_LISTENERS
    handed_over = LaterCount(LEAST_WORDS)
    received = LaterCount(LEAST_WORDS + 1)
    closed_idle = LaterCount(LEAST_WORDS + 2)
    #: The oldest background tasks: see `TaskRecord`.
    TASKS_AT = LEAST_WORDS + 8
    WORDS = TASKS_AT + NAMED_TASKS * TaskRecord.WORDS

    def __init__(self, memory: memoryview, base: int, order: Order, length: int = WORDS) -> None:
        """`length` is that of the slots on this board, in words."""
        super().__init__(memory, base)
        self.order, self.length = order, length

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

    def task(self, index: int) -> TaskRecord:
        """Return the record of a background task, with an index from 0, on a board that has room for it."""
        return TaskRecord(self.memory, self.base + self.TASKS_AT + index * TaskRecord.WORDS, self.words)

    def oldest_tasks(self) -> list[tuple[int, str]]:
        """Return when the oldest background tasks were offered, and their names; `NAMED_TASKS` at most."""
        if self.length < self.WORDS:
            return []  # an earlier version's
        found = []
        for record in map(self.task, range(NAMED_TASKS)):
            started, name = record.started, record.name
            # Unchanged after the name was read: else it may be that of the next task.
            if started and record.started == started:
                found.append((started, name))
        return found


#: A board of this version has `SLOTS` slots and a tenth of these bytes.
MOST_SLOTS = 4096
LARGEST_BYTES = 1 << 26


def shape(start: bytes, size: int) -> int:
    """Return how many bytes the board has in a file of `size` bytes; `start` holds its words before `Header.FIXED`.

    Readers loop and multiply by the counts in it. Raises `BoardError` when the counts cannot be true.

    >>> shape(bytes(Header.FIXED * WORD), 1 << 20)
    Traceback (most recent call last):
    zdd_web.errors.BoardError: this is not a board of zdd_web
    """
    if len(start) < Header.FIXED * WORD:
        raise BoardError(f"this file holds {size} bytes, too few for a board of zdd_web")
    header = Header(memoryview(start), 0)
    if header.magic != MAGIC:
        raise BoardError("this is not a board of zdd_web")
    # Another layout has at least the words that never move.
    ours = header.layout == LAYOUT
    header_words, slot_words = (Header.LEAST_WORDS, Slot.LEAST_WORDS) if ours else (Header.FIXED, Slot.start.index + 1)
    needed = (header.slots_at + header.slot_count * header.slot_words) * WORD
    if (
        header.slots_at < header_words
        or (header.orders_at and header.orders_at + header.slot_count * Order.WORDS > header.slots_at)
        or header.slot_words < slot_words
        or header.slot_count > MOST_SLOTS
        or needed > min(size, LARGEST_BYTES)
    ):
        raise BoardError(
            f"this is not a board of zdd_web that can be read: slots_at = {header.slots_at}, slot_words = "
            f"{header.slot_words}, slot_count = {header.slot_count} in {size} bytes"
        )
    return needed
