"""The roster: which worker has which slot, and who should come or go.

`plan()` is the whole decision, pure; `Roster` keeps the books of the master. Both go by what workers say on the
board: a worker that is leaving counts for nothing, one that boots counts only as on its way.

What workers say is a claim (board.py). Which processes there are, and which of them were told to leave, the roster
knows by itself: a pid comes from gunicorn's fork. A worker that has served once never counts as a failed boot. A
worker that says it leaves, and stays, is told to leave, which gives it a deadline.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gunicorn.arbiter import Arbiter

from zdd_web.board import SLOTS, Board, Slot, WorkerState
from zdd_web.gunicorn.termination_message import first_boot
from zdd_web.lifecycle import SPAWNING, Phase
from zdd_web.system import clock, pauses, proc

#: The kernel may drop a SIGTERM that arrives between a worker's fork and its handlers (gunicorn #1910): say it again.
REPEAT_TERM = 1.0

#: A worker that says it leaves, without having been told to, is told to after so long, seconds.
LINGERS_AFTER = 1.0

#: After a failed boot the next one waits, longer each time, seconds.
BACKOFF_FIRST, BACKOFF_FACTOR, BACKOFF_MOST = 0.5, 1.5, 30.0


@dataclass(frozen=True)
class Member:
    """A worker as the plan sees it. `age` counts up, the oldest has the lowest; `told` means it was told to retire."""

    pid: int
    age: int
    state: WorkerState
    told: bool = False
    outdated: bool = False
    #: It says that it leaves, and has for a while.
    lingers: bool = False


@dataclass(frozen=True)
class Plan:
    """How many workers to spawn, and the pids to retire; how many more there should be, for which there is no room."""

    spawn: int = 0
    retire: tuple[int, ...] = ()
    without_room: int = 0


def plan(members: Sequence[Member], wanted: int, phase: Phase, room: int = SLOTS) -> Plan:
    """Decide who comes and who goes.

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


@dataclass(frozen=True)
class ExitedWorker:
    """What a worker that is no more had last said on the board."""

    pid: int
    state: WorkerState
    error: str
    abandoned: int
    in_flight: int
    told: bool
    status: int | None
    late: int = 0
    late_by: float = 0.0
    late_peer: str = ""
    late_quarters: tuple[int, ...] = (0, 0, 0, 0)
    late_new_by: float = 0.0
    requests: int = 0
    server_errors: int = 0
    handed_over: int = 0
    received: int = 0
    closed_idle: int = 0

    @property
    def lost(self) -> bool:
        """Whether it had served and ended without having been told to."""
        if self.told:
            return False
        # A worker that gunicorn's `timeout` ends has time to say that it leaves; a person may have asked one to.
        failed = self.killed or self.exit_status != 0
        return self.state is WorkerState.SERVING or (self.state is WorkerState.LEAVING and failed)

    @property
    def ended(self) -> str:
        """How it ended, in words; "" when nobody saw it."""
        return "" if self.status is None else proc.describe(self.status)

    @property
    def exit_status(self) -> int:
        """Its exit status; 0 when a signal ended it or nobody saw it."""
        return os.waitstatus_to_exitcode(self.status) if self.status is not None and os.WIFEXITED(self.status) else 0

    @property
    def killed(self) -> bool:
        """Whether a signal ended it."""
        return self.status is not None and os.WIFSIGNALED(self.status)

    @property
    def could_not_boot(self) -> bool:
        """Whether it ended in the way in which gunicorn's workers end when they cannot boot, or not load the app."""
        return self.exit_status in (Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR)


@dataclass
class _Entry:
    worker: Any
    slot: Slot
    since: int
    given_up: bool = False
    told_at: int = 0
    status: int | None = None
    #: How far it has come, as the master has seen it: a worker cannot take it back.
    reached: WorkerState = WorkerState.BOOTING

    #: Since when the master has seen it leave.
    leaves_since: int = 0

    @property
    def state(self) -> WorkerState:
        self.reached = max(self.reached, self.slot.state)
        return self.reached

    @property
    def lingers(self) -> bool:
        if self.state is not WorkerState.LEAVING:
            return False
        self.leaves_since = self.leaves_since or clock.now_ns()
        # One that ends at once, as at gunicorn's `timeout`, was not told to: it counts as lost.
        return clock.since(self.leaves_since) > LINGERS_AFTER


