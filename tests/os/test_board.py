"""The board: what one process writes another reads, whatever is on it and whoever wrote it."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.forks import in_child, spawn, status_of
from zdd_web import metrics, probes
from zdd_web.board import (
    LAYOUT,
    MAGIC,
    MAX_CHECKS,
    MOST_LISTENERS,
    NAMED_TASKS,
    Board,
    CheckRecord,
    Header,
    ListenerRecord,
    Order,
    Slot,
    Snapshot,
    TaskRecord,
    UpgradeState,
    WorkerState,
    WorkerView,
)
from zdd_web.board.record import LARGEST_COUNT, WORD, Choice, Text, Word
from zdd_web.errors import BoardError
from zdd_web.lifecycle import Phase


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create("unit", slots=3)
    yield board
    board.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    """A descriptor of memory that nobody has made a board of yet."""
    fd = os.memfd_create("unit", os.MFD_CLOEXEC)
    yield fd
    os.close(fd)


# -- round trips


def test_board_is_found_by_the_name_of_its_memfd(board: Board) -> None:
    assert os.readlink(f"/proc/self/fd/{board.fd}") == "/memfd:zdd_web:unit (deleted)"
    assert not os.get_inheritable(board.fd)


def test_new_board_boots_and_has_no_workers(board: Board) -> None:
    snapshot = board.snapshot()
    assert (snapshot.name, snapshot.phase, snapshot.workers) == ("unit", Phase.BOOTING, ())
    assert (snapshot.successor_phase, snapshot.upgrade_state) == (None, UpgradeState.NONE)
    assert board.worker_pids() == []


def test_private_board_serves() -> None:
    board = Board.private("alone")
    snapshot = board.snapshot()
    assert (snapshot.name, snapshot.generation, snapshot.phase) == ("alone", 1, Phase.SERVING)
    assert (snapshot.master_pid, snapshot.workers, board.fd) == (os.getpid(), (), -1)
    board.close()


def test_every_word_of_the_header_has_a_place_of_its_own(board: Board) -> None:
    board.header.name = "n" * 128
    board.header.upgrade_reason = "r" * 1024
    plain = [field for field in Snapshot._fields if isinstance(vars(Header).get(field), Word)]
    numbers = {field: 1_000 + at for at, field in enumerate(sorted(plain))}
    numbers |= {"phase": Phase.RETIRING, "successor_phase": Phase.SERVING, "upgrade_state": UpgradeState.FAILED}
    for field, number in numbers.items():
        setattr(board.header, field, number)
    snapshot = board.snapshot()._asdict()
    assert {field: snapshot[field] for field in numbers} == numbers
    assert (snapshot["name"], snapshot["upgrade_reason"]) == ("n" * 128, "r" * 1024)


def test_fields_of_a_record_do_not_overlap() -> None:
    blocks = {
        Header: [
            (Header.BEFORE_AT, Header.LISTENERS_AT),
            (Header.LISTENERS_AT, Header.LISTENERS_AT + MOST_LISTENERS * ListenerRecord.WORDS),
        ],
        Slot: [
            (Slot.CHECKS_AT, Slot.CHECKS_AT + MAX_CHECKS * CheckRecord.WORDS),
            (Slot.ACCEPTS_AT, Slot.ACCEPTS_AT + MOST_LISTENERS),
            (Slot.TASKS_AT, Slot.TASKS_AT + NAMED_TASKS * TaskRecord.WORDS),
        ],
        ListenerRecord: [],
        CheckRecord: [],
        TaskRecord: [],
        Order: [],
    }
    for record, behind in blocks.items():
        taken = [word for block in behind for word in range(*block)]
        for descriptor in vars(record).values():
            if isinstance(descriptor, Text):
                assert descriptor.size % WORD == 0
                taken += range(descriptor.index, descriptor.index + 2 + descriptor.size // WORD)
            elif isinstance(descriptor, (Word, Choice)):
                taken.append(descriptor.index)
        assert len(taken) == len(set(taken))
        assert max(taken) < record.WORDS


def test_worker_says_all_there_is_to_say(board: Board) -> None:
    slot = board.claim(7)
    slot.order.pid, slot.order.start, slot.state, slot.order.retire = 4711, 99, WorkerState.SERVING, 1
    slot.in_flight, slot.requests, slot.tasks = 2, 300, 4
    slot.error = "ImportError: no module named 'shöp'"
    assert board.snapshot().workers == (
        WorkerView(
            pid=4711,
            start=99,
            age=7,
            state=WorkerState.SERVING,
            retiring=True,
            in_flight=2,
            requests=300,
            tasks=4,
            error="ImportError: no module named 'shöp'",
        ),
    )


def test_snapshot_sums_what_its_workers_have_in_hand_oldest_first(board: Board) -> None:
    for age, in_flight, tasks in ((2, 3, 0), (1, 1, 5)):
        slot = board.claim(age)
        slot.in_flight, slot.tasks = in_flight, tasks
    snapshot = board.snapshot()
    assert [worker.age for worker in snapshot.workers] == [1, 2]
    assert (snapshot.in_flight, snapshot.tasks) == (4, 5)


def test_snapshot_stays_what_it_was(board: Board) -> None:
    snapshot = board.snapshot()
    board.header.phase = Phase.SERVING
    assert snapshot.phase is Phase.BOOTING
    with pytest.raises(AttributeError):
        snapshot.phase = Phase.SERVING  # type: ignore[misc]


def test_numbers_on_the_board_are_forever() -> None:
    assert {state.label: int(state) for state in WorkerState} == {
        "free": 0,
        "booting": 1,
        "ready": 2,
        "serving": 3,
        "leaving": 4,
    }
    assert {state.name: int(state) for state in UpgradeState} == {
        "NONE": 0,
        "BOOTING": 1,
        "COMMITTING": 2,
        "DONE": 3,
        "FAILED": 4,
        "REFUSED": 5,
    }


# -- slots


def test_slots_are_claimed_freed_and_reused_clean(board: Board) -> None:
    first, second = board.claim(1), board.claim(2)
    assert first.base != second.base
    first.pid, first.start, first.in_flight, first.tasks, first.error = 4711, 5, 3, 2, "it broke"
    first.task(1).started, first.task(1).name = 17, "report"
    assert first.oldest_tasks() == [(17, "report")]
    first.order.retire, first.order.retire_deadline = 1, 12
    board.free(first)
    again = board.claim(3)
    assert again.base == first.base
    assert board.snapshot().workers[-1] == WorkerView(
        pid=0,
        start=0,
        age=3,
        state=WorkerState.BOOTING,
        retiring=False,
        in_flight=0,
        requests=0,
        tasks=0,
        error="",
    )
    assert again.retire_deadline == 0
    assert again.oldest_tasks() == []


def test_slot_of_an_earlier_version_names_no_tasks(board: Board) -> None:
    slot = board.claim(1)
    slot.task(0).started = 17
    assert Slot(slot.memory, slot.base, slot.order, Slot.LEAST_WORDS).oldest_tasks() == []


def test_full_board_refuses_a_worker_and_says_what_to_do(board: Board) -> None:
    claimed = [board.claim(age) for age in range(3)]
    with pytest.raises(BoardError, match="all 3 slots of the board are taken: run fewer workers"):
        board.claim(3)
    board.free(claimed[1])
    assert board.claim(4).base == claimed[1].base


def test_worker_pids_are_those_that_the_master_has_noted(board: Board) -> None:
    claimed = board.claim(1)
    claimed.pid, claimed.start = 1, 1
    order = board.claim(2).order
    order.pid, order.start = 4711, 99
    assert board.worker_pids() == [(4711, 99)]


# -- across processes


def test_child_writes_its_slot_and_the_parent_reads_it(board: Board) -> None:
    slot = board.claim(1)

    def work() -> None:
        slot.pid, slot.in_flight, slot.error = os.getpid(), 3, "said by the child"
        slot.state = WorkerState.LEAVING

    pid = spawn(work)
    assert status_of(pid) == 0
    (worker,) = board.snapshot().workers
    assert (worker.pid, worker.in_flight, worker.error) == (pid, 3, "said by the child")
    assert worker.state is WorkerState.LEAVING


def test_reader_never_gets_half_of_one_text_and_half_of_another(board: Board) -> None:
    texts = {"a" * 1000, "b" * 700}
    board.header.upgrade_reason = "a" * 1000
    board.header.phase = Phase.SERVING

    def write() -> None:
        while board.header.phase != Phase.STOPPED:
            for text in texts:
                board.header.upgrade_reason = text

    pid = spawn(write)
    try:
        seen = {board.header.upgrade_reason for _ in range(5_000)}
    finally:
        board.header.phase = Phase.STOPPED
        assert status_of(pid) == 0
    assert seen - {""} <= texts


def test_descriptor_opens_the_same_board_in_another_process(board: Board) -> None:
    def read() -> object:
        other = Board.open(board.fd)
        return [other.header.generation, other.snapshot().name]

    board.header.generation = 5
    assert in_child(read) == [5, "unit"]


def test_board_opened_to_read_cannot_be_written(board: Board) -> None:
    board.claim(1)
    reader = Board.open(board.fd)
    for attempt in (
        lambda: setattr(reader.header, "phase", Phase.SERVING),
        lambda: setattr(reader.header, "name", "mine"),
        lambda: setattr(reader.slot(0).order, "retire", 1),
        lambda: reader.claim(2),
    ):
        with pytest.raises(TypeError, match="read-only"):
            attempt()
    assert board.snapshot() == reader.snapshot()
    reader.close()


# -- texts


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", ""),
        ("x" * 128, "x" * 128),
        ("x" * 129, "x" * 128),
        ("x" * 127 + "é", "x" * 127 + "\N{REPLACEMENT CHARACTER}"),
        ("\udcff", "?"),
    ],
)
def test_text_is_cut_to_its_field(board: Board, text: str, read: str) -> None:
    board.header.name = text
    assert board.header.name == read


def test_text_that_is_too_long_leaves_its_neighbours_alone(board: Board) -> None:
    slots = [board.claim(age) for age in range(3)]
    for slot in slots:
        slot.pid, slot.error = 4711, "mine"
    board.header.upgrade_reason, board.header.master_pid = "mine", 4700
    board.header.name = "x" * 10_000
    slots[1].error = "x" * 10_000
    slots[2].error = "x" * 10_000
    snapshot = board.snapshot()
    assert (snapshot.upgrade_reason, snapshot.master_pid) == ("mine", 4700)
    assert [(worker.pid, len(worker.error)) for worker in snapshot.workers] == [(4711, 4), (4711, 512), (4711, 512)]


@given(texts=st.lists(st.text(st.characters(), max_size=60), min_size=1))
def test_text_of_any_characters_is_read_as_it_was_written_or_cut(texts: list[str]) -> None:
    board = Board.private()
    for text in texts:
        board.header.name = text
        data = text.encode("utf-8", "replace")
        assert board.header.name == data[:128].decode("utf-8", "replace")
        assert board.header.master_pid == os.getpid()
    board.close()


def test_writer_that_died_within_a_text_costs_the_text_and_not_the_numbers(board: Board) -> None:
    board.header.upgrade_reason, board.header.upgrades_failed = "half a tex", 3
    slot = board.claim(1)
    slot.error, slot.in_flight = "half an err", 2
    for words, at in (
        (board.header.words, Header.upgrade_reason.index),
        (slot.words, slot.base + Slot.error.index),
    ):
        words[at] |= 1
    snapshot = board.snapshot()
    assert (snapshot.upgrade_reason, snapshot.upgrades_failed) == ("", 3)
    assert (snapshot.workers[0].error, snapshot.workers[0].in_flight) == ("", 2)
    board.header.upgrade_reason = "whole"
    assert board.snapshot().upgrade_reason == "whole"
    board.free(slot)
    board.claim(2).error = "whole too"
    assert board.snapshot().workers[0].error == "whole too"


def test_length_that_cannot_be_true_is_not_believed(board: Board) -> None:
    board.header.upgrade_reason = "next"
    board.header.name = "n" * 128
    board.header.words[Header.name.index + 1] = 1 << 40
    assert board.header.name == "n" * 128


# -- what is no board of ours


def test_what_is_no_board_is_refused(tmp_path: Path) -> None:
    size = Header.FIXED * WORD
    for content, said in (
        (b"", "holds 0 bytes, too few for a board"),
        (bytes(size - 1), f"holds {size - 1} bytes, too few"),
        (bytes(size), "is not a board of zdd_web"),
        (bytes(size + 1), "is not a board of zdd_web"),
    ):
        file = tmp_path / "foreign"
        file.write_bytes(content)
        with file.open("rb") as opened, pytest.raises(BoardError) as caught:
            Board.open(opened.fileno())
        assert said in str(caught.value)


def test_board_with_more_slots_than_memory_is_refused(memfd: int) -> None:
    os.ftruncate(memfd, (Header.WORDS + 2 * Slot.WORDS) * WORD)
    os.pwrite(memfd, struct.pack("=5Q", MAGIC, LAYOUT, Header.WORDS, Slot.WORDS, 3), 0)
    with pytest.raises(BoardError, match="is not a board of zdd_web"):
        Board.open(memfd)
    os.pwrite(memfd, struct.pack("=5Q", MAGIC, LAYOUT, Header.WORDS, Slot.WORDS, 2), 0)
    Board.open(memfd).close()


def test_slots_of_an_earlier_version_are_read_and_have_no_later_counters(memfd: int) -> None:
    os.ftruncate(memfd, (Header.WORDS + 2 * Slot.LEAST_WORDS) * WORD)
    os.pwrite(memfd, struct.pack("=5Q", MAGIC, LAYOUT, Header.WORDS, Slot.LEAST_WORDS, 2), 0)
    # The first words of the next slot: a pid and a start.
    os.pwrite(memfd, struct.pack("=3Q", 4711, 99, 1), (Header.WORDS + Slot.LEAST_WORDS) * WORD)
    board = Board.open(memfd)
    first = board.slot(0)
    assert (first.handed_over, first.received, first.closed_idle) == (0, 0, 0)
    assert board.slot(1).pid == 4711
    board.close()


def test_pipe_is_no_board() -> None:
    reader, writer = os.pipe()
    with pytest.raises(BoardError, match="too few for a board"):
        Board.open(reader)
    os.close(reader)
    os.close(writer)


def test_board_of_another_layout_gives_its_pids_and_nothing_else(memfd: int) -> None:
    header_words, slot_words, slots = 700, 40, 4
    os.ftruncate(memfd, (header_words + slots * slot_words) * WORD)
    for at, numbers in (
        (0, (MAGIC, LAYOUT + 1, header_words, slot_words, slots, 4700)),
        (header_words, (4711, 5)),
        (header_words + 2 * slot_words, (4712, 6)),
    ):
        os.pwrite(memfd, struct.pack(f"={len(numbers)}Q", *numbers), at * WORD)
    reader = Board.open(memfd)
    assert reader.header.master_pid == 4700
    assert reader.worker_pids() == [(4711, 5), (4712, 6)]
    with pytest.raises(BoardError, match=f"the board has layout {LAYOUT + 1}, this zdd_web reads {LAYOUT}"):
        reader.snapshot()
    reader.close()


# -- the end


def test_closed_board_is_gone_and_can_be_closed_again(board: Board) -> None:
    fd = board.fd
    board.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="released memoryview"):
        _ = board.header.phase
    board.close()


def test_slot_that_is_still_held_survives_the_close(board: Board) -> None:
    slot = board.claim(1)
    board.close()
    slot.in_flight = 3
    assert slot.in_flight == 3


def test_closing_a_reader_leaves_the_descriptor_to_its_owner(board: Board) -> None:
    reader = Board.open(board.fd)
    reader.close()
    assert os.fstat(board.fd).st_size > 0
    assert board.snapshot().name == "unit"


# -- what a worker may write


def test_a_restricted_process_writes_its_own_slot_and_dies_of_any_other_store(board: Board) -> None:
    own, other = board.claim(1), board.claim(2)

    def ends_by(store: Callable[[], None]) -> int:
        def work() -> None:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            faulthandler.disable()
            board.restrict(own)
            own.in_flight = 7
            store()

        return status_of(spawn(work))

    assert ends_by(lambda: None) == 0
    assert own.in_flight == 7
    for store in (
        lambda: setattr(board.header, "phase", Phase.STOPPED),
        lambda: setattr(own.order, "retire", 1),
        lambda: setattr(other, "in_flight", 1),
        lambda: board.header.listener(0).words.__setitem__(Header.LISTENERS_AT, 1),
    ):
        assert ends_by(store) == -signal.SIGSEGV
    assert (board.header.phase, own.retire, other.in_flight) == (Phase.BOOTING, 0, 0)


def test_a_restricted_process_sees_what_the_master_writes(board: Board) -> None:
    slot = board.claim(1)
    reader, writer = os.pipe()

    def work() -> None:
        board.restrict(slot)
        os.read(reader, 1)
        slot.requests = board.header.generation

    pid = spawn(work)
    board.header.generation = 5
    os.write(writer, b".")
    assert status_of(pid) == 0
    os.close(reader)
    os.close(writer)
    assert slot.requests == 5


@pytest.mark.parametrize("access", [mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE])
def test_no_descriptor_of_a_board_can_be_written_or_cut(board: Board, access: int) -> None:
    again = os.open(f"/proc/self/fd/{board.fd}", os.O_RDWR)
    try:
        for fd in (board.fd, again):
            for attempt in (
                lambda fd=fd: mmap.mmap(fd, mmap.PAGESIZE, prot=access),
                lambda fd=fd: os.pwrite(fd, b"x", 0),
                lambda fd=fd: os.ftruncate(fd, 0),
            ):
                with pytest.raises(PermissionError):
                    attempt()
    finally:
        os.close(again)


@given(numbers=st.lists(st.integers(0, 2**64 - 1), min_size=20, max_size=20), data=st.binary(min_size=64, max_size=64))
def test_whatever_stands_in_a_slot_a_snapshot_can_be_taken(numbers: list[int], data: bytes) -> None:
    board = Board.create("unit", slots=1)
    slot = board.claim(1)
    for at, number in enumerate(numbers):
        slot.words[slot.base + at] = number
    at = (slot.base + Slot.error.index) * WORD
    board.memory[at : at + len(data)] = data
    (worker,) = board.snapshot().workers
    assert worker.state in WorkerState
    assert worker.in_flight <= LARGEST_COUNT
    assert probes.look(board).workers is not None
    assert metrics.totals(board).requests <= LARGEST_COUNT
    slot.error = "the master's own words"
    del slot
    board.close()
