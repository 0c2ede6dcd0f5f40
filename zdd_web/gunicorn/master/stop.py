"""The end of a generation: SIGTERM, SIGINT and SIGQUIT, the deadlines, and what is said of work that is cut off.

A stop has one budget, `GRACE_PERIOD`; its deadline stands on the board, where workers read it. A generation that
retires has `RETIRE_TIMEOUT`. The loop ends by gunicorn's own means, `StopIteration` and `HaltServer`, from
`Workforce.manage_workers`: with no worker left, or at the deadline.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from zdd_web import keeper, lifecycle, log
from zdd_web.board import WorkerState
from zdd_web.gunicorn import boot_progress, process_exit, termination_message
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.exits import HaltServer
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.master.reload import Reload
from zdd_web.gunicorn.master.worker_roster import Roster
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.systemd_notifier import SystemdNotifier
from zdd_web.gunicorn.termination_message import StartMessage
from zdd_web.gunicorn.upgrade.ancestors import deadline_of_the_stop
from zdd_web.gunicorn.upgrade.coordinator import UpgradeCoordinator
from zdd_web.gunicorn.workers import late_arrivals
from zdd_web.gunicorn.workers.exited_worker import ExitedWorker
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.lifecycle import STOPPING, Event, Phase
from zdd_web.settings import Settings
from zdd_web.system import clock

#: A generation that is stopped before it served has promised nothing.
BOOT_STOP_BUDGET = 2.0

#: After "stop now" a worker that does not handle the signal is killed, seconds.
STOP_NOW_WITHIN = 2

#: How long the end of workers that were killed is waited for, before it is left to gunicorn, and how often it is
#: looked for, seconds. The kernel takes a moment to free what a large process had.
REAP_WITHIN, REAP_EVERY = 0.3, 0.005


class Stop:
    """How one master ends, and what it has counted of work that was cut off."""

    def __init__(
        self,
        server: ArbiterFacade,
        generation: Generation,
        roster: Roster,
        listening: ListenerManager,
        notifier: SystemdNotifier,
        coordinator: UpgradeCoordinator,
        reload: Reload,
        gate: Gate,
        start_message: StartMessage,
    ) -> None:
        self._server, self._generation, self._header = server, generation, generation.header
        self._roster, self._listening, self._notifier = roster, listening, notifier
        self._coordinator, self._reload = coordinator, reload
        self._gate, self._start_message = gate, start_message
        self._lame_duck_ends = clock.NEVER
        #: Why a start that was ended by a signal has come to nothing.
        self._ended_booting = ""
        self._abandoned = 0
        self._cut = 0
        self._killed_at_work = False
        self._ends_now = False
        self._closed_idle = 0
        self._ancestors_know = False
        self._late = late_arrivals.LateArrivals()

    @property
    def _settings(self) -> Settings:
        return self._generation.settings

    def take_over(self) -> None:
        """Replace what the arbiter does at these signals, and at its end."""
        server = self._server
        server.replace("handle_term", guarded("handle_term", self.handle_term))
        self._gunicorn_int: Callable[[], None] = server.replace("handle_int", self.handle_int)
        self._gunicorn_quit: Callable[[], None] = server.replace("handle_quit", self.handle_quit)
        self._gunicorn_halt: Callable[[str | None, int], None] = server.replace("halt", self.halt)

    def follow(self) -> None:
        """End the lame duck when its time is over; the tick's call."""
        if self._generation.phase in STOPPING and not self._ancestors_know:
            # The predecessor may hand over to a master that has begun to stop a moment ago.
            self._stop_ancestors(signal.SIGTERM)
        if self._generation.phase is Phase.LAME_DUCK and clock.passed(self._lame_duck_ends):
            self._generation.move(Event.LAME_DUCK_OVER)

    def count(self, gone: ExitedWorker) -> None:
        """Count what a worker that has ended leaves behind."""
        self._late.add(gone)
        if self._generation.phase in lifecycle.WORKERS_LEAVE:
            self._abandoned += gone.abandoned
            self._killed_at_work |= gone.killed and bool(gone.abandoned or gone.in_flight)
            self._cut += gone.in_flight
        if self._header.stop_since:
            self._closed_idle += gone.closed_idle

    def handle_term(self) -> None:
        """SIGTERM: the stop begins, or, the second time, skips what is left of the lame duck."""
        # After a handover the signal is meant for the service, and not for this generation alone.
        self._generation.read_predecessor()
        if self._generation.phase is Phase.RETIRING:
            self._stop_retiring()
        else:
            self._begin()

    def _begin(self) -> None:
        guarded("termination message", self._note_end)(signal.SIGTERM)
        guarded("cancel", self._cancel)(signal.SIGTERM)
        guarded("release_predecessor", self._generation.release_predecessor)()
        # A takeover in its commit window has just been committed.
        phase = self._generation.phase
        if phase is Phase.BOOTING:
            self._header.deadline = clock.after_ns(min(BOOT_STOP_BUDGET, self._settings.stop_budget().work))
        elif not self._header.deadline:
            budget = self._settings.stop_budget()
            lame_duck = budget.lame_duck if phase is Phase.SERVING else 0.0
            self._lame_duck_ends = clock.after_ns(lame_duck)
            self._header.deadline = clock.after_ns(lame_duck + budget.work)
        elif phase is Phase.LAME_DUCK:
            self._header.deadline = clock.after_ns(self._settings.stop_budget().work)
        self._header.stop_since = self._header.stop_since or clock.now_ns()
        self._generation.move(Event.STOP)
        self._stop_ancestors(signal.SIGTERM)

    def _stop_retiring(self) -> None:
        # One that does not stop yet was sent it by the active master, which does: there is nothing to send back.
        is_first = not self._header.deadline
        if is_first:
            budget = self._settings.stop_budget()
            # The whole service ends: this generation's part of it has the same time.
            own = clock.after_ns(budget.lame_duck + budget.work)
            self._header.deadline = guarded("deadline", deadline_of_the_stop)(own) or own
        if not guarded("forward", self._coordinator.descendants.forwards)(signal.SIGTERM, unless_it_stops=is_first):
            self._header.stop_since = self._header.stop_since or clock.now_ns()

    def _stop_ancestors(self, sig: signal.Signals) -> None:
        # The active master speaks for the service; any other ends alone.
        if self._generation.phase is not Phase.RETIRING and not self._generation.awaits_promotion:
            self._ancestors_know = True
            guarded("forward", self._coordinator.ancestors.tell)(sig)

    def handle_int(self) -> None:
        """SIGINT keeps gunicorn's meaning: stop now."""
        self._end_now(signal.SIGINT, self._gunicorn_int)

    def handle_quit(self) -> None:
        """SIGQUIT keeps gunicorn's meaning: stop now."""
        self._end_now(signal.SIGQUIT, self._gunicorn_quit)

    def _end_now(self, sig: signal.Signals, end: Callable[[], None]) -> None:
        # After a handover the signal is meant for the service, and not for this generation alone.
        self._generation.read_predecessor()
        guarded("termination message", self._note_end)(sig)
        self._prepare_to_end(sig)
        try:
            end()
        except StopIteration:
            self._halt_if_ended_booting()
            raise

    def _note_end(self, sig: signal.Signals) -> None:
        """Have a start that a signal ends be a failed one, whose message says how far it had come."""
        if self._generation.phase is not Phase.BOOTING or self._ended_booting:
            return
        seconds = clock.since(self._header.started_at)
        progress = boot_progress.progress(self._generation.board.snapshot())
        self._ended_booting = f"ended by {sig.name} while it booted, after {seconds:.1f} s: {progress}"
        self._start_message.failed(self._ended_booting)

    def _halt_if_ended_booting(self) -> None:
        if self._ended_booting:
            raise HaltServer(log.one_line(self._ended_booting), termination_message.ENDED_WHILE_BOOTING)

    def _prepare_to_end(self, sig: signal.Signals) -> None:
        guarded("cancel", self._cancel)(sig)
        guarded("release_predecessor", self._generation.release_predecessor)()
        guarded("forward", self._coordinator.descendants.forwards)(sig)
        self._stop_ancestors(sig)
        if self._generation.predecessor is not None:
            guarded("pid file", self._generation.predecessor.unlink_pid_file)()
        guarded("systemd", self._notifier.ends_now)(STOP_NOW_WITHIN)
        self._ends_now = True
        # What gunicorn does from here on, beginning with the listeners, is not a phase of ours.
        self._header.phase = Phase.STOPPED
        # gunicorn waits for so long before it kills, and means a stop that finishes what it has:
        # test_stop_kills_after_the_graceful_timeout.
        self._server.cfg.set("graceful_timeout", min(self._server.cfg.graceful_timeout, STOP_NOW_WITHIN))

    def _cancel(self, sig: signal.Signals) -> None:
        self._reload.cancel()
        self._coordinator.cancel(sig)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        """End the process as gunicorn does, and in time, whatever threads of the app do."""
        # With `preload_app` threads that the app starts at import are the master's. Not for one that is to end now, or
        # has not served: it has promised nothing.
        until = clock.now_ns()
        if self._gate.opened and not self._ends_now:
            is_stop = self._header.stop_since and self._header.deadline
            until = self._header.deadline if is_stop else clock.after_ns(self._settings.recycle_timeout)
        try:
            self._gunicorn_halt(reason, exit_status)
        finally:
            # Python restores the default actions as it ends: a late signal would change the exit status.
            self._server.ignore_signals()
            threads = process_exit.wait(process_exit.waited_for, lambda: until, self._tick)
            if threads:
                process_exit.name(threads)
                process_exit.end(exit_status)
            process_exit.bound(until, lambda: None, exit_status)

    def _tick(self) -> None:
        # It waits, and is not stuck: its predecessor and the commands look.
        self._header.tick_at = clock.now_ns()

    def end_when_no_worker_is_left(self) -> None:
        """End the loop, unless a cancelled successor is still here. Raises `StopIteration` or `HaltServer`."""
        if self._coordinator.waits_for_failed(self.ends_at):
            return
        if self._header.successor_pid:
            self._coordinator.follow_last_accepts()
            # gunicorn's reaper has forgotten a successor that was succeeded itself, and would unlink the socket.
            self._server.set_successor(self._header.successor_pid)
        seconds = self._leaving_for()
        self._header.drain_took = int(seconds * 1e9)
        said: dict[str, Any] = {}
        if self._header.stop_since:
            said = self._late.fields(self._settings.drain_delay, self._settings.grace_period, self._cut)
            if self._closed_idle:
                said["closed_idle"] = self._closed_idle
        if self._listening.is_left_to_others:
            # Nothing was refused: connections have gone to the others on the port.
            said.pop("remedy", None)
        late = bool(self._abandoned or self._cut) and clock.passed(self.ends_at)
        self._generation.move(Event.FINISHED, late_arrivals.level(said), seconds=seconds, **said)
        abandoned = late or self._killed_at_work
        if abandoned:
            self._emit_abandoned(workers=0, requests=self._cut, tasks=self._abandoned, seconds=seconds)
        self._leave(abandoned=abandoned)

    @property
    def ends_at(self) -> int:
        """When what is in hand is cut off: at a stop's deadline, or when a retirement has taken too long."""
        if self._generation.phase is Phase.RETIRING and not self._header.deadline:
            return self._header.phase_since + int(self._settings.retire_timeout * 1e9)
        return self._header.deadline

    def end_at_the_deadline(self) -> None:
        """Kill what is left once the deadline has passed, and end the loop as `end_when_no_worker_is_left()` does."""
        deadline = self.ends_at
        if deadline == clock.NEVER or clock.since(deadline) < self._settings.stop_budget().abandon_window:
            return
        requests = self._generation.board.snapshot().in_flight + self._cut
        tasks = self._roster.unfinished() + self._abandoned
        served = any(member.state not in (WorkerState.BOOTING, WorkerState.READY) for member in self._roster.members())
        killed = self._roster.kill()
        # A worker that only stood still has lost no work: logged, but not a reason for another exit status.
        abandoned = bool(requests or tasks)
        if abandoned or served:
            self._emit_abandoned(killed, requests, tasks, self._leaving_for())
        self._reap_the_killed()
        self._leave(abandoned=abandoned)

    def _reap_the_killed(self) -> None:
        # gunicorn's stop() looks ten times a second, and sleeps once more when all are reaped
        # (test_stop_sleeps_once_more_when_all_are_reaped): time that a service does not have at the end of its
        # GRACE_PERIOD.
        until = time.monotonic() + REAP_WITHIN
        self._server.reap_workers()
        while self._server.has_workers and time.monotonic() < until:
            time.sleep(REAP_EVERY)
            self._server.reap_workers()

    def _emit_abandoned(self, workers: int, requests: int, tasks: int, seconds: float) -> None:
        said: dict[str, Any] = {"workers": workers, "requests": requests, "tasks": tasks, "seconds": seconds}
        if not self._header.deadline:
            # The service goes on, and has no termination to give a reason for.
            limit = f"RETIRE_TIMEOUT = {self._settings.retire_timeout:g}"
            log.emit("drain.abandoned", logging.ERROR, **said, limit=limit)
            return
        log.emit("drain.abandoned", logging.ERROR, **said)
        log.leave_a_message(
            self._settings.termination_log,
            f"zdd_web: {requests} requests and {tasks} background tasks were abandoned after {seconds:.0f} s, when "
            f"GRACE_PERIOD = {self._settings.grace_period:g} was over; see event=background.abandoned in the log",
        )

    def _leave(self, *, abandoned: bool) -> NoReturn:
        if self._header.successor_pid and self._coordinator.descendants.becomes_the_keeper:
            self._end_with_the_service()
            # What gunicorn's halt() would do, short of the exit: test_halt_ends_in_this_order.
            self._server.suspend_control_server()
            self._server.stop()
            # stop() reaps: the kernel cannot be asked again for the status of a service that ended meanwhile.
            self._end_with_the_service()
            self._become_keeper()
        if abandoned:
            raise HaltServer("work was abandoned at the deadline", self._settings.abandon_status)
        self._halt_if_ended_booting()
        raise StopIteration

    def _end_with_the_service(self) -> None:
        status = self._coordinator.descendants.identity_status()
        if status is not None:
            raise HaltServer("the service was stopped", status)

    def _become_keeper(self) -> NoReturn:
        self._server.call_on_exit()
        log.emit("keeper.started", pid=os.getpid(), successor=self._header.successor_pid)
        keeper.become(
            self._header.name,
            self._header.successor_pid,
            self._server.take_queued_signals,
        )

    def _leaving_for(self) -> float:
        return clock.since(self._header.stop_since or self._header.phase_since)
