"""What an app asks about its own process: on a board of the master's, and without any gunicorn."""

from __future__ import annotations

import asyncio
import contextvars
import dis
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import zdd_web
from tests.helpers.threads import at_once
from zdd_web import process, waitgroup
from zdd_web.board import NAMED_TASKS, Board, Slot, WorkerState
from zdd_web.gunicorn.workers import request_counts
from zdd_web.gunicorn.workers.request_counts import RequestCounter
from zdd_web.lifecycle import Phase
from zdd_web.process import Process
from zdd_web.settings import Settings
from zdd_web.waitgroup import all_groups


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    # What a worker does to this process is taken back.
    process.use(None)
    monkeypatch.setattr(all_groups, "observer", None)
    board = Board.create("unit", slots=1)
    yield board
    process.use(None)
    all_groups.observer = None
    board.close()


@pytest.fixture
def slot(board: Board) -> Iterator[Slot]:
    slot = board.claim(1)
    yield slot
    slot.words.release()
    slot.order.words.release()


@pytest.fixture
def worker(board: Board, slot: Slot) -> Process:
    return process.attach(board, slot, Settings())


@pytest.mark.usefixtures("board")
def test_process_without_gunicorn_serves_as_the_first_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZDD_WEB_HEALTH_PATH", "/up")
    assert (zdd_web.phase(), zdd_web.generation()) == (Phase.SERVING, 1)
    assert (zdd_web.draining(), zdd_web.deadline()) == (False, None)
    assert process.current().settings == Settings(health_path="/up")
    assert process.current() is process.current()


@pytest.mark.usefixtures("board")
def test_setting_that_cannot_work_is_an_error_without_gunicorn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZDD_WEB_GRACE_PERIOD", "soon")
    with pytest.raises(zdd_web.SettingsError, match="ZDD_WEB_GRACE_PERIOD=soon"):
        zdd_web.phase()


@pytest.mark.parametrize("phase", Phase)
def test_phase_and_generation_are_the_boards(worker: Process, phase: Phase) -> None:
    worker.board.header.phase, worker.board.header.generation = phase, 7
    assert (zdd_web.phase(), zdd_web.generation()) == (phase, 7)


@pytest.mark.parametrize(
    ("phase", "retire", "leaving"),
    [
        (Phase.BOOTING, 0, False),
        (Phase.SERVING, 0, False),
        (Phase.SERVING, 1, True),
        (Phase.LAME_DUCK, 0, True),
        (Phase.DRAINING, 0, True),
        (Phase.RETIRING, 0, True),
        (Phase.STOPPED, 0, True),
    ],
)
def test_worker_drains_with_its_generation_or_alone(worker: Process, phase: Phase, retire: int, leaving: bool) -> None:
    assert worker.slot is not None
    worker.board.header.phase, worker.slot.order.retire = phase, retire
    assert zdd_web.draining() is leaving


@pytest.mark.parametrize(
    ("generations", "workers", "expected"),
    [(0, 0, None), (5_000_000_000, 0, 5.0), (0, 7_000_000_000, 7.0), (5_000_000_000, 7_000_000_000, 5.0)],
)
def test_deadline_is_the_generations_before_the_workers_own(
    worker: Process, generations: int, workers: int, expected: float | None
) -> None:
    assert worker.slot is not None
    worker.board.header.deadline, worker.slot.order.retire_deadline = generations, workers
    assert zdd_web.deadline() == expected


def test_master_knows_its_generation_and_has_no_slot(board: Board) -> None:
    process.attach(board, None, Settings())
    board.header.phase = Phase.LAME_DUCK
    assert (zdd_web.draining(), zdd_web.deadline()) == (True, None)
    with waitgroup.background.track():
        assert board.snapshot().tasks == 0


def test_background_work_of_a_worker_stands_in_its_slot(worker: Process) -> None:
    assert worker.slot is not None
    with zdd_web.background.track("a"), waitgroup.WaitGroup("own").track("b"):
        assert worker.slot.tasks == 2
    assert worker.slot.tasks == 0


def test_the_oldest_background_tasks_of_a_worker_are_named_in_its_slot(worker: Process) -> None:
    assert worker.slot is not None
    entries = [zdd_web.background.add(f"job {number}") for number in range(NAMED_TASKS + 2)]
    entries.append(waitgroup.WaitGroup("own").add("n" * 500))
    expected = [(int(entry.started * 1e9), entry.name[:64]) for entry in entries]
    assert worker.slot.oldest_tasks() == expected[:NAMED_TASKS]
    while entries:
        entries.pop(0).done()
        expected.pop(0)
        assert worker.slot.oldest_tasks() == expected[:NAMED_TASKS]


