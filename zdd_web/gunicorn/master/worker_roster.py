"""The roster: which worker has which slot, and what the master knows of each.

What to do about them is `plan()`'s decision (worker_plan.py), made from `Roster.members()`.

What workers say is a claim (board.py). Which processes there are, and which of them were told to leave, the roster
knows by itself: a pid comes from gunicorn's fork. A worker that has served once never counts as a failed boot. A
worker that says it leaves, and stays, is told to leave, which gives it a deadline.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from zdd_web.board import Board, Slot, WorkerState
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.boot_progress import first_boot
from zdd_web.gunicorn.master.worker_plan import Member
from zdd_web.gunicorn.workers.exited_worker import ExitedWorker
from zdd_web.system import clock, pauses, proc

#: The kernel may drop a SIGTERM that arrives between a worker's fork and its handlers (gunicorn #1910): say it again.
REPEAT_TERM = 1.0

#: A worker that says it leaves, without having been told to, is told to after so long, seconds.
LINGERS_AFTER = 1.0

#: After a failed boot the next one waits, longer each time, seconds.
BACKOFF_FIRST, BACKOFF_FACTOR, BACKOFF_MOST = 0.5, 1.5, 30.0


class Forked(Protocol):
    """gunicorn's worker as the master has it: `age` counts up, `pid` is there after the fork."""

    age: int
    pid: int


@dataclass(eq=False, repr=False)
class _Entry:
    worker: Forked
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

    def __init__(self, server: ArbiterFacade, board: Board) -> None:
        self._server, self._board = server, board
        self._places: list[_Entry] = []
        #: Those whose pid is not on the board yet.
        self._without_pid: list[_Entry] = []
        self._current_age = 0
        self._failures = 0
        self._spawn_not_before = 0

    def claim(self, worker: Forked) -> Slot:
        """Give a worker that is about to be forked its slot. Raises `BoardError` when there is none."""
        slot = self._board.claim(worker.age)
        place = _Entry(worker, slot, since=clock.now_ns())
        self._places.append(place)
        self._without_pid.append(place)
        return slot

    def note_forks(self) -> None:
        """Write the pids of new workers on the board, where a predecessor that ends this generation reads them."""
        self._without_pid = [place for place in self._without_pid if not self._note_pid(place)]

    @staticmethod
    def _note_pid(place: _Entry) -> bool:
        order = place.slot.order
        # gunicorn's worker has no number before it is forked.
        pid: object = place.worker.pid
        if not isinstance(pid, int):
            return False
        try:
            order.start = proc.start_time(pid)
        except OSError:  # no descriptor left: the next tick tries again
            return False
        order.pid = pid
        return True

    @property
    def room(self) -> int:
        """How many more workers can be given a slot."""
        return max(0, self._board.header.slot_count - len(self._places))

    def slot_of(self, worker: Forked) -> Slot:
        """Return the slot of a worker that was given one."""
        # The newest, as a rule: it was forked a moment ago.
        return next(place.slot for place in reversed(self._places) if place.worker is worker)

    def members(self) -> list[Member]:
        """Return the workers as the plan sees them."""
        return list(self._look())

    def _look(self) -> Iterator[Member]:
        # One by one: in a turn of the loop most questions are answered by the first worker.
        for place in self._places:
            order = place.slot.order
            yield Member(
                pid=place.worker.pid,
                age=place.worker.age,
                state=place.state,
                told=bool(order.retire),
                outdated=place.worker.age <= self._current_age or bool(place.slot.recycle_requested),
                lingers=place.lingers,
            )

    def serving(self) -> int:
        """Count those that serve and are not to be replaced."""
        return sum(
            member.state is WorkerState.SERVING and not member.told and not member.outdated for member in self._look()
        )

    @property
    def any_serves(self) -> bool:
        """Whether a worker serves, one that was told to leave included."""
        return any(member.state is WorkerState.SERVING for member in self._look())

    @property
    def all_leave(self) -> bool:
        """Whether no worker accepts any more."""
        return all(member.state is WorkerState.LEAVING for member in self._look())

    @property
    def any_leaves(self) -> bool:
        """Whether a worker was told to leave, or does not serve."""
        return any(member.told or member.state is not WorkerState.SERVING for member in self._look())

    def reconcile(self) -> list[ExitedWorker]:
        """Free the slots of workers that gunicorn has reaped, and return what they had last said."""
        gone: list[ExitedWorker] = []
        ended = [place for place in self._places if not self._server.has(place.worker)]
        if not ended:
            return gone
        # By what was seen above: up to gunicorn 23 a signal handler may reap another one just now.
        without = set(map(id, ended))
        self._places = [place for place in self._places if id(place) not in without]
        self._without_pid = [place for place in self._without_pid if id(place) not in without]
        for place in ended:
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
        """Mark all that are here now as to be replaced."""
        self._current_age = self._server.newest_age

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
        with the wall-clock time of the heartbeat's file (test_new_heartbeat_is_ahead_of_the_monotonic_clock).
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
        chosen = frozenset(pids)
        for place in self._places:
            if place.worker.pid in chosen:
                place.slot.order.retire_deadline = deadline_ns
                place.slot.order.retire = 1
                self._term(place)

    def repeat(self) -> None:
        """Send SIGTERM again to those that were told a while ago and are still here."""
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
        """Count the background work that those that are here have in hand, or have given up."""
        return sum(max(place.slot.abandoned, place.slot.tasks) for place in self._places)

    def kill(self) -> int:
        """SIGKILL all that are left; return how many."""
        for place in self._places:
            self._server.kill_worker(place.worker.pid, signal.SIGKILL)
        return len(self._places)

    def _term(self, place: _Entry) -> None:
        place.told_at = clock.now_ns()
        self._server.kill_worker(place.worker.pid, signal.SIGTERM)

    def __len__(self) -> int:
        return len(self._places)
