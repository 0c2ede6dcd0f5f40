"""What a reader gets of a board: its state at an instant, immutable."""

from __future__ import annotations

from typing import NamedTuple

from zdd_web.board.layout import UpgradeState, WorkerState
from zdd_web.lifecycle import Phase


class TaskView(NamedTuple):
    """A background task in hand: when it was offered, monotonic nanoseconds, and its name."""

    started: int
    name: str


class WorkerView(NamedTuple):
    """One worker as the board had it at an instant."""

    pid: int
    start: int
    age: int
    state: WorkerState
    retiring: bool
    in_flight: int
    requests: int
    tasks: int
    error: str
    handed_over: int = 0
    received: int = 0
    closed_idle: int = 0
    #: `NAMED_TASKS` at most; none of a worker of an earlier version.
    oldest_tasks: tuple[TaskView, ...] = ()


class ListenerView(NamedTuple):
    """One listener as the board had it: connections that wait, how many may, and how many were accepted from it.

    `accepted` is counted where there are several on a port (LISTENER = "reuseport"), and 0 elsewhere.
    """

    name: str
    length: int
    limit: int
    accepted: int


class Snapshot(NamedTuple):
    """The board as it was at an instant: what probes, commands and tests decide upon."""

    name: str
    generation: int
    phase: Phase
    phase_since: int
    deadline: int
    master_pid: int
    master_start: int
    workers_wanted: int
    started_at: int
    ready_at: int
    tick_at: int
    predecessor_pid: int
    successor_pid: int
    successor_phase: Phase | None
    upgrade_number: int
    upgrade_state: UpgradeState
    upgrade_reason: str
    upgrade_since: int
    boot_log_fd: int
    upgrades_done: int
    upgrades_failed: int
    workers: tuple[WorkerView, ...]
    listeners: tuple[ListenerView, ...]
    #: Kept connections of this generation: see `metrics.Totals`.
    connections_handed_over: int = 0
    connections_received: int = 0
    connections_closed_idle: int = 0
    #: Which code it runs, see release.py.
    release: str = ""
    #: See `Header.workers_full`.
    workers_full: int = 0

    @property
    def in_flight(self) -> int:
        """Requests in hand in all workers."""
        return sum(worker.in_flight for worker in self.workers)

    @property
    def is_canary(self) -> bool:
        """Whether it serves with fewer workers than it is to have, because it is watched (`upgrade --canary`)."""
        return self.workers_wanted < self.workers_full

    @property
    def tasks(self) -> int:
        """Background tasks in hand in all workers."""
        return sum(worker.tasks for worker in self.workers)

    @property
    def oldest_tasks(self) -> list[TaskView]:
        """Background tasks that have a name here, the oldest of each worker; the oldest first."""
        found = [task for worker in self.workers for task in worker.oldest_tasks]
        return sorted(found, key=lambda task: task.started)
