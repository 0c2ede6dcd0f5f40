"""How a worker's process ends, after its loop or without one."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zdd_web import waitgroup
from zdd_web.board import Board
from zdd_web.gunicorn import process_exit
from zdd_web.gunicorn.workers.exit_states import Event, State, StateMachine
from zdd_web.gunicorn.workers.worker_end import WorkerEnd
from zdd_web.lifecycle import Phase
from zdd_web.process import Process
from zdd_web.settings import Settings
from zdd_web.system import clock
from zdd_web.waitgroup import all_groups


class Ended(Exception):
    """The process would have ended, with this status."""


def end(status: int) -> None:
    raise Ended(status)


class Worker:
    """What a `WorkerEnd` is made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: State = State.FINISHING, orphaned: bool = False) -> None:
        monkeypatch.setattr(all_groups, "observer", None)
        monkeypatch.setattr(process_exit, "end", end)
        monkeypatch.setattr(process_exit, "bound", lambda until, beat, status, interval: self.bounds.append(status))
        self.bounds: list[int] = []
        self.board = Board.private()
        self.slot = self.board.slot(0)
        self.machine = StateMachine(state)
        self.adapter = SimpleNamespace(
            has_cut=False, beat=lambda: None, interval=1.0, own_threads=set, frames=sys._current_frames
        )
        gunicorns: Any = SimpleNamespace(ppid=os.getppid() + orphaned, lasting_heartbeat=lambda: lambda: None)
        process = Process(self.board, self.slot, Settings())
        self.end = WorkerEnd(gunicorns, process, self.machine, cast("Any", self.adapter))


@pytest.mark.parametrize(("state", "status"), [(State.QUITTING, 0), (State.ABORTING, 1)])
def test_a_worker_that_ends_with_what_is_in_hand_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, state: State, status: int
) -> None:
    worker = Worker(monkeypatch, state)
    # It is what the signal asked for, whatever was cut.
    worker.adapter.has_cut = True
    with pytest.raises(Ended, match=str(status)):
        worker.end.exit()
    assert worker.machine.state is State.EXITED


def test_what_was_cut_or_given_up_is_in_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, abandoned = Worker(monkeypatch), Worker(monkeypatch)
    cut.adapter.has_cut = True
    abandoned.slot.abandoned = 2
    for worker in (cut, abandoned):
        with pytest.raises(Ended, match="1"):
            worker.end.exit()


def test_only_threads_that_were_waited_for_are_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waitgroup, "close_all", lambda: None)
    monkeypatch.setattr(waitgroup, "run_drained_hooks", lambda until, beat: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="consumer")
    thread.start()
    try:
        booting = Worker(monkeypatch, State.BOOTING)
        with pytest.raises(Ended, match="0"):
            booting.end.exit()
        # After the loop it had its time, and was logged.
        late = Worker(monkeypatch)
        late.board.header.phase, late.board.header.deadline = Phase.DRAINING, 1
        late.end.finish()
        with pytest.raises(Ended, match="0"):
            late.end.exit()
    finally:
        done.set()
        thread.join()
    well = Worker(monkeypatch)
    well.end.finish()
    well.end.exit()
    assert (well.bounds, well.machine.state) == ([0], State.EXITED)


@pytest.mark.parametrize(
    ("phase", "deadline", "retire_deadline", "orphaned", "background"),
    [
        (Phase.SERVING, 0, 0, False, 7),
        (Phase.SERVING, 0, 5, False, 5),
        (Phase.RETIRING, 0, 5, False, 5),
        (Phase.RETIRING, 0, 0, False, clock.NEVER),
        (Phase.RETIRING, 3, 5, False, 3),
        (Phase.DRAINING, 3, 5, False, 3),
        # No process is left that would kill it.
        (Phase.DRAINING, 3, 5, True, 7),
    ],
)
def test_background_work_has_until_the_deadline_of_the_stop_or_its_own(
    monkeypatch: pytest.MonkeyPatch, phase: Phase, deadline: int, retire_deadline: int, orphaned: bool, background: int
) -> None:
    worker = Worker(monkeypatch, orphaned=orphaned)
    worker.board.header.phase, worker.board.header.deadline = phase, deadline
    worker.slot.order.retire_deadline = retire_deadline
    assert worker.end.background_deadline(7) == background


@pytest.mark.parametrize("event", [Event.QUIT, Event.ABORT])
def test_a_second_exit_does_not_change_how_it_ended(monkeypatch: pytest.MonkeyPatch, event: Event) -> None:
    worker = Worker(monkeypatch)
    worker.machine.move(Event.EXIT)
    worker.machine.move(event)
    assert worker.machine.state is State.EXITED


def test_a_worker_does_not_end_before_what_was_given_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # The thread that watches the deadline gives it up while the loop ends.
    worker = Worker(monkeypatch)
    begun, named = threading.Event(), threading.Event()

    def abandon(*arguments: object) -> None:
        begun.set()
        named.wait(30)

    monkeypatch.setattr(waitgroup, "abandon", abandon)
    monkeypatch.setattr(waitgroup, "close_all", lambda: None)
    order: list[str] = []
    monkeypatch.setattr(waitgroup, "run_drained_hooks", lambda until, beat: order.append("drained"))
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)

    def beat() -> None:
        if worker.end._given_up.locked() and not named.is_set():
            order.append("named")
            named.set()

    worker.adapter.beat = beat
    watcher = threading.Thread(target=worker.end.give_up_background)
    watcher.start()
    assert begun.wait(30)
    worker.end.finish()
    watcher.join()
    assert order == ["named", "drained"]
