"""Workers of a rejected generation, whose master was killed: they finish, or are killed when they cannot."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.forks import spawn, status_of
from zdd_web.board import Board, Heartbeat, WorkerState
from zdd_web.gunicorn.upgrade import heartbeats
from zdd_web.gunicorn.upgrade.orphaned_workers import Orphans
from zdd_web.system import clock, proc

#: Real children are seen under /proc.
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def worker() -> Iterator[tuple[Board, int]]:
    """A worker that has served, and waits."""
    pid = spawn(signal.pause)
    board = Board.create("orphans", slots=2)
    slot = board.claim(1)
    slot.order.pid, slot.order.start, slot.state = pid, proc.start_time(pid), WorkerState.SERVING
    slot.heartbeat, slot.beat_at = Heartbeat.BETWEEN_REQUESTS, clock.now_ns()
    board.header.worker_timeout = 30 * 10**9
    del slot  # which keeps the mapping
    yield board, pid
    proc.kill(pid, proc.start_time(pid), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def test_frozen_worker_is_killed(worker: tuple[Board, int], monkeypatch: pytest.MonkeyPatch) -> None:
    board, pid = worker
    orphans = Orphans(board, proc.kill, clock.after_ns(3600))
    assert orphans.follow() is False
    assert proc.state(pid) in "RS"
    monkeypatch.setattr(heartbeats, "FROZEN_AFTER", 0.0)
    assert orphans.follow() is False
    assert status_of(pid) == -signal.SIGKILL
    assert orphans.follow() is True


def test_worker_with_a_request_in_hand_is_left_alone(
    worker: tuple[Board, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, pid = worker
    board.slot(0).in_flight = 1
    monkeypatch.setattr(heartbeats, "FROZEN_AFTER", 0.0)
    orphans = Orphans(board, proc.kill, clock.after_ns(3600))
    orphans.follow()
    orphans.follow()
    assert proc.state(pid) in "RS"
    # The stop has waited for it until its deadline, or spares no request.
    orphans.end()
    assert status_of(pid) == -signal.SIGKILL
    orphans.forget()


def test_process_that_was_no_worker_at_the_end_of_the_master_is_left_alone(
    worker: tuple[Board, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, pid = worker
    monkeypatch.setattr(heartbeats, "FROZEN_AFTER", 0.0)
    other, order = spawn(lambda: None), board.order(0)
    order.pid, order.start = other, proc.start_time(other)
    orphans = Orphans(board, proc.kill, clock.after_ns(3600))
    order.pid, order.start = pid, proc.start_time(pid)
    del order  # which keeps the mapping
    orphans.follow()
    orphans.follow()
    assert proc.state(pid) in "RS"
    assert status_of(other) == 0
    assert orphans.follow() is True


def test_no_worker_outlives_the_last_master(worker: tuple[Board, int]) -> None:
    board, pid = worker
    orphans = Orphans(board, proc.kill, clock.after_ns(3600))
    # As one that was frozen a moment ago, which no heartbeat tells yet.
    os.kill(pid, signal.SIGSTOP)
    orphans.end()
    assert status_of(pid) == -signal.SIGKILL
    orphans.forget()
