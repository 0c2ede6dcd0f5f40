"""How a worker process comes to its end, as a table: what follows what.

All that decides which state comes next lives in this file, as data, and so does the meaning of SIGTERM. It touches
nothing: effects are in `shutdown`, for as long as the worker's loop runs, and in `worker_end`.

A signal handler runs between any two lines of the worker, also in the middle of a transition. So a transition is one
look-up and one atomic step, without a lock, and what belongs to the new state is done once, by whatever comes to it
first: the handler or the loop.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from zdd_web.errors import LifecycleError
from zdd_web.lifecycle import WORKERS_LEAVE, Phase

#: How long a worker that receives SIGTERM without an order waits for the order, seconds.
PATIENCE = 1.0


class State(enum.Enum):
    """Where a worker stands between its fork and its exit."""

    BOOTING = "it loads the app and warms up"
    SIGNALLED_IN_BOOT = "it goes on booting, and waits for an order of its master after a SIGTERM"
    AT_GATE = "it is ready, and waits for the gate to open"
    SERVING = "it accepts connections"
    SIGNALLED = "it goes on serving, and waits for an order of its master after a SIGTERM"
    EMPTYING = "it accepts the connections that still wait in the queues of its listeners"
    WINDING_DOWN = "it accepts nothing more, and its loop finishes what it has in hand"
    ENDING_LOOP = "its loop has been told to end"
    FINISHING = "its loop is over: it waits for background work and for threads of the app"
    QUITTING = "it ends with what is in hand, with status 0"
    ABORTING = "it ends with what is in hand, with status 1"
    EXITED = "only Python's own exit is left"

    @property
    def label(self) -> str:
        """The state's name as the docs spell it.

        >>> State.AT_GATE.label
        'at_gate'
        """
        return self.name.lower()


class Event(enum.Enum):
    """What may happen to a worker on its way out, and before."""

    ARRIVED = "the app is loaded, warm, and its checks pass"
    GATE_OPENED = "the generation serves"
    TERM = "SIGTERM without an order, or a repeated one"
    ORDER_EXPECTED = "no order has come within PATIENCE, but one comes at the end of the lame duck"
    NO_ORDER = "no order has come within PATIENCE"
    LEAVE = "the master has ordered the worker to leave, or has died"
    EMPTY_QUEUES = "the same, while no other generation answers what the kernel has accepted"
    QUEUES_EMPTY = "no connection waits any more, or the deadline has passed"
    WOUND_DOWN = "the loop has nothing left to finish"
    LOOP_OVER = "the loop has returned"
    QUIT = "SIGQUIT or SIGINT"
    ABORT = "SIGABRT: the master missed the heartbeat"
    EXIT = "all worker_exit hooks have run"


#: What a SIGTERM may turn out to mean. Every state knows all of these: a handler that raised would end the worker, and
#: another handler may run between what this one has read and its transition.
SIGTERM = (Event.TERM, Event.ORDER_EXPECTED, Event.NO_ORDER, Event.LEAVE, Event.EMPTY_QUEUES)

#: What ends a worker wherever it stands.
ENDS = {Event.QUIT: State.QUITTING, Event.ABORT: State.ABORTING, Event.EXIT: State.EXITED}


def _all(events: Iterable[Event], to: State) -> dict[Event, State]:
    return dict.fromkeys(events, to)


TABLE: dict[State, dict[Event, State]] = {
    # A worker that is to leave before it has passed the gate has accepted nothing.
    State.BOOTING: {
        Event.ARRIVED: State.AT_GATE,
        Event.TERM: State.SIGNALLED_IN_BOOT,
        **_all((Event.LEAVE, Event.EMPTY_QUEUES), State.EXITED),
        **_all((Event.ORDER_EXPECTED, Event.NO_ORDER), State.BOOTING),
        **ENDS,
    },
    State.SIGNALLED_IN_BOOT: {
        Event.ARRIVED: State.AT_GATE,
        Event.TERM: State.SIGNALLED_IN_BOOT,
        Event.ORDER_EXPECTED: State.BOOTING,
        Event.NO_ORDER: State.WINDING_DOWN,
        **_all((Event.LEAVE, Event.EMPTY_QUEUES), State.EXITED),
        **ENDS,
    },
    State.AT_GATE: {
        Event.GATE_OPENED: State.SERVING,
        **_all(SIGTERM, State.EXITED),
        Event.LOOP_OVER: State.FINISHING,
        **ENDS,
    },
    State.SERVING: {
        Event.TERM: State.SIGNALLED,
        Event.LEAVE: State.WINDING_DOWN,
        Event.EMPTY_QUEUES: State.EMPTYING,
        **_all((Event.ORDER_EXPECTED, Event.NO_ORDER), State.SERVING),
        Event.LOOP_OVER: State.FINISHING,
        **ENDS,
    },
    State.SIGNALLED: {
        Event.TERM: State.SIGNALLED,
        Event.ORDER_EXPECTED: State.SERVING,
        **_all((Event.NO_ORDER, Event.LEAVE), State.WINDING_DOWN),
        Event.EMPTY_QUEUES: State.EMPTYING,
        Event.LOOP_OVER: State.FINISHING,
        **ENDS,
    },
    State.EMPTYING: {
        **_all(SIGTERM, State.EMPTYING),
        Event.QUEUES_EMPTY: State.WINDING_DOWN,
        Event.LOOP_OVER: State.FINISHING,
        **ENDS,
    },
    # A worker that leaves without an order while it boots arrives at the gate in one of these.
    State.WINDING_DOWN: {
        **_all((*SIGTERM, Event.QUEUES_EMPTY, Event.ARRIVED), State.WINDING_DOWN),
        Event.WOUND_DOWN: State.ENDING_LOOP,
        Event.LOOP_OVER: State.FINISHING,
        **ENDS,
    },
    State.ENDING_LOOP: {
        **_all((*SIGTERM, Event.QUEUES_EMPTY, Event.ARRIVED, Event.WOUND_DOWN), State.ENDING_LOOP),
        Event.LOOP_OVER: State.FINISHING,
        **ENDS,
    },
    State.FINISHING: {**_all((*SIGTERM, Event.QUEUES_EMPTY), State.FINISHING), **ENDS},
    # The handlers raise SystemExit, which code of the app may catch. The worker then runs on until its loop ends.
    State.QUITTING: {**_all(Event, State.QUITTING), **ENDS},
    State.ABORTING: {**_all(Event, State.ABORTING), **ENDS},
    State.EXITED: _all((*SIGTERM, Event.QUEUES_EMPTY, *ENDS), State.EXITED),
}

#: It waits for its master's order.
SIGNALLED = frozenset({State.SIGNALLED_IN_BOOT, State.SIGNALLED})

#: In these a SIGTERM may be an order; in the others nothing is left to be decided.
OBEYS_ORDERS = frozenset({State.BOOTING, State.AT_GATE, State.SERVING}) | SIGNALLED

#: It accepts nothing more and is bound by the deadline.
HAS_LEFT = frozenset({State.WINDING_DOWN, State.ENDING_LOOP, State.FINISHING})

#: The next turn of its loop may bring it to its next state.
PROMPT = frozenset({State.EMPTYING, State.WINDING_DOWN})

#: The loop has ended as it should.
LOOP_IS_OVER = frozenset({State.FINISHING, State.EXITED})

#: The exit status of a worker that ends with what is in hand.
STATUS = {State.QUITTING: 0, State.ABORTING: 1}


def after(state: State, event: Event) -> State:
    """Return the state that follows `state` upon `event`.

    Raises `LifecycleError` for a pair that the table does not know.

    >>> after(State.SERVING, Event.LEAVE).label
    'winding_down'
    """
    try:
        return TABLE[state][event]
    except KeyError:
        raise LifecycleError(
            f"a worker that is {state.label} does not know the event {event.name.lower()} ({event.value})"
        ) from None


class StateMachine:
    """Where one worker stands; may be moved by a signal handler that interrupts another move.

    >>> machine = StateMachine()
    >>> machine.move(Event.ARRIVED)
    >>> machine.state.label
    'at_gate'
    """

    def __init__(self, state: State = State.BOOTING) -> None:
        #: All states in their order. Each stands in a tuple of its own, by which a move recognises its own.
        self._steps = {0: (state,)}

    @property
    def state(self) -> State:
        """The state of this moment."""
        return self._steps[len(self._steps) - 1][0]

    def move(self, event: Event) -> None:
        """Make a transition. Raises `LifecycleError` for an event that the state does not know, and stays there."""
        while True:
            step = len(self._steps)
            before = self._steps[step - 1][0]
            then = (after(before, event),)
            # Only one of two moves can take a step: setdefault() is one call in C. The other, which has interrupted
            # this one or was interrupted, looks up what its event means in the new state.
            if then[0] is before or self._steps.setdefault(step, then) is then:
                return

    @property
    def has_left(self) -> bool:
        """Whether the worker accepts nothing more, and its loop or its background work comes to an end."""
        return self.state in HAS_LEFT

    @property
    def loop_is_over(self) -> bool:
        """Whether the loop has ended as it should."""
        return self.state in LOOP_IS_OVER


def has_order(phase: Phase, *, ordered: bool, orphaned: bool) -> bool:
    """Tell whether a worker that receives SIGTERM is to leave at once.

    It is if the master has `ordered` it to on its slot, if the worker is `orphaned`, and in a phase in which all
    workers leave: the order is on its way then. Any other SIGTERM is not from the master: systemd
    (`KillMode=control-group`) and people signal whole groups of processes.

    >>> has_order(Phase.SERVING, ordered=False, orphaned=False)
    False
    >>> has_order(Phase.RETIRING, ordered=False, orphaned=False)
    True
    """
    return ordered or orphaned or phase in WORKERS_LEAVE


def without_order(state: State, waited: float, phase: Phase) -> Event:
    """Return what a SIGTERM means that no order stands behind, `waited` seconds after the first one.

    >>> without_order(State.SERVING, 0.0, Phase.SERVING).name, without_order(State.SIGNALLED, 1.0, Phase.SERVING).name
    ('TERM', 'NO_ORDER')
    """
    if state not in SIGNALLED or waited < PATIENCE:
        return Event.TERM
    return Event.ORDER_EXPECTED if phase is Phase.LAME_DUCK else Event.NO_ORDER
