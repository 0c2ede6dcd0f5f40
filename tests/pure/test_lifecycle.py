"""The lifecycle is a table, asserted whole: every pair of a phase and an event."""

from __future__ import annotations

import copy
import itertools

import pytest

from zdd_web.errors import LifecycleError
from zdd_web.lifecycle import LEAVING, ON_ENTRY, SPAWNING, TRANSITIONS, WORKERS_LEAVE, Event, Phase, after

KNOWN = {
    (Phase.BOOTING, Event.READY): Phase.SERVING,
    (Phase.BOOTING, Event.STOP): Phase.DRAINING,
    (Phase.BOOTING, Event.FINISHED): Phase.STOPPED,
    (Phase.SERVING, Event.STOP): Phase.LAME_DUCK,
    (Phase.SERVING, Event.SUCCEEDED): Phase.RETIRING,
    (Phase.LAME_DUCK, Event.STOP): Phase.DRAINING,
    (Phase.LAME_DUCK, Event.LAME_DUCK_OVER): Phase.DRAINING,
    (Phase.DRAINING, Event.STOP): Phase.DRAINING,
    (Phase.DRAINING, Event.FINISHED): Phase.STOPPED,
    (Phase.RETIRING, Event.STOP): Phase.RETIRING,
    (Phase.RETIRING, Event.SUCCESSOR_LOST): Phase.SERVING,
    (Phase.RETIRING, Event.FINISHED): Phase.STOPPED,
}
UNKNOWN = [pair for pair in itertools.product(Phase, Event) if pair not in KNOWN]


def test_table_is_what_the_design_says() -> None:
    table = {(phase, event): to for phase, events in TRANSITIONS.items() for event, to in events.items()}
    assert table == KNOWN
    assert list(TRANSITIONS) == list(Phase)


@pytest.mark.parametrize(("pair", "to"), KNOWN.items())
def test_known_event_leads_to_its_phase(pair: tuple[Phase, Event], to: Phase) -> None:
    assert after(*pair) is to


@pytest.mark.parametrize(("phase", "event"), UNKNOWN)
def test_unknown_event_raises_and_changes_nothing(phase: Phase, event: Event) -> None:
    before = copy.deepcopy(TRANSITIONS)
    with pytest.raises(LifecycleError) as caught:
        after(phase, event)
    assert str(caught.value) == f"phase {phase.label} does not know the event {event.name.lower()} ({event.value})"
    assert before == TRANSITIONS


def reachable(start: Phase) -> set[Phase]:
    found, todo = set(), [start]
    while todo:
        phase = todo.pop()
        if phase not in found:
            found.add(phase)
            todo += TRANSITIONS[phase].values()
    return found


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_can_come_to_an_end(phase: Phase) -> None:
    assert Phase.STOPPED in reachable(phase)


def test_every_phase_is_reached_from_the_start() -> None:
    assert reachable(Phase.BOOTING) == set(Phase)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.STOPPED])
def test_stop_is_understood_while_there_is_anything_to_stop(phase: Phase) -> None:
    # Two SIGTERMs skip the lame duck, more change nothing.
    third = after(after(after(phase, Event.STOP), Event.STOP), Event.STOP)
    assert third is (Phase.RETIRING if phase is Phase.RETIRING else Phase.DRAINING)


def test_every_stop_of_a_serving_generation_passes_the_lame_duck() -> None:
    assert [to for to in Phase if to in TRANSITIONS[Phase.SERVING].values()] == [Phase.LAME_DUCK, Phase.RETIRING]
    assert Event.FINISHED not in TRANSITIONS[Phase.LAME_DUCK]


def test_stopped_is_the_end() -> None:
    assert TRANSITIONS[Phase.STOPPED] == {}


def test_phases_in_which_workers_leave_are_those_that_spawn_none() -> None:
    assert set(Phase) == SPAWNING | WORKERS_LEAVE
    assert set() == SPAWNING & WORKERS_LEAVE
    assert WORKERS_LEAVE | {Phase.LAME_DUCK} == LEAVING
    assert Phase.SERVING not in LEAVING


def test_numbers_on_the_board_are_forever() -> None:
    assert {phase.label: int(phase) for phase in Phase} == {
        "booting": 1,
        "serving": 2,
        "lame_duck": 3,
        "draining": 4,
        "retiring": 5,
        "stopped": 6,
    }


def test_entry_actions_are_what_the_design_says() -> None:
    assert ON_ENTRY == {
        Phase.SERVING: ("open_gate",),
        Phase.DRAINING: ("block_new_connections", "retire_workers"),
        Phase.RETIRING: ("drain_unwanted_listeners", "retire_workers"),
    }
    # A phase whose workers leave tells them to, and does so last.
    assert {phase for phase, actions in ON_ENTRY.items() if actions[-1] == "retire_workers"} == WORKERS_LEAVE - {
        Phase.STOPPED
    }
