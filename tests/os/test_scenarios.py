"""What a scenario concludes from a service's board, and the phases and connections that it reads."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.forks import spawn, status_of
from zdd_web.board import Board, Snapshot, WorkerState, WorkerView
from zdd_web.cli.rehearse import held_connections, scenarios
from zdd_web.cli.rehearse.phases import PhaseWatch
from zdd_web.cli.rehearse.scenarios import kill_worker, recycle, reload
from zdd_web.lifecycle import Phase
from zdd_web.system import clock, proc

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def worker(pid: int, state: WorkerState = WorkerState.SERVING, in_flight: int = 0, start: int = 1) -> WorkerView:
    return WorkerView(pid, start, 0, state, False, in_flight, 0, 0, "")


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    board = Board.private("scenario")
    yield board.snapshot()._replace(workers_wanted=2, workers=())
    board.close()


def course(snapshot: Snapshot, *states: list[WorkerView]) -> Any:
    """Return a course whose board has these workers, one state after the other, the last one for good."""
    left = [snapshot._replace(workers=tuple(each)) for each in states]
    signals: list[signal.Signals] = []

    def look() -> Snapshot:
        return left.pop(0) if len(left) > 1 else left[0]

    return SimpleNamespace(snapshot=look, signals=signals, generation=SimpleNamespace(signal=signals.append))


OLD, NEW = [worker(1), worker(2)], [worker(3), worker(4)]


@pytest.mark.parametrize("scenario", [reload, recycle])
@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ([[worker(1), worker(2), worker(3)], [worker(2), worker(3)], NEW], ""),
        ([OLD], "workers 1, 2; 2 of 2 workers serve"),
        ([[worker(2), worker(3), worker(4)]], "workers 2; 3 of 2 workers serve"),
        ([[worker(3), worker(4, WorkerState.BOOTING)]], "workers none; 1 of 2 workers serve"),
        # A pid that was given to another process is another worker.
        ([[worker(1, start=2), worker(3)]], ""),
    ],
)
def test_workers_are_replaced_when_none_of_the_old_is_left_and_enough_serve(
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[Any], scenarios.Found],
    then: list[list[WorkerView]],
    reason: str,
) -> None:
    monkeypatch.setattr(scenarios, "LOOK", 0.001)
    monkeypatch.setattr(scenarios, "REPLACED_WITHIN", 0.1 if reason else 20.0)
    played = course(snapshot, OLD, *then)
    found = scenario(played)
    assert found.reason.endswith(reason)
    assert bool(found.reason) == bool(reason)
    assert played.signals == ([signal.SIGHUP] if scenario is reload else [])


def test_the_worker_that_has_most_in_hand_is_killed_and_its_connections_are_excused(snapshot: Snapshot) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        ready, tell = os.pipe()

        def hold() -> None:
            client.close()
            os.write(tell, b"x")
            signal.pause()

        child = spawn(hold)
        os.read(ready, 1)
        accepted.close()
        for fd in (ready, tell):
            os.close(fd)
        victim = worker(child, in_flight=3, start=proc.start_time(child))
        played = course(snapshot, [worker(1), victim], [worker(1), worker(5)])
        found = kill_worker(played)
        client.close()
    assert status_of(child) == -signal.SIGKILL
    assert found.reason == ""
    assert found.excused == 1
    assert f"worker {child} held 1 connections" in found.detail


def test_nothing_is_killed_where_no_worker_serves(snapshot: Snapshot) -> None:
    assert (
        kill_worker(course(snapshot, [worker(1, WorkerState.BOOTING)])).reason
        == "no worker serves that could be killed"
    )


def test_connections_are_those_of_the_process_and_not_its_listeners() -> None:
    before = held_connections.held_by(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        assert held_connections.held_by(os.getpid()) == before + 1
        accepted, _ = listener.accept()
        with accepted:
            assert held_connections.held_by(os.getpid()) == before + 2
    assert held_connections.held_by(2**22 + 1) == 0


def test_phases_are_read_with_the_instants_that_the_board_has() -> None:
    board = Board.private("phases")
    header = board.header
    began = clock.now_ns()
    header.generation, header.started_at, header.ready_at = 3, began - 2_000_000_000, began - 1_000_000_000
    header.phase = Phase.SERVING
    generation: Any = SimpleNamespace(board=board, header=header)
    with PhaseWatch() as watch:
        watch.add(generation)
        header.phase_since, header.phase = began, Phase.RETIRING
        deadline = time.monotonic() + 20
        while len(watch.spans()) < 3 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        spans = watch.spans()
        header.phase_since, header.phase = began + 500_000_000, Phase.STOPPED
        ended = watch.spans()
    assert [(each.phase, each.generation) for each in spans] == [("booting", 3), ("serving", 3), ("retiring", 3)]
    assert spans[1].ended_at == spans[2].begun_at == began / 1e9
    assert ended[2].ended_at == pytest.approx(began / 1e9 + 0.5)
    assert len(ended) == 3
    board.close()
