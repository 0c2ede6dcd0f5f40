"""What `upgrade` and `drain` print while a master is followed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from zdd_web.board import Board, Snapshot, TaskView, UpgradeState, WorkerState, WorkerView
from zdd_web.cli import control, progress
from zdd_web.cli.progress import StopProgress, Ticker, UpgradeProgress, booting, committing, errors_of, limit, oldest
from zdd_web.lifecycle import Phase
from zdd_web.service import Generation
from zdd_web.system import clock


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.private("shop")
    yield board
    board.close()


def worker(pid: int, state: WorkerState, error: str = "") -> WorkerView:
    return WorkerView(
        pid=pid, start=1, age=1, state=state, retiring=False, in_flight=1, requests=0, tasks=2, error=error
    )


def seen(board: Board, *workers: WorkerView, **changes: object) -> Snapshot:
    return board.snapshot()._replace(workers=workers, workers_wanted=8, **changes)  # type: ignore[arg-type]


def test_boot_names_how_many_are_ready_and_what_the_others_wait_for(board: Board) -> None:
    ready = [worker(1, WorkerState.READY), worker(2, WorkerState.READY)]
    assert booting(None) == "the new master starts"
    assert booting(seen(board)) == "worker 0 of 8 is ready"
    waits = [worker(3, WorkerState.BOOTING, "warm-up: GET /items"), worker(4, WorkerState.BOOTING, "check 'db'")]
    found = seen(board, *ready, *waits)
    assert booting(found) == "worker 2 of 8 is ready; waiting for: check 'db'; warm-up: GET /items"
    many = [worker(pid, WorkerState.BOOTING, f"step {pid}") for pid in range(5)]
    assert booting(seen(board, *many)) == "worker 0 of 8 is ready; waiting for: step 0; step 1 ..."
    assert "\x1b" not in booting(seen(board, worker(3, WorkerState.BOOTING, "\x1b[2J")))


def test_commit_window_names_what_both_have_in_hand(board: Board) -> None:
    old = seen(board, worker(1, WorkerState.SERVING), phase=Phase.SERVING)
    new = seen(board, worker(2, WorkerState.SERVING), worker(3, WorkerState.SERVING))
    assert committing(new, old)[:2] == (
        "commit window",
        "; the new generation has 2 requests and 4 background tasks in hand, "
        "the old one 1 request and 2 background tasks in hand",
    )
    assert committing(None, old)[1].startswith(": the new generation is not seen, the old one 1 request and")
    retiring = old._replace(phase=Phase.RETIRING)
    assert committing(new, retiring)[:2] == (
        "the old generation stops accepting",
        ": 1 request and 2 background tasks in hand",
    )


def test_watch_names_the_time_that_is_left_and_the_errors_so_far(board: Board) -> None:
    old = seen(board, worker(1, WorkerState.SERVING), phase=Phase.SERVING, upgrade_since=clock.after_ns(-11.5))
    new = seen(board, worker(2, WorkerState.SERVING))
    text, more, *_ = committing(new, old, 60.0)
    assert (text, more.partition(";")[0]) == ("watched", ", 48 s left")
    # It is over, and what was watched has not been handed anything yet.
    assert committing(new, old, 10.0)[0] == "commit window"
    slot = board.slot(0)
    slot.order.taken, slot.requests, slot.server_errors = 1, 40, 4
    board.header.requests_gone, board.header.server_errors_gone = 60, 1
    assert errors_of(board) == "; the new one has answered 100 requests, 5 with status 500 or above"


def test_canary_is_shown_with_the_number_that_it_is_to_have(board: Board) -> None:
    old = seen(board, worker(1, WorkerState.SERVING), phase=Phase.SERVING)
    few = seen(board, worker(2, WorkerState.BOOTING))._replace(workers_wanted=1, workers_full=8)
    assert booting(few) == "worker 0 of 1 is ready (canary, of 8 workers)"
    text, more, *_ = committing(few, old)
    assert text == "watched as a canary of 1 of 8 workers"
    assert more.startswith("; the new generation has 1 request and")
    grows = seen(board, worker(2, WorkerState.SERVING), worker(3, WorkerState.BOOTING), workers_full=8)
    assert committing(grows, old)[0] == "it grows: 1 of 8 workers serve"


def test_stop_names_the_tasks_that_it_waits_for(board: Board) -> None:
    began = clock.now_ns() - 75_000_000_000
    busy = worker(1, WorkerState.LEAVING)._replace(oldest_tasks=(TaskView(began, "report \x1b[2J"),))
    found = seen(board, busy, busy._replace(tasks=0, oldest_tasks=()))
    assert oldest(found) == " (report \\x1b[2J for 1 min 15 s ...)"
    assert oldest(seen(board, busy._replace(tasks=1))) == " (report \\x1b[2J for 1 min 15 s)"
    assert oldest(seen(board, worker(1, WorkerState.LEAVING))) == ""


def test_a_pipe_gets_one_line_for_each_step(
    board: Board, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Ticker() as ticker:
        shown = UpgradeProgress(Generation(os.getpid(), board), ticker)
        for state in (UpgradeState.BOOTING, UpgradeState.COMMITTING, UpgradeState.DONE):
            for _ in range(3):
                shown(seen(board, upgrade_state=state, phase=Phase.SERVING, tick_at=clock.now_ns()))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "  the new generation boots",
        "  the new master starts",
        "  it is ready and answers; waiting for the commit window to end",
        "  it is active; the old one accepts nothing more",
    ]


def test_a_master_that_hangs_in_an_upgrade_is_named(
    board: Board, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Ticker() as ticker:
        UpgradeProgress(Generation(os.getpid(), board), ticker)(
            seen(board, upgrade_state=UpgradeState.BOOTING, phase=Phase.SERVING, tick_at=clock.after_ns(-20))
        )
    assert "  the master hangs: its main loop has not run for 20 s" in capsys.readouterr().out


def test_phases_of_a_stop_are_lines_and_the_deadline_is_for_a_terminal(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ticker() as ticker:
        shown = StopProgress(ticker)
        for phase in (Phase.LAME_DUCK, Phase.DRAINING, Phase.DRAINING):
            shown(seen(board, phase=phase, deadline=clock.after_ns(100)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["  lame_duck", "  draining"]
    assert limit(seen(board, deadline=clock.after_ns(100.5))) == "; cut off in 1 min 40 s"
    assert (limit(seen(board)), limit(seen(board, deadline=clock.after_ns(-1)))) == ("", "")


def test_interrupts_are_counted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with control.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 30
        while interrupts.count < 2 and time.monotonic() < until:
            pass
        assert interrupts.count == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
