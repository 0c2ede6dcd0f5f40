"""A stop is sent on to the masters before this one, and to no other process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.helpers.forks import spawn, status_of
from zdd_web.board import Board
from zdd_web.gunicorn.upgrade import ancestors
from zdd_web.gunicorn.upgrade.ancestors import Ancestors
from zdd_web.lifecycle import Phase
from zdd_web.system import proc

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create("ancestor", slots=1)
    board.header.phase = Phase.RETIRING
    yield board
    board.close()


@pytest.fixture
def old(board: Board) -> Iterator[tuple[int, int]]:
    """A master that retires: it dies of any signal."""
    # Whatever another test has done to this process's signals.
    pid = spawn(lambda: (signal.signal(signal.SIGQUIT, signal.SIG_DFL), signal.pause()))
    board.header.master_pid, board.header.master_start = pid, proc.start_time(pid)
    yield pid, proc.start_time(pid)
    os.kill(pid, signal.SIGKILL)
    status_of(pid)


def ended_by(pid: int) -> int:
    """Return the signal that has ended a process, without waiting for it; 0 when it runs."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return found.si_status if found else 0


def wait(pid: int) -> int:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return ended_by(pid)


def test_one_that_retires_is_sent_the_signal(old: tuple[int, int]) -> None:
    Ancestors((old,)).tell(signal.SIGTERM)
    assert wait(old[0]) == signal.SIGTERM


def test_one_that_has_finished_ends_by_itself(old: tuple[int, int], board: Board) -> None:
    board.header.phase = Phase.STOPPED
    Ancestors((old,)).tell(signal.SIGTERM)
    assert ended_by(old[0]) == 0
    # One that has only looked so is reached by what spares nothing.
    Ancestors((old,)).tell(signal.SIGQUIT)
    assert wait(old[0]) == signal.SIGQUIT


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGQUIT])
def test_one_that_stops_already_is_not_sent_another_term(
    old: tuple[int, int], board: Board, sig: signal.Signals
) -> None:
    board.header.deadline = 1
    Ancestors((old,)).tell(sig)
    if sig is signal.SIGTERM:
        assert ended_by(old[0]) == 0
    else:
        assert wait(old[0]) == sig


def test_another_process_that_has_the_pid_is_left_alone(old: tuple[int, int]) -> None:
    known = Ancestors(((old[0], old[1] + 1),))
    known.tell(signal.SIGKILL)
    assert known.alive() == []
    assert ended_by(old[0]) == 0


def test_a_process_of_another_user_is_left_alone(old: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "owner", lambda pid: os.geteuid() + 1)
    Ancestors((old,)).tell(signal.SIGKILL)
    assert ended_by(old[0]) == 0


def test_a_keeper_is_left_alone(old: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ancestors, "kept_by", lambda pid: ("service", 1))
    Ancestors((old,)).tell(signal.SIGKILL)
    assert ended_by(old[0]) == 0


def test_uid_is_that_of_the_process(old: tuple[int, int]) -> None:
    assert proc.owner(old[0]) == os.geteuid()
    assert proc.owner(1 << 23) == -1


@pytest.mark.parametrize(
    ("phase", "deadline", "expected"),
    [
        (Phase.LAME_DUCK, 50, 50),
        (Phase.DRAINING, 500, 100),
        (Phase.SERVING, 0, 100),
        # It retires itself, and was told to end alone.
        (Phase.RETIRING, 50, 100),
    ],
)
def test_deadline_is_that_of_the_service_where_it_is_earlier(
    monkeypatch: pytest.MonkeyPatch, board: Board, phase: Phase, deadline: int, expected: int
) -> None:
    board.header.phase, board.header.deadline = phase, deadline
    generation = type("Seen", (), {"board": board})()
    monkeypatch.setattr(ancestors, "generation_of", lambda pid: generation)
    monkeypatch.setattr(ancestors, "line_of", lambda each: [generation])
    assert ancestors.deadline_of_the_stop(100) == expected
    monkeypatch.setattr(ancestors, "generation_of", lambda pid: None)
    assert ancestors.deadline_of_the_stop(100) == 100
