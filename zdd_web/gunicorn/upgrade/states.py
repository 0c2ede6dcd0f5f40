"""The two sides of an upgrade as tables: how far the successor has come, and the link to the predecessor.

Everything that decides which state comes next lives in this file, as data; nothing here reads a socket or signals a
process. A pair of a state and an event that a table does not know raises `LifecycleError` and changes nothing. A
*message* that its state does not know is ignored instead, by `knows()`: the other master may be of any version.
"""

from __future__ import annotations

import enum
from typing import TypeVar

from zdd_web.board import UpgradeState
from zdd_web.errors import LifecycleError

StateT = TypeVar("StateT", bound=enum.Enum)
EventT = TypeVar("EventT", bound=enum.Enum)


class Successor(enum.Enum):
    """How far a successor has come, as its predecessor sees it."""

    STARTING = "it was started and has sent nothing yet"
    BOOTING = "it has introduced itself: its board is known"
    READY = "its workers stand at the gate, and it asks to serve"
    COMMITTING = "it serves beside this generation, in the commit window"
    GROWING = "it has passed its watch as a canary, and starts the rest of its workers; both serve"
    PROMOTED = "it is the service; workers of this generation may still accept"
    ACTIVE = "it is the service, alone"
    ENDING = "it ends, and this generation is not to come back; workers of this one may still accept"
    ENDED = "it ends, and this generation is not to come back"
    STOPPING = "it stops together with this generation"
    REJECTED = "the upgrade has failed"
    LOST = "it died after the upgrade: this generation is the service again"


class SuccessorEvent(enum.Enum):
    """What may happen to a successor."""

    HELLO = "it introduces itself"
    READY = "it asks to serve"
    GO = "this master lets it"
    GROW = "a canary has passed its watch"
    CONFIRMED = "the commit window is over"
    LAST_ACCEPT = "no worker of this generation accepts any more"
    RELEASED = "it tells this master not to come back"
    FAILED = "it ended, stood still, took too long or was rejected"
    STOP = "the service stops"


SUCCESSOR: dict[Successor, dict[SuccessorEvent, Successor]] = {
    Successor.STARTING: {
        SuccessorEvent.HELLO: Successor.BOOTING,
        SuccessorEvent.READY: Successor.READY,
        SuccessorEvent.FAILED: Successor.REJECTED,
    },
    Successor.BOOTING: {SuccessorEvent.READY: Successor.READY, SuccessorEvent.FAILED: Successor.REJECTED},
    # For a moment only: the pid file is prepared, which may fail.
    Successor.READY: {SuccessorEvent.GO: Successor.COMMITTING, SuccessorEvent.FAILED: Successor.REJECTED},
    Successor.COMMITTING: {
        SuccessorEvent.GROW: Successor.GROWING,
        SuccessorEvent.CONFIRMED: Successor.PROMOTED,
        SuccessorEvent.FAILED: Successor.REJECTED,
        SuccessorEvent.STOP: Successor.STOPPING,
    },
    Successor.GROWING: {
        SuccessorEvent.CONFIRMED: Successor.PROMOTED,
        SuccessorEvent.FAILED: Successor.REJECTED,
        SuccessorEvent.STOP: Successor.STOPPING,
    },
    Successor.PROMOTED: {
        SuccessorEvent.LAST_ACCEPT: Successor.ACTIVE,
        SuccessorEvent.RELEASED: Successor.ENDING,
        # No command was told "done" yet: this upgrade has failed.
        SuccessorEvent.FAILED: Successor.REJECTED,
    },
    Successor.ACTIVE: {SuccessorEvent.RELEASED: Successor.ENDED, SuccessorEvent.FAILED: Successor.LOST},
    Successor.ENDING: {SuccessorEvent.LAST_ACCEPT: Successor.ENDED},
    Successor.ENDED: {},
    Successor.STOPPING: {},
    Successor.REJECTED: {},
    Successor.LOST: {},
}

#: It has not been let serve: it may be killed, and no request is lost.
BEFORE_GO = frozenset({Successor.STARTING, Successor.BOOTING, Successor.READY})

#: It serves, and this generation too: nothing has been handed over.
SERVES_BESIDE = frozenset({Successor.COMMITTING, Successor.GROWING})

#: It is the service, or was the last that was.
HANDED_OVER = frozenset(
    {Successor.PROMOTED, Successor.ACTIVE, Successor.ENDING, Successor.ENDED, Successor.LOST},
)

