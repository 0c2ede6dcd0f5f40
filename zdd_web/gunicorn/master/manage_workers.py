"""The workers of one master, seen to at each turn of its loop: which have ended, which are to come or to go."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from zdd_web import lifecycle, log
from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.exits import WORKER_BOOT_ERROR, HaltServer
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.master.stop import Stop
from zdd_web.gunicorn.master.worker_count import Capacity
from zdd_web.gunicorn.master.worker_plan import plan
from zdd_web.gunicorn.master.worker_roster import Roster
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.termination_message import StartMessage
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.lifecycle import Phase
from zdd_web.system import clock

#: How long after its deadline a worker that was told to leave is killed, seconds, beside what naming its work takes.
OVERDUE_SLACK = 5.0


class Workforce:
    """Takes the place of the arbiter's `manage_workers`."""

    def __init__(
        self,
        server: ArbiterFacade,
        generation: Generation,
        roster: Roster,
        listening: ListenerManager,
        capacity: Capacity,
        wanted: Callable[[], int],
        stop: Stop,
        gate: Gate,
        start_message: StartMessage,
    ) -> None:
        """`wanted` returns how many workers there are to be just now."""
        self._server, self._generation, self._header = server, generation, generation.header
        self._roster, self._listening, self._capacity, self._wanted = roster, listening, capacity, wanted
        self._stop, self._gate, self._start_message = stop, gate, start_message

    def _handle_exited_workers(self) -> None:
        for gone in self._roster.reconcile():
            self._stop.count(gone)
            self._header.requests_gone += gone.requests
            self._header.server_errors_gone += gone.server_errors
            self._header.late_gone += gone.late
            self._header.handed_over_gone += gone.handed_over
            self._header.received_gone += gone.received
            self._header.closed_idle_gone += gone.closed_idle
            if self._gate.opened and not gone.told and gone.state in (WorkerState.READY, WorkerState.SERVING):
                self._header.lost_pid, self._header.lost_status = gone.pid, gone.status or 0
            self._header.workers_lost += gone.lost
            if gone.told or gone.state not in (WorkerState.BOOTING, WorkerState.READY):
                continue
            why = "; ".join(part for part in (gone.ended, gone.error) if part) or "no reason given"
            reason = f"worker {gone.pid} ended before it served: {why}"
            predecessor = self._generation.predecessor
            if self._generation.phase is Phase.BOOTING and predecessor is not None and not predecessor.alone:
                predecessor.fail(reason)
                raise HaltServer(log.one_line(reason), WORKER_BOOT_ERROR)
            if self._generation.phase is Phase.BOOTING and gone.could_not_boot:
                raise HaltServer(log.one_line(reason), gone.exit_status)
            if self._generation.phase in lifecycle.SPAWNING:
                wait = self._roster.boot_failed()
                self._start_message.doing(f"its workers booted; {reason}")
                log.emit(
                    "worker.boot_failed",
                    logging.ERROR,
                    pid=gone.pid,
                    error=why,
                    retry_in=wait,
                )

    def manage_workers(self) -> None:
        """Spawn and retire as `plan()` decides; end the loop when no worker is left or the deadline has passed.

        Raises `StopIteration` or `HaltServer` to end it.
        """
        # After the reaper, and before a worker is spawned in place of one whose end is to end the start.
        self._handle_exited_workers()
        # Those of a reload or a SIGTTIN.
        self._roster.note_forks()
        predecessor = self._generation.predecessor
        if self._gate.opened or (predecessor is not None and predecessor.alone):
            # A first start takes as long as it takes; a successor whose predecessor died shall not hang for ever.
            self._roster.give_up_boots(self._generation.settings.upgrade_timeout)
        if self._generation.phase in (Phase.DRAINING, Phase.RETIRING):
            guarded("listeners", self._listening.follow)()
            if not self._server.has_workers:
                self._stop.end_when_no_worker_is_left()
            else:
                self._stop.end_at_the_deadline()
        decision = plan(self._roster.members(), self._wanted(), self._generation.phase, self._roster.room)
        self._capacity.note_room(decision, lambda: self._roster.any_leaves)
        if self._roster.may_spawn():
            for _ in range(decision.spawn):
                self._spawn()
        deadline = self._stop.ends_at
        if self._generation.phase in lifecycle.SPAWNING:
            deadline = clock.after_ns(self._generation.settings.recycle_timeout)
            slack = self._generation.settings.stop_budget().abandon_window + OVERDUE_SLACK
            for pid in self._roster.kill_overdue(slack):
                log.emit("worker.overdue", logging.ERROR, pid=pid, timeout=self._generation.settings.recycle_timeout)
        self._roster.retire(decision.retire, deadline)
        self._roster.repeat()

    def _spawn(self) -> None:
        master = os.getpid()
        try:
            self._server.spawn_worker()
            self._roster.note_forks()
        except Exception:
            if os.getpid() == master:
                raise
            # A worker for which gunicorn could not even print why it ends
            # (test_error_that_cannot_be_printed_leaves_spawn_worker): back here it would be a second master,
            # with this one's workers and listeners.
            os._exit(WORKER_BOOT_ERROR)

    def retire_all(self) -> None:
        """Tell every worker to leave: the entry action of a phase in which this generation ends."""
        # One that has ended was not told to: first its end is noted.
        self._handle_exited_workers()
        self._roster.retire([member.pid for member in self._roster.members() if not member.told], self._stop.ends_at)

    def follow(self) -> None:
        """Call `manage_workers()` so that an error in it ends a start, and not a service that serves."""
        # Before the first request, an error (a `pre_fork` of the user that raises) ends the start, as gunicorn has it.
        if self._gate.opened:
            guarded("manage_workers", self.manage_workers)()
            return
        try:
            with self._start_message.reporting():
                self.manage_workers()
        except Exception as error:
            if self._generation.predecessor is not None and not isinstance(error, StopIteration):
                self._generation.predecessor.fail(f"{type(error).__name__}: {error}")
            raise
