"""`zdd-web drain` follows a stop on the board to its end; masters here are real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

from tests.helpers.forks import spawn, status_of
from zdd_web import service
from zdd_web.board import Board, Slot, WorkerState
from zdd_web.cli import control, main, unfinished_work
from zdd_web.lifecycle import Phase
from zdd_web.service import Generation
from zdd_web.system import clock, proc

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

Stop = Callable[[Board, Slot], None]
Start = Callable[..., int]


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create("drained", slots=2)
    board.header.generation, board.header.phase = 4, Phase.SERVING
    yield board
    board.close()


@pytest.fixture
def start(board: Board, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a master that does `on_term` at the first SIGTERM and then ends; the commands find no other."""
    pids: list[int] = []

    def start(on_term: Stop = lambda board, slot: None) -> int:
        slot = board.claim(1)
        slot.state, slot.in_flight, slot.tasks = WorkerState.SERVING, 1, 1
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

        def master() -> None:
            signal.sigwait([signal.SIGTERM])
            on_term(board, slot)

        pid = spawn(master)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        pids.append(pid)
        board.header.master_pid, board.header.master_start = pid, proc.start_time(pid)
        monkeypatch.setattr(service, "find", lambda **named: Generation(pid, board))
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        status_of(pid)


def drain(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["drain", *arguments])


def leave(board: Board, slot: Slot) -> None:
    """Stop as a master does whose only worker finishes what it has."""
    board.header.phase = Phase.LAME_DUCK
    board.header.phase = Phase.DRAINING
    slot.in_flight = slot.tasks = 0
    board.free(slot)
    board.header.phase = Phase.STOPPED


def test_stop_that_cuts_nothing_off_is_status_0(start: Start) -> None:
    pid = start(leave)
    result = drain()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"drained: generation 4 (pid {pid})"
    assert lines[-1].startswith("generation 4 has ended, after ")
    assert lines[-1].endswith(" s; nothing was cut off")


def test_phases_are_shown_as_they_come(start: Start, board: Board) -> None:
    gate, opened = os.pipe()

    def step_by_step(board: Board, slot: Slot) -> None:
        board.header.phase = Phase.LAME_DUCK
        os.read(gate, 1)
        board.header.phase = Phase.DRAINING
        os.read(gate, 1)
        leave(board, slot)

    pid = start(step_by_step)
    seen = []

    def progress(snapshot: object) -> None:
        if snapshot.phase not in seen:  # type: ignore[attr-defined]
            seen.append(snapshot.phase)  # type: ignore[attr-defined]
            os.write(opened, b".")

    try:
        assert control.drain(Generation(pid, board), progress).ok
    finally:
        os.close(gate)
        os.close(opened)
    assert seen == [Phase.LAME_DUCK, Phase.DRAINING]


@pytest.mark.parametrize(
    ("freed", "requests", "tasks", "abandoned", "said"),
    [
        (False, 1, 0, 0, "cut off: 1 request and 0 background tasks"),
        (False, 2, 1, 1, "cut off: 2 requests and 1 background task"),
        # It has named what it gave up, and ended.
        (True, 0, 0, 3, "cut off: 0 requests and 3 background tasks"),
        (True, 1, 2, 0, "cut off: 1 request and 2 background tasks"),
    ],
)
def test_stop_that_cuts_something_off_is_status_1(
    start: Start, freed: bool, requests: int, tasks: int, abandoned: int, said: str
) -> None:
    def cut(board: Board, slot: Slot) -> None:
        board.header.phase = Phase.DRAINING
        slot.in_flight, slot.tasks, slot.abandoned = requests, tasks, abandoned
        if freed:
            board.free(slot)
            board.header.phase = Phase.STOPPED

    start(cut)
    result = drain()
    assert result.exit_code == 1
    assert said in result.output
    assert "event=background.abandoned" in result.output


def test_worker_that_died_long_ago_is_not_held_against_the_stop(start: Start, board: Board) -> None:
    old = board.claim(0)
    start(leave)
    old.in_flight, old.abandoned = 5, 5
    board.free(old)
    del old
    assert drain().exit_code == 0


def test_no_wait_sends_the_signal_and_ends(start: Start) -> None:
    reader, writer = os.pipe()
    start(lambda board, slot: os.write(writer, b"t") and None)  # type: ignore[arg-type, func-returns-value]
    result = drain("--no-wait")
    assert (result.exit_code, len(result.output.splitlines())) == (0, 1)
    assert os.read(reader, 1) == b"t"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("wait", [[], ["--no-wait"]])
def test_second_drain_ends_no_lame_duck(
    start: Start, board: Board, wait: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = start(leave)
    board.header.phase = Phase.LAME_DUCK
    kill, sent = os.kill, []
    monkeypatch.setattr(os, "kill", lambda *signalled: sent.append(signalled))
    monkeypatch.setattr(control, "POLL", 0.0)
    look = unfinished_work.UnfinishedWork.look

    def looked(self: unfinished_work.UnfinishedWork) -> None:
        look(self)
        kill(pid, signal.SIGTERM)  # from somebody else

    monkeypatch.setattr(unfinished_work.UnfinishedWork, "look", looked)
    result = drain(*wait)
    monkeypatch.undo()
    assert (result.exit_code, sent) == (0, [])
    assert "which stops already" in result.output


def test_master_that_is_killed_is_no_clean_end(start: Start, board: Board) -> None:
    start(lambda board, slot: setattr(slot, "tasks", 0) or setattr(slot, "in_flight", 0))  # type: ignore[func-returns-value]
    result = drain()
    assert result.exit_code == 1
    assert "drain failed: the master ended while serving: it was killed, or told to stop now" in result.output


def test_master_that_does_not_answer_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ANSWER_WITHIN", 0.05)
    start(lambda board, slot: signal.pause())
    result = drain()
    assert result.exit_code == 1
    assert "drain failed: the master did not answer SIGTERM within 0.05 s" in result.output


def test_master_that_stands_still_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "STANDS_STILL", 0.05)

    def stand_still(board: Board, slot: Slot) -> None:
        board.header.tick_at = clock.now_ns()
        board.header.phase = Phase.DRAINING
        signal.pause()

    start(stand_still)
    result = drain()
    assert result.exit_code == 1
    assert "drain failed: the master has stood still for 0.05 s" in result.output


@pytest.mark.parametrize(
    ("error", "said"),
    [(PermissionError, "no permission to signal process"), (ProcessLookupError, "is gone")],
)
def test_master_that_cannot_be_signalled_is_status_2(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: type[OSError], said: str
) -> None:
    start()
    with monkeypatch.context() as patched:

        def refuse(*signalled: object) -> None:
            raise error

        patched.setattr(signal, "pidfd_send_signal", refuse)
        result = drain()
    assert result.exit_code == 2
    assert said in result.output


def test_service_of_another_version_is_not_touched(start: Start, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    board.header.layout = 99
    sent: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", lambda *signalled: sent.append(signalled))
        result = drain()
    assert (result.exit_code, sent) == (2, [])
    assert "use the commands of its version" in result.output