#: This generation is not to serve again.
RELEASED = frozenset({Successor.ENDING, Successor.ENDED})

#: The outcome that a state has on the board, where commands read it.
OUTCOME: dict[Successor, UpgradeState] = {
    Successor.STARTING: UpgradeState.BOOTING,
    Successor.BOOTING: UpgradeState.BOOTING,
    Successor.READY: UpgradeState.BOOTING,
    Successor.COMMITTING: UpgradeState.COMMITTING,
    Successor.GROWING: UpgradeState.COMMITTING,
    # An operator who is told "done" expects no answer of the old code to a request sent from now on.
    Successor.PROMOTED: UpgradeState.COMMITTING,
    Successor.ACTIVE: UpgradeState.DONE,
    Successor.ENDING: UpgradeState.COMMITTING,
    Successor.ENDED: UpgradeState.DONE,
    Successor.STOPPING: UpgradeState.FAILED,
    Successor.REJECTED: UpgradeState.FAILED,
    Successor.LOST: UpgradeState.DONE,
}


def when(state: Successor) -> str:
    """Return when in an upgrade a successor was in that state, as reasons of a failure have it.

    >>> when(Successor.COMMITTING)
    'in the commit window'
    """
    if state in BEFORE_GO:
        return "before it was ready"
    if state is Successor.GROWING:
        return "while it grew to its full size"
    return "after the handover" if state in HANDED_OVER else "in the commit window"


class Link(enum.Enum):
    """How far a new master has come towards being the service, as it sees it itself."""

    BOOTING = "its workers boot"
    AWAITING_GO = "its workers stand at the gate, and it has asked to serve"
    SERVING = "it serves beside its predecessor, in the commit window"
    ACTIVE = "it is the service"
    ALONE = "the predecessor is lost, and its workers boot"
    ALONE_READY = "the predecessor is lost, and its workers stand at the gate or serve"
    REJECTED = "the predecessor has given it up"


class LinkEvent(enum.Enum):
    """What may happen to the link to the predecessor."""

    READY = "all workers stand at the gate"
    GO = "the predecessor lets it serve"
    PROMOTED = "the predecessor has handed over"
    LOST = "the predecessor is gone"
    SERVES = "it serves, and no predecessor could hand over"
    REJECTED = "the predecessor gives it up"


LINK: dict[Link, dict[LinkEvent, Link]] = {
    Link.BOOTING: {
        LinkEvent.READY: Link.AWAITING_GO,
        LinkEvent.LOST: Link.ALONE,
        LinkEvent.REJECTED: Link.REJECTED,
    },
    Link.AWAITING_GO: {
        LinkEvent.GO: Link.SERVING,
        LinkEvent.LOST: Link.ALONE_READY,
        LinkEvent.REJECTED: Link.REJECTED,
    },
    Link.SERVING: {
        LinkEvent.PROMOTED: Link.ACTIVE,
        LinkEvent.LOST: Link.ALONE_READY,
        LinkEvent.REJECTED: Link.REJECTED,
    },
    # A predecessor that ends now is a predecessor no more; one that takes a stalled successor for lost rejects it.
    Link.ACTIVE: {LinkEvent.REJECTED: Link.REJECTED},
    Link.ALONE: {LinkEvent.READY: Link.ALONE_READY},
    Link.ALONE_READY: {LinkEvent.SERVES: Link.ACTIVE},
    Link.REJECTED: {},
}


def knows(table: dict[StateT, dict[EventT, StateT]], state: StateT, event: EventT) -> bool:
    """Return whether a table says what follows upon an event.

    >>> knows(LINK, Link.BOOTING, LinkEvent.GO)
    False
    """
    return event in table[state]


def after(table: dict[StateT, dict[EventT, StateT]], state: StateT, event: EventT) -> StateT:
    """Return the state that follows `state` upon `event`.

    Raises `LifecycleError` for a pair that the table does not know.

    >>> after(SUCCESSOR, Successor.READY, SuccessorEvent.GO).name
    'COMMITTING'
    """
    try:
        return table[state][event]
    except KeyError:
        raise LifecycleError(
            f"{type(state).__name__.lower()} state {state.name.lower()} does not know the event {event.name.lower()} "
            f"({event.value})"
        ) from None
