"""The tables of an upgrade's two sides, asserted whole: every pair of a state and an event."""

from __future__ import annotations

import copy
import enum
import itertools
from typing import Any

import pytest

from zdd_web.board import UpgradeState
from zdd_web.errors import LifecycleError
from zdd_web.gunicorn.upgrade.states import (
    BEFORE_GO,
    HANDED_OVER,
    LINK,
    OUTCOME,
    RELEASED,
    SERVES_BESIDE,
    SUCCESSOR,
    Link,
    LinkEvent,
    Successor,
    SuccessorEvent,
    after,
    knows,
    when,
)

KNOWN_SUCCESSOR = {
    (Successor.STARTING, SuccessorEvent.HELLO): Successor.BOOTING,
    (Successor.STARTING, SuccessorEvent.READY): Successor.READY,
    (Successor.STARTING, SuccessorEvent.FAILED): Successor.REJECTED,
    (Successor.BOOTING, SuccessorEvent.READY): Successor.READY,
    (Successor.BOOTING, SuccessorEvent.FAILED): Successor.REJECTED,
    (Successor.READY, SuccessorEvent.GO): Successor.COMMITTING,
    (Successor.READY, SuccessorEvent.FAILED): Successor.REJECTED,
    (Successor.COMMITTING, SuccessorEvent.GROW): Successor.GROWING,
    (Successor.COMMITTING, SuccessorEvent.CONFIRMED): Successor.PROMOTED,
    (Successor.COMMITTING, SuccessorEvent.FAILED): Successor.REJECTED,
    (Successor.COMMITTING, SuccessorEvent.STOP): Successor.STOPPING,
    (Successor.GROWING, SuccessorEvent.CONFIRMED): Successor.PROMOTED,
    (Successor.GROWING, SuccessorEvent.FAILED): Successor.REJECTED,
    (Successor.GROWING, SuccessorEvent.STOP): Successor.STOPPING,
    (Successor.PROMOTED, SuccessorEvent.LAST_ACCEPT): Successor.ACTIVE,
    (Successor.PROMOTED, SuccessorEvent.RELEASED): Successor.ENDING,
    (Successor.PROMOTED, SuccessorEvent.FAILED): Successor.REJECTED,
    (Successor.ACTIVE, SuccessorEvent.RELEASED): Successor.ENDED,
    (Successor.ACTIVE, SuccessorEvent.FAILED): Successor.LOST,
    (Successor.ENDING, SuccessorEvent.LAST_ACCEPT): Successor.ENDED,
}
KNOWN_LINK = {
    (Link.BOOTING, LinkEvent.READY): Link.AWAITING_GO,
    (Link.BOOTING, LinkEvent.LOST): Link.ALONE,
    (Link.BOOTING, LinkEvent.REJECTED): Link.REJECTED,
    (Link.AWAITING_GO, LinkEvent.GO): Link.SERVING,
    (Link.AWAITING_GO, LinkEvent.LOST): Link.ALONE_READY,
    (Link.AWAITING_GO, LinkEvent.REJECTED): Link.REJECTED,
    (Link.SERVING, LinkEvent.PROMOTED): Link.ACTIVE,
    (Link.SERVING, LinkEvent.LOST): Link.ALONE_READY,
    (Link.SERVING, LinkEvent.REJECTED): Link.REJECTED,
    (Link.ACTIVE, LinkEvent.REJECTED): Link.REJECTED,
    (Link.ALONE, LinkEvent.READY): Link.ALONE_READY,
    (Link.ALONE_READY, LinkEvent.SERVES): Link.ACTIVE,
}
#: Table, states, events, what is known, and the first state.
MACHINES: list[Any] = [
    (SUCCESSOR, Successor, SuccessorEvent, KNOWN_SUCCESSOR, Successor.STARTING),
    (LINK, Link, LinkEvent, KNOWN_LINK, Link.BOOTING),
]
UNKNOWN = [
    (table, pair)
    for table, states, events, known, _ in MACHINES
    for pair in itertools.product(states, events)
    if pair not in known
]


@pytest.mark.parametrize(("table", "states", "events", "known", "first"), MACHINES)
def test_table_is_what_the_design_says(table: Any, states: Any, events: Any, known: Any, first: enum.Enum) -> None:
    assert {(state, event): to for state, follows in table.items() for event, to in follows.items()} == known
    assert list(table) == list(states)
    for (state, event), to in known.items():
        assert knows(table, state, event)
        assert after(table, state, event) is to
    assert {event for _, event in known} == set(events)


@pytest.mark.parametrize(("table", "pair"), UNKNOWN)
def test_unknown_event_raises_and_changes_nothing(table: Any, pair: Any) -> None:
    before = copy.deepcopy(table)
    state, event = pair
    assert not knows(table, state, event)
    with pytest.raises(LifecycleError) as caught:
        after(table, state, event)
    name = type(state).__name__.lower()
    assert str(caught.value) == (
        f"{name} state {state.name.lower()} does not know the event {event.name.lower()} ({event.value})"
    )
    assert before == table


@pytest.mark.parametrize(("table", "states", "events", "known", "first"), MACHINES)
def test_every_state_is_reached_from_the_first(
    table: Any, states: Any, events: Any, known: Any, first: enum.Enum
) -> None:
    found, todo = set(), [first]
    while todo:
        state = todo.pop()
        if state not in found:
            found.add(state)
            todo += table[state].values()
    assert found == set(states)


def test_every_upgrade_can_fail_until_the_service_was_handed_over() -> None:
    fails = {state for state in Successor if knows(SUCCESSOR, state, SuccessorEvent.FAILED)}
    assert fails == BEFORE_GO | SERVES_BESIDE | {Successor.PROMOTED, Successor.ACTIVE}
    assert set() == HANDED_OVER & BEFORE_GO
    assert RELEASED <= HANDED_OVER


def test_a_rejected_generation_never_serves_again() -> None:
    assert LINK[Link.REJECTED] == {}
    assert {state for state in Link if knows(LINK, state, LinkEvent.REJECTED)} == {
        Link.BOOTING,
        Link.AWAITING_GO,
        Link.SERVING,
        Link.ACTIVE,
    }


def test_the_outcome_on_the_board_follows_from_the_state() -> None:
    assert set(OUTCOME) == set(Successor)
    assert {state for state, outcome in OUTCOME.items() if outcome is UpgradeState.BOOTING} == BEFORE_GO
    # It changes only forwards, and is final where the state is.
    for state, follows in SUCCESSOR.items():
        for to in follows.values():
            assert OUTCOME[to] >= OUTCOME[state]
        if OUTCOME[state] in (UpgradeState.BOOTING, UpgradeState.COMMITTING):
            assert follows, state


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (Successor.STARTING, "before it was ready"),
        (Successor.READY, "before it was ready"),
        (Successor.COMMITTING, "in the commit window"),
        (Successor.GROWING, "while it grew to its full size"),
        (Successor.STOPPING, "in the commit window"),
        (Successor.ACTIVE, "after the handover"),
    ],
)
def test_a_reason_tells_when_it_happened(state: Successor, text: str) -> None:
    assert when(state) == text
