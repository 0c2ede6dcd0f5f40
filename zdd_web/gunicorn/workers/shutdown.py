"""How a worker's loop comes to its end: signals, orders, waiting connections, and the deadline.

Not every SIGTERM is an order. The master writes `retire` into the slot before it sends one, so a worker that finds
`retire` set leaves at once, as it does when its generation drains or retires and when its master is gone. Any other
SIGTERM was sent to a whole group of processes (systemd's KillMode=control-group) or by a person: the worker waits a
second for the order, and without one leaves alone, unless the generation is in its lame duck.

`exit_states` decides what follows what. Here is what is done as a state is entered, once for each state. The signal
handler does it itself: the loop of a sync worker takes no turn before its request is finished, but its listeners must
be closed and `on_stop` called at once. gevent runs the handlers in greenlets, asyncio in callbacks of its loop. A
handler that interrupts the actions of a state makes its transition, and leaves the actions that follow from it to the
code that it has interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from zdd_web.board import ListenerRecord, WorkerState
from zdd_web.board.admission import SHUT, Admission
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.workers.exit_states import (
    OBEYS_ORDERS,
    PATIENCE,
    PROMPT,
    Event,
    State,
    StateMachine,
    has_order,
    without_order,
)
from zdd_web.gunicorn.workers.leaving import Leaving
from zdd_web.gunicorn.workers.worker_adapter import WorkerAdapter
from zdd_web.gunicorn.workers.worker_end import WorkerEnd
from zdd_web.lifecycle import Phase
from zdd_web.listeners import accept_queue
from zdd_web.process import Process
from zdd_web.system import clock

#: How long handshakes may take that were under way as the door was closed, seconds: a long round trip.
SETTLE = 0.25

#: Where the door cannot be closed the queue may never be found empty under load, seconds.
NARROW_AT_MOST = 2.0

#: With no deadline, a drain that gunicorn itself bounds (`graceful_timeout`) gets a day.
NO_LIMIT = 86_400

#: The app's `on_stop` functions are called once one of these is entered.
CALLS_STOP_HOOKS = (State.EMPTYING, State.WINDING_DOWN)


class WorkerShutdown:
    """Ends the loop of one worker. `listeners` maps each descriptor to the index of the listener on the board."""

    def __init__(
        self,
        worker: WorkerFacade,
        process: Process,
        listeners: dict[int, int],
        machine: StateMachine,
        adapter: WorkerAdapter,
        end: WorkerEnd,
        is_exchange_empty: Callable[[], bool],
    ) -> None:
        """`is_exchange_empty()` tells whether no kept connection waits there for this worker."""
        assert process.slot is not None
        self.worker, self.slot, self.pid = worker, process.slot, os.getpid()
        self._process, self._board, self._listeners = process, process.board, listeners
        self._machine, self._adapter, self._end = machine, adapter, end
        self._is_exchange_empty = is_exchange_empty
        #: The heartbeat of a worker that serves.
        self.turn: Callable[[], None] = adapter.beat
        #: The state whose actions were begun last.
        self._entered = machine.state
        self._entering = threading.Lock()
        self._signalled_at: float | None = None
        self._wind_down: Leaving | None = None
        self._watched_deadline = clock.NEVER
        self._on_entry: dict[State, Callable[[], None]] = {
            State.BOOTING: self._forget_signal,
            State.SERVING: self._forget_signal,
            State.SIGNALLED_IN_BOOT: self._wait_for_order,
            State.SIGNALLED: self._wait_for_order,
            State.EMPTYING: self._empty_queues,
            State.WINDING_DOWN: self._begin_to_wind_down,
            State.ENDING_LOOP: self._end_loop,
        }

    # -- states

    def move(self, event: Event) -> None:
        """Make a transition and run the actions of the new state. Raises `LifecycleError` for an unknown event."""
        self._machine.move(event)
        calls_hooks = False
        # Checked again after the release: a handler that ran in between could not take the lock.
        while self._entered is not self._machine.state and self._entering.acquire(blocking=False):
            try:
                while self._entered is not (state := self._machine.state):
                    self._entered = state
                    if state in self._on_entry:
                        self._on_entry[state]()
                    calls_hooks = calls_hooks or state in CALLS_STOP_HOOKS
            finally:
                self._entering.release()
        if calls_hooks:
            # Without the lock: the app's hooks may take long, and a second SIGTERM is to be obeyed meanwhile.
            self._adapter.call_stop_hooks()

    @property
    def is_finishing(self) -> bool:
        """Whether the next turn of the loop may bring this worker further on its way out."""
        return self._machine.state in PROMPT

    @property
    def loop_is_over(self) -> bool:
        """Whether the loop has ended as it should."""
        return self._machine.loop_is_over

    # -- signals and orders

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM."""
        before = self._machine.state
        self.move(self._meaning_of_sigterm(before))
        state = self._machine.state
        if state is State.EXITED:
            self._exit_before_serving(before)
        elif state is State.EMPTYING and before is State.EMPTYING:
            # It sleeps if another worker has accepted the last connection.
            self._adapter.wake()
        elif self._machine.has_left:
            # A stop that began after the order to leave has brought a deadline.
            self.watch_deadline()

    def _meaning_of_sigterm(self, state: State) -> Event:
        if state is State.EMPTYING:
            # A repeated signal: a sync worker in the middle of a request holds a queue in which nothing waits.
            return Event.QUEUES_EMPTY if self._queues_are_empty() else Event.TERM
        if state not in OBEYS_ORDERS:
            return Event.TERM
        phase = Phase(self._board.header.phase)
        if has_order(phase, ordered=bool(self.slot.retire), orphaned=os.getppid() != self.worker.ppid):
            return Event.EMPTY_QUEUES if self._alone_answers_queues(phase) else Event.LEAVE
        waited = 0.0 if self._signalled_at is None else time.monotonic() - self._signalled_at
        return without_order(state, waited, phase)

    def _alone_answers_queues(self, phase: Phase) -> bool:
        """Tell whether no other process is going to accept what the kernel has accepted for this generation."""
        header = self._board.header
        if phase is Phase.DRAINING and not header.successor_pid:
            return True
        return bool(header.blocked_since) and any(
            header.listener(index).door in SHUT for index in self._listeners.values()
        )

    def _exit_before_serving(self, before: State) -> None:
        if before is State.AT_GATE:
            sys.exit(0)
        if before in (State.BOOTING, State.SIGNALLED_IN_BOOT):
            # It has accepted nothing yet, and code of the app may hang.
            os._exit(0)

    def follow_orders(self) -> None:
        """Follow the order on the board, between two turns of the loop: SIGTERM may not have reached this worker."""
        if self._machine.state is not State.EMPTYING:
            self.handle_exit(signal.SIGTERM, None)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGQUIT, SIGINT: end now, with what is in hand."""
        self.note_leaving()
        self._end_now(Event.QUIT, self.worker.cfg.worker_int, 0)

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        """SIGABRT: the master missed this worker's heartbeat (`timeout`)."""
        # A worker that has not served yet has failed to boot, which the master sees by its state.
        if self.slot.state == WorkerState.SERVING:
            self.note_leaving()
        self._end_now(Event.ABORT, self.worker.cfg.worker_abort, 1)

    def _end_now(self, event: Event, hook: Callable[[object], None], status: int) -> None:
        # Not gunicorn's own for gthread: it takes the pool's lock inside a signal handler
        # (test_gthread_ends_its_pool_in_a_signal_handler), and Python joins the pool's threads at exit.
        self._machine.move(event)
        self.worker.end_loop()
        self.worker.cfg.set("graceful_timeout", 0)
        hook(self.worker.raw)
        self._adapter.end_now(status)

    def wake(self) -> None:
        """Make the loop take a turn now."""
        self._adapter.wake()

    # -- turns of the loop

    def notify(self) -> None:
        """Send the heartbeat, then see whether a leaving worker has emptied its queues or has wound down."""
        self.turn()
        if self._machine.state is State.EMPTYING and self._queues_are_empty():
            self.move(Event.QUEUES_EMPTY)
        if self._machine.state is State.WINDING_DOWN and self._wind_down is not None:
            over = self._wind_down.over()
            self.accepts_no_more()
            if over:
                self.move(Event.WOUND_DOWN)

    def _queues_are_empty(self) -> bool:
        header = self._board.header
        if clock.passed(header.deadline):
            return True
        if not self._is_exchange_empty():
            return False
        if not header.blocked_since:
            return accept_queue.is_empty(self.worker.sockets)
        return all(_is_emptied(fd, header.listener(index)) for fd, index in self._listeners.items())

    # -- what is done as a state is entered

    def _forget_signal(self) -> None:
        self._signalled_at = None

    def _wait_for_order(self) -> None:
        self._signalled_at = time.monotonic()
        self._adapter.later(PATIENCE, os.kill, os.getpid(), signal.SIGTERM)

    def _empty_queues(self) -> None:
        self.worker.replace("notify", self.notify)
        self._adapter.wake()
        self._adapter.later(SETTLE, self._adapter.wake)

    def _begin_to_wind_down(self) -> None:
        self._process.going = True
        self._wind_down = self._adapter.leaving()
        if self._wind_down is not None:
            self.worker.replace("notify", self.notify)
        else:
            self._machine.move(Event.WOUND_DOWN)

    def _end_loop(self) -> None:
        # What is left of the deadline, and not `graceful_timeout`.
        left = clock.remaining(self._process.deadline_ns)
        self.worker.set_graceful_timeout(NO_LIMIT if left is None else left)
        self.watch_deadline()
        self._adapter.end_loop()

    def accepts_no_more(self) -> None:
        """Mark this worker as leaving, and close its listeners: a queue that any process holds open refuses nothing."""
        self.note_leaving()
        for listener in self.worker.sockets:
            listener.close()

    def note_leaving(self) -> None:
        """Mark this worker as leaving on the board: the master may replace it, and an upgrade may be complete."""
        if self.slot.state != WorkerState.LEAVING:
            self._process.set_state(WorkerState.LEAVING)

    # -- the deadline

    def watch_deadline(self) -> None:
        """Have what is in hand named at the deadline, in a worker that may be in the middle of a request."""
        deadline = self._process.deadline_ns
        left = clock.remaining(deadline)
        # A stop brings an earlier one than a retirement had.
        if left is not None and (not self._watched_deadline or deadline < self._watched_deadline):
            self._watched_deadline = deadline
            self._adapter.later(left + 0.02, self._at_the_deadline)

    def _at_the_deadline(self) -> None:
        # In a thread: the loop is still in a request, and the background work beside it must be logged before the
        # master kills this process.
        if self._machine.loop_is_over or os.getpid() != self.pid:
            return
        if not clock.passed(self._end.background_deadline(clock.now_ns())):
            self._watched_deadline = clock.NEVER
            self.watch_deadline()
            return
        self._adapter.cut()
        self._end.give_up_background()


def _is_emptied(fd: int, listener: ListenerRecord) -> bool:
    """Tell whether no connection waits in a listener's queue, and none is on its way into it."""
    door, since = listener.door, clock.since(listener.blocked_since)
    if door not in SHUT or (door == Admission.LIMITED and since >= NARROW_AT_MOST):
        return True
    # With the door closed, those whose handshake was under way are still to come.
    if since < SETTLE or (door == Admission.STEERED and not listener.settled):
        return False
    return accept_queue.is_empty([fd])
