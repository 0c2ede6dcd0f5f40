"""A worker's shutdown: what belongs to a state is done once, whichever line of it a signal interrupts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zdd_web.board import Board, WorkerState
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.workers import exit_states, shutdown
from zdd_web.gunicorn.workers.exit_states import Event, State, StateMachine
from zdd_web.gunicorn.workers.shutdown import WorkerShutdown
from zdd_web.lifecycle import Phase
from zdd_web.process import Process
from zdd_web.settings import Settings
from zdd_web.system import clock
from zdd_web.waitgroup import all_groups

FILES = {shutdown.__file__, exit_states.__file__}


class Adapter:
    """Notes what it is asked for."""

    def __init__(self, winds_down: bool) -> None:
        self.calls: list[str] = []
        self.later_calls: list[Callable[[], object]] = []
        self.beats = 0
        self.left = 2
        self._winds_down = winds_down
        self.in_hook: Callable[[], None] = lambda: None

    def beat(self) -> None:
        self.beats += 1

    def over(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def leaving(self) -> Any:
        self.calls.append("leaving")
        return self if self._winds_down else None

    def end_loop(self) -> None:
        self.calls.append("end_loop")

    def call_stop_hooks(self) -> None:
        self.calls.append("hooks")
        self.in_hook()

    def wake(self) -> None:
        self.calls.append("wake")

    def later(self, seconds: float, function: Callable[..., object], *arguments: object) -> None:
        self.later_calls.append(lambda: function(*arguments))
        self.calls.append(f"later {seconds:g}" if function is os.kill else "later")

    def cut(self) -> None:
        self.calls.append("cut")

    def end_now(self, status: int) -> None:
        sys.exit(status)


class Worker(WorkerShutdown):
    """A shutdown with a board, an adapter and a socket of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, winds_down: bool = False, state: State = State.SERVING):
        monkeypatch.setattr(all_groups, "observer", None)
        self.board = Board.private()
        self.board.header.phase = Phase.SERVING
        slot = self.board.slot(0)
        slot.state = WorkerState.SERVING
        self.closed = 0
        listener = SimpleNamespace(close=self._count_close)
        cfg = SimpleNamespace(set=lambda *_: None, worker_int=lambda _: None, worker_abort=lambda _: None)
        cfg.settings = {"graceful_timeout": SimpleNamespace(value=30)}
        raw = SimpleNamespace(ppid=os.getppid(), sockets=[listener], notify=None, alive=True, cfg=cfg)
        worker = WorkerFacade(raw)
        self.machine = StateMachine(state)
        self.fake = Adapter(winds_down)
        self.process = Process(self.board, slot, Settings())
        end = SimpleNamespace(background_deadline=lambda own: clock.NEVER, give_up_background=lambda: None)
        super().__init__(worker, self.process, {}, self.machine, cast("Any", self.fake), cast("Any", end), lambda: True)

    def _count_close(self) -> None:
        self.closed += 1

    def term(self) -> None:
        self.handle_exit(signal.SIGTERM, None)

    @property
    def state(self) -> State:
        return self.machine.state


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The queue of the listeners, which is not empty at first."""
    queue = SimpleNamespace(empty=False)
    monkeypatch.setattr(shutdown.accept_queue, "is_empty", lambda sockets: queue.empty)
    return queue


def interrupted_at_each_line(
    make: Callable[[], Worker], action: Callable[[Worker], None], interrupt: Callable[[Worker], None]
) -> Iterator[Worker]:
    """Yield a worker for each line of the shutdown that `action(worker)` runs, with `interrupt(worker)` before it.

    As a signal handler would be called. The last one was not interrupted.
    """
    for line in range(1, 1000):
        left, worker = line, make()

        def trace(frame: Any, event: str, argument: Any, worker: Worker = worker) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in FILES:
                return None
            left -= event == "line"
            if left == 0 and event == "line":
                sys.settrace(None)
                interrupt(worker)
                return None
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            action(worker)
        finally:
            sys.settrace(before)
        yield worker
        if left > 0:
            return
    raise AssertionError("it never came to its end")


def has_left_once(worker: Worker) -> bool:
    calls = worker.fake.calls
    assert worker.state is State.ENDING_LOOP
    assert calls.count("leaving") == calls.count("end_loop") == 1, calls
    assert "hooks" in calls
    assert worker.process.going
    return True


@pytest.mark.parametrize("winds_down", [False, True])
def test_an_order_that_a_second_one_interrupts_at_any_line_is_carried_out_once(
    monkeypatch: pytest.MonkeyPatch, winds_down: bool
) -> None:
    def told() -> Worker:
        worker = Worker(monkeypatch, winds_down=winds_down)
        worker.slot.order.retire = 1
        return worker

    def leave(worker: Worker) -> None:
        worker.term()
        while worker.is_finishing:
            worker.notify()

    assert sum(map(has_left_once, interrupted_at_each_line(told, leave, Worker.term))) > 20


def test_a_queue_that_two_find_empty_at_any_line_is_left_once(
    monkeypatch: pytest.MonkeyPatch, queue: SimpleNamespace
) -> None:
    def emptying() -> Worker:
        queue.empty = False
        worker = Worker(monkeypatch)
        worker.board.header.phase = Phase.DRAINING
        worker.term()
        assert worker.state is State.EMPTYING
        queue.empty = True
        return worker

    assert sum(map(has_left_once, interrupted_at_each_line(emptying, Worker.notify, Worker.term))) > 10


def test_a_worker_that_empties_its_queues_looks_again_and_calls_hooks_at_once(
    monkeypatch: pytest.MonkeyPatch, queue: SimpleNamespace
) -> None:
    worker = Worker(monkeypatch)
    worker.board.header.phase = Phase.DRAINING
    worker.term()
    assert (worker.state, worker.is_finishing, worker.process.going) == (State.EMPTYING, True, False)
    assert worker.fake.calls == ["wake", "later", "hooks"]
    assert worker.worker.notify == worker.notify
    worker.follow_orders()
    worker.notify()
    assert (worker.state, worker.fake.calls, worker.fake.beats) == (State.EMPTYING, ["wake", "later", "hooks"], 1)
    # Sent again, in the middle of a request.
    worker.term()
    assert worker.fake.calls[3:] == ["wake"]
    queue.empty = True
    worker.term()
    assert (worker.state, worker.fake.calls[4:]) == (State.ENDING_LOOP, ["leaving", "end_loop", "hooks"])


def test_a_hook_that_takes_its_time_does_not_keep_a_second_sigterm_from_being_obeyed(
    monkeypatch: pytest.MonkeyPatch, queue: SimpleNamespace
) -> None:
    worker = Worker(monkeypatch)
    worker.board.header.phase = Phase.DRAINING

    def while_the_hook_runs() -> None:
        worker.fake.in_hook = lambda: None
        queue.empty = True
        worker.term()
        assert worker.state is State.ENDING_LOOP

    worker.fake.in_hook = while_the_hook_runs
    worker.term()
    assert worker.fake.calls == ["wake", "later", "hooks", "leaving", "end_loop", "hooks"]


def test_a_sigterm_without_an_order_waits_and_then_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now[0])
    worker = Worker(monkeypatch)
    worker.term()
    worker.term()
    assert (worker.state, worker.fake.calls) == (State.SIGNALLED, ["later 1"])
    now[0] += exit_states.PATIENCE
    worker.board.header.phase = Phase.LAME_DUCK
    worker.term()
    assert worker.state is State.SERVING
    # The one that came before is settled: this one waits a second of its own.
    worker.term()
    assert (worker.state, worker.fake.calls) == (State.SIGNALLED, ["later 1", "later 1"])
    worker.board.header.phase = Phase.SERVING
    now[0] += exit_states.PATIENCE
    worker.term()
    assert worker.state is State.ENDING_LOOP


def test_two_sigterms_at_once_wait_for_the_order_whichever_line_the_second_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1e6]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now[0])

    def signalled_long_ago() -> Worker:
        worker = Worker(monkeypatch)
        worker.term()
        now[0] += 1000
        worker.board.header.phase = Phase.LAME_DUCK
        worker.term()
        worker.board.header.phase = Phase.SERVING
        assert worker.state is State.SERVING
        return worker

    for worker in interrupted_at_each_line(signalled_long_ago, Worker.term, Worker.term):
        assert worker.state is State.SIGNALLED
        assert worker.fake.calls == ["later 1", "later 1"]
        assert worker._signalled_at == now[0]


def test_a_worker_at_the_gate_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, state=State.AT_GATE)
    with pytest.raises(SystemExit) as ended:
        worker.term()
    assert (ended.value.code, worker.state) == (0, State.EXITED)


@pytest.mark.parametrize("state", [State.BOOTING, State.SIGNALLED_IN_BOOT])
def test_a_worker_that_boots_and_is_told_to_leave_ends_at_once(monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    ended: list[int] = []
    monkeypatch.setattr(shutdown.os, "_exit", ended.append)
    worker = Worker(monkeypatch, state=state)
    worker.slot.order.retire = 1
    worker.term()
    assert (ended, worker.state, worker.fake.calls) == ([0], State.EXITED, [])


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(("name", "status"), [("handle_quit", 0), ("handle_abort", 1)])
def test_quit_and_abort_end_a_worker_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, state: State, name: str, status: int
) -> None:
    worker = Worker(monkeypatch, state=state)
    with pytest.raises(SystemExit) as ended:
        getattr(worker, name)(0, None)
    assert ended.value.code == status
    assert exit_states.STATUS.get(worker.state, status) == status
    assert not worker.worker.alive
    assert worker.slot.state == WorkerState.LEAVING


def test_a_stop_after_the_order_to_leave_brings_an_earlier_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch)
    worker.slot.order.retire, worker.slot.order.retire_deadline = 1, clock.after_ns(500)
    worker.term()
    assert worker.fake.calls.count("later") == 1
    worker.follow_orders()
    assert worker.fake.calls.count("later") == 1
    worker.board.header.deadline = clock.after_ns(100)
    worker.follow_orders()
    assert worker.fake.calls.count("later") == 2


@pytest.mark.parametrize("event", [Event.LOOP_OVER, Event.EXIT])
def test_nothing_is_given_up_at_the_deadline_once_the_loop_is_over(
    monkeypatch: pytest.MonkeyPatch, event: Event
) -> None:
    worker = Worker(monkeypatch)
    worker.slot.order.retire, worker.slot.order.retire_deadline = 1, clock.after_ns(500)
    worker.term()
    (at_the_deadline,) = worker.fake.later_calls
    worker.board.header.deadline = 1
    worker.move(event)
    at_the_deadline()
    assert "cut" not in worker.fake.calls
