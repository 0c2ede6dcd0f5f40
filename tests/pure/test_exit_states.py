"""A worker's way out is a table, asserted whole: every pair of a state and an event."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest

from docs.make_worker_diagram import worker_diagram
from zdd_web.errors import LifecycleError
from zdd_web.gunicorn.workers.exit_states import (
    ENDS,
    HAS_LEFT,
    LOOP_IS_OVER,
    OBEYS_ORDERS,
    PATIENCE,
    PROMPT,
    SIGNALLED,
    SIGTERM,
    STATUS,
    TABLE,
    Event,
    State,
    StateMachine,
    after,
    has_order,
    without_order,
)
from zdd_web.lifecycle import Phase

B, SB, G, S, W = State.BOOTING, State.SIGNALLED_IN_BOOT, State.AT_GATE, State.SERVING, State.SIGNALLED
E, D, L, F = State.EMPTYING, State.WINDING_DOWN, State.ENDING_LOOP, State.FINISHING
Q, A, X = State.QUITTING, State.ABORTING, State.EXITED

#: What follows upon each event from each state, in the order of `State`; None for a pair that is not known.
EXPECTED = {
    #                      B   SB  G  S  W  E  D  L  F  Q  A  X
    Event.ARRIVED:        (G,  G,  None, None, None, None, D, L, None, Q, A, None),
    Event.GATE_OPENED:    (None, None, S, None, None, None, None, None, None, Q, A, None),
    Event.TERM:           (SB, SB, X, W, W, E, D, L, F, Q, A, X),
    Event.ORDER_EXPECTED: (B,  B,  X, S, S, E, D, L, F, Q, A, X),
    Event.NO_ORDER:       (B,  D,  X, S, D, E, D, L, F, Q, A, X),
    Event.LEAVE:          (X,  X,  X, D, D, E, D, L, F, Q, A, X),
    Event.EMPTY_QUEUES:   (X,  X,  X, E, E, E, D, L, F, Q, A, X),
    Event.QUEUES_EMPTY:   (None, None, None, None, None, D, D, L, F, Q, A, X),
    Event.WOUND_DOWN:     (None, None, None, None, None, None, L, L, None, Q, A, None),
    Event.LOOP_OVER:      (None, None, F, F, F, F, F, F, None, Q, A, None),
    Event.QUIT:           (Q,  Q,  Q, Q, Q, Q, Q, Q, Q, Q, Q, X),
    Event.ABORT:          (A,  A,  A, A, A, A, A, A, A, A, A, X),
    Event.EXIT:           (X,  X,  X, X, X, X, X, X, X, X, X, X),
}  # fmt: skip
PAIRS = {(state, event): to for event, row in EXPECTED.items() for state, to in zip(State, row, strict=True)}
KNOWN = {pair: to for pair, to in PAIRS.items() if to is not None}


def test_the_table_is_what_this_test_says() -> None:
    assert {(state, event): to for state, events in TABLE.items() for event, to in events.items()} == KNOWN
    assert list(TABLE) == list(State)
    assert list(EXPECTED) == list(Event)


@pytest.mark.parametrize(("pair", "to"), list(PAIRS.items()))
def test_an_event_leads_to_its_state_or_raises_and_changes_nothing(pair: tuple[State, Event], to: State | None) -> None:
    state, event = pair
    machine, before = StateMachine(state), copy.deepcopy(TABLE)
    if to is not None:
        assert after(state, event) is to
        machine.move(event)
        assert machine.state is to
    else:
        with pytest.raises(LifecycleError) as caught:
            machine.move(event)
        name = event.name.lower()
        assert str(caught.value) == f"a worker that is {state.label} does not know the event {name} ({event.value})"
        assert machine.state is state
    assert before == TABLE


def reachable(start: State, events: tuple[Event, ...] = tuple(Event)) -> set[State]:
    found: set[State] = set()
    todo = [start]
    while todo:
        state = todo.pop()
        if state not in found:
            found.add(state)
            todo += [to for event, to in TABLE[state].items() if event in events]
    return found


def test_every_state_is_reached_and_every_one_comes_to_the_end() -> None:
    assert reachable(State.BOOTING) == set(State)
    assert all(State.EXITED in reachable(state) for state in State)
    assert reachable(State.EXITED) == {State.EXITED}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, [*SIGTERM, Event.QUIT, Event.ABORT])))
def test_a_signal_handler_never_raises(state: State, event: Event) -> None:
    # What it has seen may be out of date by the time of its transition: a second signal came in between.
    assert after(state, event) in State


@pytest.mark.parametrize("state", [State.EMPTYING, State.WINDING_DOWN])
def test_what_the_loop_has_found_it_may_say_after_any_signal(state: State) -> None:
    said = {State.EMPTYING: Event.QUEUES_EMPTY, State.WINDING_DOWN: Event.WOUND_DOWN}[state]
    for then in reachable(state, (*SIGTERM, Event.QUEUES_EMPTY)):
        if then is not State.EMPTYING:
            assert after(then, Event.QUEUES_EMPTY) in State
        assert after(then, said) in State


def test_a_worker_that_has_left_never_serves_again() -> None:
    for state in (State.EMPTYING, *HAS_LEFT, *STATUS, State.EXITED):
        assert not reachable(state) & OBEYS_ORDERS


def test_no_state_is_in_two_groups_that_exclude_each_other() -> None:
    assert OBEYS_ORDERS | {State.EMPTYING} | HAS_LEFT | set(STATUS) | {State.EXITED} == set(State)
    assert not OBEYS_ORDERS & (HAS_LEFT | set(STATUS) | {State.EMPTYING, State.EXITED})
    assert SIGNALLED < OBEYS_ORDERS
    assert {State.WINDING_DOWN} == PROMPT & HAS_LEFT
    assert {State.FINISHING} == LOOP_IS_OVER & HAS_LEFT
    assert set(ENDS) & set(SIGTERM) == set()


@pytest.mark.parametrize("phase", Phase)
def test_a_sigterm_is_an_order_where_the_slot_or_the_phase_says_so_or_the_master_is_gone(phase: Phase) -> None:
    leaves = phase in (Phase.DRAINING, Phase.RETIRING, Phase.STOPPED)
    assert has_order(phase, ordered=False, orphaned=False) is leaves
    assert has_order(phase, ordered=True, orphaned=False)
    assert has_order(phase, ordered=False, orphaned=True)


@pytest.mark.parametrize(
    ("state", "waited", "phase", "event"),
    [
        (State.SERVING, 0.0, Phase.SERVING, Event.TERM),
        # From an earlier signal, which an ORDER_EXPECTED has settled.
        (State.SERVING, 9.0, Phase.SERVING, Event.TERM),
        (State.SIGNALLED, PATIENCE / 2, Phase.SERVING, Event.TERM),
        (State.SIGNALLED, PATIENCE, Phase.SERVING, Event.NO_ORDER),
        (State.SIGNALLED, PATIENCE, Phase.LAME_DUCK, Event.ORDER_EXPECTED),
        (State.SIGNALLED_IN_BOOT, PATIENCE, Phase.BOOTING, Event.NO_ORDER),
        (State.AT_GATE, 9.0, Phase.BOOTING, Event.TERM),
    ],
)
def test_a_sigterm_without_an_order_waits_once(state: State, waited: float, phase: Phase, event: Event) -> None:
    assert without_order(state, waited, phase) is event


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "how-a-worker-ends.md"
    text = page.read_text()
    assert f"```mermaid\n{worker_diagram()}\n```" in text
    for name, description in [(each.label, each.value) for each in State] + [
        (each.name.lower(), each.value) for each in Event
    ]:
        assert f"| `{name}` | {description} |" in text
