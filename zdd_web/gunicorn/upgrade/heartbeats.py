"""Which workers of another master's generation still run: judged by the heartbeats on its board.

gunicorn's own rule, to kill a worker that is silent for `timeout`, has to allow for the longest request. A worker that
has none in hand sends a heartbeat each second, whatever its class, so it can be judged much sooner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from zdd_web.board import Board, Heartbeat, Slot, WorkerState
from zdd_web.system import clock, pauses

#: A worker that nothing holds up sends a heartbeat each second; one that has not for so long is stopped or stuck.
FROZEN_AFTER = 5.0

#: Numbers and not `WorkerState(...)`: what stands in a slot is a worker's claim, and may be anything.
AT_WORK = (WorkerState.READY, WorkerState.SERVING)


class WorkerSeen(NamedTuple):
    """A worker as its slot shows it. Durations are seconds, without the time in which this process was paused."""

    pid: int
    start: int = 0
    state: int = WorkerState.SERVING
    retiring: bool = False
    #: It may have a reason to be silent, such as a request that blocks its loop.
    occupied: bool = False
    #: Whether it is known how often it sends heartbeats.
    known: bool = True
    #: Its last heartbeat, monotonic nanoseconds.
    beat_at: int = 0
    #: For how long it has sent no heartbeat.
    silence: float = 0.0
    #: Since when it was seen unoccupied and silent (monotonic nanoseconds, 0 while it is not), and for how long.
    idle_since: int = 0
    idle_for: float = 0.0


def frozen(worker: WorkerSeen, timeout: float) -> str:
    """Say since when a worker has not sent a heartbeat, if that is too long; "" otherwise.

    `timeout` is gunicorn's, 0 for none: a worker that is occupied has as long.

    >>> frozen(WorkerSeen(4711, silence=7.0, idle_for=6.9), timeout=30)
    'worker 4711 has not sent a heartbeat for 7.0 s'
    >>> frozen(WorkerSeen(4711, silence=7.0, occupied=True), timeout=30)
    ''
    """
    idle = worker.idle_for > FROZEN_AFTER
    overdue = bool(timeout) and worker.silence > timeout
    return f"worker {worker.pid} has not sent a heartbeat for {worker.silence:.1f} s" if idle or overdue else ""


class Heartbeats:
    """Looks at the workers on a board, again and again."""

    def __init__(self, board: Board, began: int) -> None:
        """Heartbeats count from `began` (monotonic nanoseconds) at the earliest."""
        self._board, self._began = board, began
        self._seen: dict[int, WorkerSeen] = {}

    @property
    def timeout(self) -> float:
        """gunicorn's `timeout` in that generation, seconds; 0 for none."""
        return self._board.header.worker_timeout / 1e9

    def look(self) -> tuple[WorkerSeen, ...]:
        """Return all workers as they are now."""
        workers = tuple(self._workers())
        self._seen = {worker.pid: worker for worker in workers}
        return workers

    def _workers(self) -> Iterator[WorkerSeen]:
        for slot in self._board.taken_slots():
            if slot.order.pid:
                yield self._log_verdict_changes(slot)

    def _log_verdict_changes(self, slot: Slot) -> WorkerSeen:
        pid, state, kind, beat_at = slot.order.pid, slot.state, slot.heartbeat, slot.beat_at
        known = kind in (Heartbeat.ALWAYS, Heartbeat.BETWEEN_REQUESTS, Heartbeat.AFTER_CONNECTION)
        requests = kind != Heartbeat.ALWAYS and slot.in_flight > 0
        occupied = state not in AT_WORK or kind == Heartbeat.AFTER_CONNECTION or requests
        idle_since = 0
        if known and not occupied:
            # From when it was *seen* so: a request that has blocked for long ends a moment before the next heartbeat.
            before = self._seen.get(pid)
            unchanged = before is not None and before.beat_at == beat_at
            idle_since = (before.idle_since if before is not None and unchanged else 0) or clock.now_ns()
        return WorkerSeen(
            pid=pid,
            start=slot.order.start,
            state=state,
            retiring=bool(slot.retire),
            occupied=occupied,
            known=known,
            beat_at=beat_at,
            silence=pauses.since(max(beat_at, self._began)),
            idle_since=idle_since,
            idle_for=pauses.since(idle_since) if idle_since else 0.0,
        )
