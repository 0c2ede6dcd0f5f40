"""Which workers to spawn and which to retire: the whole decision, pure.

It goes by what workers claim on the board and what the master knows of them: a worker that is leaving counts for
nothing, one that boots counts only as on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zdd_web.board import SLOTS, WorkerState
from zdd_web.lifecycle import SPAWNING, Phase


class Member(NamedTuple):
    """A worker as the plan sees it. `age` counts up, the oldest has the lowest; `told` means it was told to retire."""

    pid: int
    age: int
    state: WorkerState
    told: bool = False
    outdated: bool = False
    #: It says that it leaves, and has for a while.
    lingers: bool = False


class Plan(NamedTuple):
    """How many workers to spawn, and the pids to retire; how many more there should be, for which there is no room."""

    spawn: int = 0
    retire: tuple[int, ...] = ()
    without_room: int = 0


def plan(members: Sequence[Member], wanted: int, phase: Phase, room: int = SLOTS) -> Plan:
    """Decide which workers come and which go.

    Capacity never falls by our own doing: a serving worker is retired only when `wanted` others serve. Workers from
    before a reload, and those that have answered `max_requests`, are `outdated`: they are replaced, oldest first, as
    others pass the gate. No more are spawned at a time than there is `room` for on the board: where more than half of
    its slots are taken, the others follow as the replaced ones end.

    >>> serving = WorkerState.SERVING
    >>> plan([Member(1, 1, serving, outdated=True), Member(2, 2, serving)], wanted=1, phase=Phase.SERVING)
    Plan(spawn=0, retire=(1,), without_room=0)
    """
    if phase not in SPAWNING:
        return Plan(retire=tuple(member.pid for member in members if not member.told))
    staying = sorted(
        (member for member in members if not member.told and member.state is not WorkerState.LEAVING),
        key=lambda member: (not member.outdated, member.age),
    )
    current = [member for member in staying if not member.outdated]
    serving = [member for member in staying if member.state is WorkerState.SERVING]
    # Its replacement is on its way: it has as long as any other that leaves, however often it beats.
    retire = [member.pid for member in members if not member.told and member.lingers]
    retire += [member.pid for member in serving[: max(0, len(serving) - wanted)]]
    # One that has not promised anything yet costs nothing.
    retire += [member.pid for member in staying if member.outdated and member.state is not WorkerState.SERVING]
    missing = max(0, wanted - len(current))
    return Plan(spawn=min(missing, room), retire=tuple(retire), without_room=max(0, missing - room))