class Roster:
    """The master's books: its workers and their slots."""

    def __init__(self, server: Any, board: Board) -> None:
        self._server, self._board = server, board
        self._places: list[_Entry] = []
        self._current_age = 0
        self._failures = 0
        self._spawn_not_before = 0

    def claim(self, worker: Any) -> Slot:
        """Give a worker that is about to be forked its slot. Raises `BoardError` when there is none."""
        slot = self._board.claim(worker.age)
        self._places.append(_Entry(worker, slot, since=clock.now_ns()))
        return slot

    def note_forks(self) -> None:
        """Write the pids of new workers on the board, where a predecessor that ends this generation reads them."""
        for place in self._places:
            order = place.slot.order
            if not order.pid and isinstance(place.worker.pid, int):
                try:
                    order.start = proc.start_time(place.worker.pid)
                except OSError:  # no descriptor left: the next tick tries again
                    continue
                order.pid = place.worker.pid

    @property
    def room(self) -> int:
        """How many more workers can be given a slot."""
        return max(0, self._board.header.slot_count - len(self._places))

    def slot_of(self, worker: Any) -> Slot:
        """Return the slot of a worker that was given one."""
        return next(place.slot for place in self._places if place.worker is worker)

    def members(self) -> list[Member]:
        """Return the workers as the plan sees them."""
        return [
            Member(
                pid=place.worker.pid,
                age=place.worker.age,
                state=place.state,
                told=bool(place.slot.order.retire),
                outdated=place.worker.age <= self._current_age or bool(place.slot.recycle_requested),
                lingers=place.lingers,
            )
            for place in self._places
        ]

    def serving(self) -> int:
        """Count those that serve and that nobody is to replace."""
        return sum(
            member.state is WorkerState.SERVING and not member.told and not member.outdated for member in self.members()
        )

    def reconcile(self) -> list[ExitedWorker]:
        """Free the slots of workers that gunicorn has reaped, and return what they had last said."""
        gone = []
        for place in [p for p in self._places if self._server.WORKERS.get(p.worker.pid) is not p.worker]:
            self._places.remove(place)
            slot = place.slot
            gone.append(
                ExitedWorker(
                    pid=place.worker.pid,
                    state=place.state,
                    error=slot.error,
                    # One that was killed could not give its work up.
                    abandoned=max(slot.abandoned, slot.tasks),
                    in_flight=slot.in_flight,
                    told=bool(slot.order.retire),
                    status=place.status,
                    late=slot.late,
                    late_by=slot.late_by / 1e9,
                    late_peer=slot.late_peer,
                    late_quarters=slot.late_quarters,
                    late_new_by=slot.late_new_by / 1e9,
                    requests=slot.requests,
                    server_errors=slot.server_errors,
                    handed_over=slot.handed_over,
                    received=slot.received,
                    closed_idle=slot.closed_idle,
                )
            )
            self._board.free(slot)
        return gone

    def reaped(self, pid: int, status: int) -> None:
        """Note how a worker has ended."""
        for place in self._places:
            if place.worker.pid == pid:
                place.status = status

    def outdate(self) -> None:
        """Mark everybody who is here now as to be replaced."""
        self._current_age = self._server.worker_age

    def boot_failed(self) -> float:
        """Note that a worker could not boot; return the seconds until the next may be tried."""
        wait = min(BACKOFF_MOST, BACKOFF_FIRST * BACKOFF_FACTOR ** min(self._failures, 20))
        self._failures += 1
        self._spawn_not_before = clock.after_ns(wait)
        return wait

    def may_spawn(self) -> bool:
        """Tell whether the back-off after failed boots is over."""
        return self._spawn_not_before == 0 or clock.passed(self._spawn_not_before)

    def give_up_boots(self, timeout: float) -> None:
        """SIGKILL workers that have been booting for too long; reaped, they count as failed boots.

        gunicorn would wait for ever for one that hangs before its first heartbeat: it compares the monotonic clock
        with the wall-clock time of the heartbeat's file (arbiter.py:612).
        """
        for place in self._places:
            late = place.state is WorkerState.BOOTING and pauses.since(place.since) > timeout
            if late and not place.given_up:
                place.given_up = True
                # What it said last, such as a check that fails, is why.
                late_by = f"not ready within UPGRADE_TIMEOUT = {timeout:g} s"
                said = [late_by, place.slot.error, first_boot(self._board.header)]
                place.slot.error = "; ".join(filter(None, said))
                self._server.kill_worker(place.worker.pid, signal.SIGKILL)

    def booted(self) -> None:
        """Note that boots succeed: the next failure starts the back-off anew."""
        self._failures = 0
        self._spawn_not_before = 0

    def retire(self, pids: Sequence[int], deadline_ns: int) -> None:
        """Tell workers to go: the order on the board first, then the signal."""
        for place in self._places:
            if place.worker.pid in pids:
                place.slot.order.retire_deadline = deadline_ns
                place.slot.order.retire = 1
                self._term(place)

    def repeat(self) -> None:
        """Send SIGTERM again to those who were told a while ago and are still here."""
        for place in self._places:
            if place.told_at and clock.since(place.told_at) >= REPEAT_TERM:
                self._term(place)

    def kill_overdue(self, slack: float) -> list[int]:
        """SIGKILL workers that are here `slack` seconds after their deadline to leave; return the pids.

        By then a worker has cut off and named what it had in hand: what is left does not obey.
        """
        overdue = []
        for place in self._places:
            deadline = place.slot.order.retire_deadline
            if place.told_at and deadline and clock.passed(deadline + int(slack * 1e9)) and not place.given_up:
                place.given_up = True
                overdue.append(place.worker.pid)
                self._server.kill_worker(place.worker.pid, signal.SIGKILL)
        return overdue

    def unfinished(self) -> int:
        """Count the background work that those who are here have in hand, or have given up."""
        return sum(max(place.slot.abandoned, place.slot.tasks) for place in self._places)

    def kill(self) -> int:
        """SIGKILL everybody who is left; return how many."""
        for place in self._places:
            self._server.kill_worker(place.worker.pid, signal.SIGKILL)
        return len(self._places)

    def _term(self, place: _Entry) -> None:
        place.told_at = clock.now_ns()
        self._server.kill_worker(place.worker.pid, signal.SIGTERM)

    def __len__(self) -> int:
        return len(self._places)