def test_the_names_of_tasks_are_right_when_threads_come_and_go(worker: Process) -> None:
    assert worker.slot is not None
    with zdd_web.background.track("stays") as stays:

        def work() -> None:
            for number in range(200):
                with zdd_web.background.track(f"passes {number}"):
                    pass

        at_once(8, work)
        assert worker.slot.oldest_tasks() == [(int(stays.started * 1e9), "stays")]
    assert (worker.slot.oldest_tasks(), worker.slot.oldest_task) == ([], 0)


def test_requests_are_counted_in_and_out_by_any_number_of_threads(worker: Process) -> None:
    assert worker.slot is not None
    counter = RequestCounter(worker, 1 << 60, (), lambda _: True)

    def serve() -> None:
        for _ in range(500):
            counter.started(None, "a request")
            counter.finished(None, "a request", {}, None)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        at_once(8, serve)
    finally:
        sys.setswitchinterval(before)
    # In a context of its own: it notes which request this is.
    contextvars.copy_context().run(counter.started, None, "a request")
    assert (worker.slot.in_flight, worker.slot.requests) == (1, 4_000)
    counter.stop()
    counter.finished(None, "a request", {}, None)
    assert (worker.slot.in_flight, worker.slot.requests) == (1, 4_000), "it is cut off, and not finished"


@pytest.mark.skipif(not request_counts.has_gil(), reason="without the GIL there is a lock")
@pytest.mark.parametrize(("hook", "counts"), [("started", 1), ("finished", 2)])
def test_no_thread_gets_between_the_two_halves_of_a_count(worker: Process, hook: str, counts: int) -> None:
    code = getattr(RequestCounter(worker, 1 << 60, (), lambda _: True), hook)
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    written = [index for index, step in enumerate(steps) if step.opname == "STORE_SUBSCR"]
    assert len(written) == counts
    for end in written:
        counted = max(at for at, step in enumerate(steps[:end]) if step.opname == "STORE_DEREF")
        name = steps[counted].argval
        begin = max(at for at in range(counted) if (steps[at].opname, steps[at].argval) == ("LOAD_DEREF", name))
        assert name in [step.argval for step in steps[counted + 1 : end]], "what is counted is what is written"
        between = [step.opname for step in steps[begin : end + 1]]
        # Where an interpreter looks whether another thread is to run: at calls, and where it jumps back.
        assert not [name for name in between if "CALL" in name or "JUMP" in name or name in ("RESUME", "SEND")], between


def test_a_count_is_locked_where_there_is_no_gil(worker: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.slot is not None
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    lock = threading.Lock()
    monkeypatch.setattr(request_counts.threading, "Lock", lambda: lock)
    counter = RequestCounter(worker, 1 << 60, (), lambda _: True)
    seen: list[tuple[str, bool]] = []
    # What each hook calls while it counts, the lock taken.
    monkeypatch.setattr(counter, "_started_late", lambda request: seen.append(("started", lock.locked())))
    monkeypatch.setattr(counter, "failed", lambda request: seen.append(("finished", lock.locked())))
    worker.board.header.phase = Phase.DRAINING
    contextvars.copy_context().run(counter.started, None, "a request")
    assert worker.slot.in_flight == 1
    counter.finished(None, "a request", {}, SimpleNamespace(status_code=500))  # type: ignore[arg-type]
    assert (worker.slot.in_flight, worker.slot.requests) == (0, 1)
    assert seen == [("started", True), ("finished", True)] and not lock.locked()


def test_worker_says_its_state_and_since_when(worker: Process) -> None:
    assert worker.slot is not None
    worker.set_state(WorkerState.READY)
    assert worker.slot.state == WorkerState.READY
    since = worker.slot.state_since
    worker.set_state(WorkerState.SERVING)
    assert worker.slot.state_since >= since > 0
    assert worker.board.snapshot().workers[0].state is WorkerState.SERVING


def test_drain_event_is_set_when_the_generation_leaves(board: Board, worker: Process) -> None:
    event = zdd_web.drain_event()
    assert (event.is_set(), event.wait(timeout=0)) == (False, False)
    heard: list[bool] = []
    waiting = threading.Thread(target=lambda: heard.append(event.wait(timeout=30)))
    waiting.start()
    board.header.phase = Phase.LAME_DUCK
    waiting.join(30)
    assert heard == [True]
    asyncio.run(asyncio.wait_for(event.wait_async(), 30))


def test_drain_event_wakes_asyncio_code(board: Board, worker: Process) -> None:
    async def scene() -> bool:
        waiting = asyncio.ensure_future(zdd_web.drain_event().wait_async())
        await asyncio.sleep(0)
        assert not waiting.done()
        board.header.phase = Phase.DRAINING
        await asyncio.wait_for(waiting, 30)
        return True

    assert asyncio.run(scene())
