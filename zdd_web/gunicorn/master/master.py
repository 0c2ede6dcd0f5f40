"""The master: the only writer of the phase.

Theory of operation
-------------------
A handful of the arbiter's methods are replaced on the *instance* when `on_starting` runs. gunicorn's loop
(arbiter.py:250-272) looks them up by name on each round:

    maybe_promote_master   the tick: hear what others said, move the phase
    handle_term, _usr2, _hup, _int, _quit
    manage_workers         spawn, retire, and end: the drain happens here and not in `stop()`, which closes the
                           listeners first, blocks, kills without a word and exits 0
    reap_workers           hear of exit statuses before gunicorn throws them away

Everything of ours runs in that one loop, in one thread, so nothing here needs a lock. The loop ends by gunicorn's own
means: `StopIteration` and `HaltServer`. Each replacement stands behind the boundary (boundary.py).

The master's roles each have a module of their own, and move the phase through `Master.move()`: `PredecessorLink`
(it has a predecessor), `UpgradeCoordinator` (it has a successor), `Reload`, `Roster` (its workers), `Stop` (its end).

While something is under way the loop is made to turn fifty times a second instead of once.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from gunicorn.errors import HaltServer

from zdd_web import lifecycle, log, process
from zdd_web.board import Board, Slot, WorkerState
from zdd_web.errors import SettingsError
from zdd_web.gunicorn import settings_sources
from zdd_web.gunicorn.adapter import compat
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.handoff.handover import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.log_rotation import AdjacentGeneration, Rotation
from zdd_web.gunicorn.master.probe_process import ProbePort
from zdd_web.gunicorn.master.reload import Reload, too_many_workers
from zdd_web.gunicorn.master.roster import Plan, Roster, plan
from zdd_web.gunicorn.master.stop import Stop
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.sockets.manager import ListenerManager
from zdd_web.gunicorn.systemd import SystemdNotifier
from zdd_web.gunicorn.termination_message import StartMessage
from zdd_web.gunicorn.upgrade.accession import PredecessorLink
from zdd_web.gunicorn.upgrade.coordinator import UpgradeCoordinator
from zdd_web.gunicorn.upgrade.deploys import Deploys
from zdd_web.gunicorn.upgrade.takeover import TakeoverListener
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.gunicorn.workers.orders import Once
from zdd_web.lifecycle import Event, Phase
from zdd_web.settings import IN_KUBERNETES, Settings
from zdd_web.system import clock, pauses, proc
from zdd_web.system.boot_log import StderrRelay

#: How often the loop turns while something is under way, seconds.
BUSY_TICK = 0.02
IDLE_TICK = 1.0

#: How long after its deadline a worker that was told to leave is killed, seconds, beside what naming its work takes.
OVERDUE_SLACK = 5.0

NO_EXIT_STATUS = -1


class Master:
    """What zdd_web adds to gunicorn's arbiter, in the master's process."""

    def __init__(
        self, server: Any, settings: Settings, launch: Launch, name: str, inherited: Inheritance | None
    ) -> None:
        self.server, self.settings = server, settings
        self.board = Board.create(name)
        self.header = self.board.header
        too_many = too_many_workers(server.num_workers, self.header.slot_count)
        if too_many:
            self.board.close()
            raise SettingsError(too_many)
        self.header.generation = inherited.generation if inherited else 1
        self.header.predecessor_pid = inherited.predecessor if inherited else 0
        self.header.master_start = proc.start_time(os.getpid())
        self.header.started_at = self.header.phase_since = clock.now_ns()
        self.header.master_pid = os.getpid()
        was_started = inherited is None or inherited.taken
        self.start_message = StartMessage(settings.termination_log if was_started else "")
        self.start_message.doing("importing the app (preload_app)" if server.cfg.preload_app else "starting")
        self.gate = Gate()
        self.once = Once()
        self.roster = Roster(server, self.board)
        self.predecessor_link = PredecessorLink(inherited, server, self.board) if inherited else None
        self._inherited_as_kept = inherited.kept if inherited else False
        self.deploys = Deploys(self.header, launch, server.cfg.chdir, settings.release, inherited)
        self.notifier = SystemdNotifier(self, inherited)
        self.stderr_relay = StderrRelay(inherited.stderr_pipes if inherited else ())
        self.coordinator = UpgradeCoordinator(self, inherited)
        self.takeover = TakeoverListener(self)
        self.reload = Reload(self)
        self.rotation = Rotation(self._reopen_logs, self._adjacent_generations)
        self.stop = Stop(self)
        self._has_room = True
        self.listening = ListenerManager(server, self.board, settings, inherited)
        process.attach(self.board, None, settings)
        log.use_generation(self.header.generation)
        self.probes = ProbePort(
            server, self.board, settings, inherited, self.listening.probe_socket, forget=self.deploys.after_fork
        )
        if inherited is None:
            # Before `preload_app` loads the app: this may take a minute, and probes are answered from now on.
            self.probes.start(None)

    @property
    def phase(self) -> Phase:
        """The phase of this generation."""
        return Phase(self.header.phase)

    # -- start

    def take_over(self) -> None:
        """Replace the arbiter's methods on this instance; called from `on_starting`."""
        server = self.server
        self._gunicorn_reap: Callable[[], None] = server.reap_workers
        self._gunicorn_winch: Callable[[], None] = server.handle_winch
        self._gunicorn_ttin: Callable[[], None] = server.handle_ttin
        self._gunicorn_stop: Callable[[bool], None] = server.stop
        self._gunicorn_usr1: Callable[[], None] = server.handle_usr1
        # gunicorn's reaper ends the service at these exit statuses (arbiter.py:681), up to 23 out of a signal handler,
        # in the middle of anything. No process can exit with a negative one;
        # `_handle_exited_workers` decides, in the loop.
        server.WORKER_BOOT_ERROR = server.APP_LOAD_ERROR = NO_EXIT_STATUS
        compat.tell_exits(self._reaped)
        compat.silence_systemd()
        server.maybe_promote_master = guarded("tick", self.tick)
        server.manage_workers = self._manage_workers_guarded
        server.reap_workers = guarded("reap_workers", self.reap_workers)
        server.stop = self._stop
        self.stop.take_over()
        server.handle_hup = guarded("handle_hup", self.reload.request)
        server.handle_usr2 = guarded("handle_usr2", self.coordinator.request)
        server.handle_usr1 = guarded("handle_usr1", self.rotation.request)
        compat.set_wait(server, self._interval)
        server.handle_winch = guarded("handle_winch", self.handle_winch)
        server.handle_ttin = guarded("handle_ttin", self.handle_ttin)
        if self.settings.keep_pid:
            # Grandchildren whose master retired become ours, and the keeper's after us.
            proc.become_subreaper()
            for sig in (signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH):
                handler = f"handle_{sig.name[3:].lower()}"
                setattr(server, handler, self._unless_forwarded(sig, getattr(server, handler)))
        if self.predecessor_link is not None:
            self.predecessor_link.adopt(self.listening)
        else:
            if server.pidfile is not None:
                server.pidfile = PidFile(server.pidfile.fname, os.getpid())
            self.listening.take()
            self.takeover.open()
        self.probes.start(self.predecessor_link)
        self.start_message.doing("its workers booted")
        self.header.workers_wanted = server.num_workers
        log.emit("boot.started", pid=os.getpid(), workers=server.num_workers, listener=self.settings.listener,
                 grace_period=self.settings.grace_period, drain_delay=self.settings.drain_delay,
                 kubernetes="yes" if IN_KUBERNETES in os.environ else "no", name=self.header.name,
                 release=self.deploys.label)  # fmt: skip

    def _interval(self) -> float:
        if self.phase is Phase.SERVING and self._settled():
            return min(IDLE_TICK, self.notifier.interval)
        return BUSY_TICK

    def _settled(self) -> bool:
        if self.coordinator.under_way or self.awaits_promotion or self.reload.under_way or self.takeover.busy:
            return False
        if self.listening.is_busy or self.stderr_relay.busy:
            return False
        return all(member.state is WorkerState.SERVING and not member.told for member in self.roster.members())

    # -- the tick

    def tick(self) -> None:
        """One round of the loop: hear what others said, then move the phase."""
        pauses.turn()
        self.header.tick_at = clock.now_ns()
        if self.server.num_workers > self.header.slot_count:
            # By gunicorn's control socket (`worker add`), which asks no handler of ours.
            self._refuse_workers(self.server.num_workers, request="workers")
            self.server.num_workers = self.header.slot_count
        self.header.workers_wanted = self.server.num_workers
        # A reload may change it.
        self.header.worker_timeout = int(self.server.cfg.timeout * 1e9)
        self.header.boot_timeout = int(self.settings.upgrade_timeout * 1e9)
        self.header.worker_uid = self.server.cfg.uid + 1
        try:
            if self.predecessor_link is not None and self.predecessor_link.follow():
                self.predecessor_link = None
            if self.phase is Phase.BOOTING:
                self._follow_boot()
        except HaltServer as halt:
            # No other error ends the start from here: the loop goes on.
            self.start_message.failed(str(halt.reason))
            raise
        # Whatever may go wrong below, a lame duck ends.
        self.stop.follow()
        guarded("history", self.deploys.follow)(is_active=not self.awaits_promotion)
        self.coordinator.follow()
        if self.predecessor_link is None or self.predecessor_link.is_active or self.predecessor_link.alone:
            # The predecessor does it until then.
            guarded("stderr", self.stderr_relay.follow)()
        guarded("takeover", self.takeover.follow)()
        self.reload.follow()
        self.rotation.follow()
        guarded("probe port", self.probes.follow)(self)
        if self.roster.serving() >= self.server.num_workers:
            self.roster.booted()
        # Last: nothing that moves the phase waits for them.
        guarded("systemd", self.notifier.follow)()
        if self.phase is Phase.SERVING and self.predecessor_link is None and not self.coordinator.under_way:
            guarded("listeners", self.listening.fit)(self.server.num_workers)
        guarded("listeners", self.listening.note)()

    def move(self, event: Event, level: int = logging.INFO, **fields: Any) -> None:
        """Enter the phase that follows upon an event, and say so. Raises `LifecycleError` when there is none."""
        since, before = self.header.phase_since, self.phase
        phase = lifecycle.after(before, event)
        if phase is before:
            return
        self.header.phase_since = clock.now_ns()
        self.header.phase = phase
        log.emit(f"phase.{phase.label}", level, after=round(clock.since(since), 3), workers=len(self.roster), **fields)
        guarded("systemd", self.notifier.moved)(before, phase)

    def _handle_exited_workers(self) -> None:
        for gone in self.roster.reconcile():
            self.stop.count(gone)
            self.header.requests_gone += gone.requests
            self.header.server_errors_gone += gone.server_errors
            self.header.late_gone += gone.late
            if self.gate.opened and not gone.told and gone.state in (WorkerState.READY, WorkerState.SERVING):
                self.header.lost_pid, self.header.lost_status = gone.pid, gone.status or 0
            self.header.workers_lost += gone.lost
            if gone.told or gone.state not in (WorkerState.BOOTING, WorkerState.READY):
                continue
            why = "; ".join(part for part in (gone.ended, gone.error) if part) or "no reason given"
            reason = f"worker {gone.pid} ended before it served: {why}"
            if self.phase is Phase.BOOTING and self.predecessor_link is not None and not self.predecessor_link.alone:
                self.predecessor_link.fail(reason)
                raise HaltServer(log.one_line(reason), type(self.server).WORKER_BOOT_ERROR)
            if self.phase is Phase.BOOTING and gone.could_not_boot:
                raise HaltServer(log.one_line(reason), gone.exit_status)
            if self.phase in lifecycle.SPAWNING:
                wait = self.roster.boot_failed()
                self.start_message.doing(f"its workers booted; {reason}")
                log.emit(
                    "worker.boot_failed",
                    logging.ERROR,
                    pid=gone.pid,
                    error=why,
                    retry_in=wait,
                )

    def _follow_boot(self) -> None:
        ready = sum(member.state is WorkerState.READY for member in self.roster.members())
        if ready < self.server.num_workers:
            return
        if self.predecessor_link is None or self.predecessor_link.may_serve(ready):
            self._serve()

    def _serve(self) -> None:
        if self.predecessor_link is not None:
            self.predecessor_link.about_to_serve()
        try:
            self.listening.open()
        except OSError as error:
            reason = f"the listeners cannot listen: {error.strerror}"
            if self.predecessor_link is not None:
                self.predecessor_link.fail(reason)
            raise HaltServer(log.one_line(reason), type(self.server).WORKER_BOOT_ERROR) from None
        self.header.ready_at = clock.now_ns()
        self.move(Event.READY, pid=os.getpid())
        self.gate.open()
        self.start_message.served()

    @property
    def kept(self) -> bool:
        """Whether a gunicorn goes on to use all of the listeners when this service has ended."""
        return self._inherited_as_kept or compat.has_stock_predecessor(self.server)

    # -- as a successor

    @property
    def awaits_promotion(self) -> bool:
        """Whether the predecessor has not handed over yet."""
        return self.predecessor_link is not None and not self.predecessor_link.is_active

    def release_predecessor(self) -> None:
        """Tell a predecessor that still retires not to come back."""
        if self.predecessor_link is not None:
            self.predecessor_link.release()

    def reloaded(self) -> None:
        """Have everybody replaced, now that a new configuration is in force."""
        self.roster.outdate()
        # What could not boot before may well do now: it was proved a moment ago.
        self.roster.booted()
        self.header.reload_number += 1
        settings = settings_sources.settle(self.server.cfg)
        guarded("release", self.deploys.identify)(settings.release)
        guarded("probe port", self.probes.renew)(settings)

    # -- what a person asks of it

    def handle_winch(self) -> None:
        """SIGWINCH to a daemon takes all workers away, until others are asked for; to anybody else it means nothing."""
        reason = self.not_now()
        if self.server.cfg.daemon and reason:
            log.emit("refused", logging.WARNING, signal="WINCH", reason=reason,
                      remedy="an upgrade takes the old workers away by itself")  # fmt: skip
            return
        self._gunicorn_winch()

    def handle_ttin(self) -> None:
        """SIGTTIN: one more worker, if the board has a slot for it."""
        wanted = self.server.num_workers + 1
        if wanted > self.header.slot_count:
            self._refuse_workers(wanted, signal="TTIN")
            return
        self._gunicorn_ttin()

    def _refuse_workers(self, wanted: int, **by: Any) -> None:
        reason = too_many_workers(wanted, self.header.slot_count)
        log.emit("refused", logging.WARNING, **by, reason=reason, remedy="start another service beside this one")

    def not_now(self) -> str:
        """Say why the workers are not to be touched just now; "" when nothing is under way."""
        if self.phase is not Phase.SERVING:
            return f"the generation is {self.phase.label}"
        if self.coordinator.under_way or self.awaits_promotion:
            return "an upgrade is under way"
        return "a reload is under way" if self.reload.under_way else ""

    def _reopen_logs(self) -> None:
        guarded("probe port", self.probes.reopen_logs)()
        self._gunicorn_usr1()

    def _adjacent_generations(self) -> list[AdjacentGeneration]:
        """The generations that this one has a channel to."""
        return [
            each
            for each in (self.predecessor_link, self.coordinator.upgrade, self.coordinator.cancelled)
            if each is not None
        ]

    def _unless_forwarded(self, sig: signal.Signals, handler: Callable[[], None]) -> Callable[[], None]:
        def handle() -> None:
            if not guarded("forward", self.coordinator.forwards)(sig):
                handler()

        return handle

    # -- workers

    def manage_workers(self) -> None:
        """Spawn and retire as the roster plans, and end the loop when nobody is left or the deadline passed."""
        # After the reaper and before anybody is spawned in place of one whose end should end the start.
        self._handle_exited_workers()
        # Those of a reload or a SIGTTIN.
        self.roster.note_forks()
        if self.gate.opened or (self.predecessor_link is not None and self.predecessor_link.alone):
            # A first start takes as long as it takes; a successor whose predecessor died shall not hang for ever.
            self.roster.give_up_boots(self.settings.upgrade_timeout)
        if self.phase is Phase.DRAINING and not self.header.blocked_since:
            guarded("block_new_connections", self._close_door)()
        if self.phase in (Phase.DRAINING, Phase.RETIRING):
            guarded("listeners", self.listening.follow)()
            if not self.server.WORKERS:
                self.stop.end_when_no_worker_is_left()
            else:
                self.stop.end_at_the_deadline()
        decision = plan(self.roster.members(), self.server.num_workers, self.phase, self.roster.room)
        self._note_room(decision)
        if self.roster.may_spawn():
            for _ in range(decision.spawn):
                self._spawn()
        deadline = self.stop.ends_at
        if self.phase in lifecycle.SPAWNING:
            deadline = clock.after_ns(self.settings.recycle_timeout)
            slack = self.settings.stop_budget().abandon_window + OVERDUE_SLACK
            for pid in self.roster.kill_overdue(slack):
                log.emit("worker.overdue", logging.ERROR, pid=pid, timeout=self.settings.recycle_timeout)
        self.roster.retire(decision.retire, deadline)
        self.roster.repeat()

    def _spawn(self) -> None:
        master = os.getpid()
        try:
            self.server.spawn_worker()
            self.roster.note_forks()
        except Exception:
            if os.getpid() == master:
                raise
            # A worker for which gunicorn could not even print why it ends (arbiter.py:757): back here it would be a
            # second master, with this one's workers and listeners.
            os._exit(type(self.server).WORKER_BOOT_ERROR)

    def _note_room(self, decision: Plan) -> None:
        # Those that retire or leave make room by themselves.
        stuck = bool(decision.without_room) and not (decision.spawn or decision.retire or self._any_leaves())
        if stuck and self._has_room:
            log.emit("refused", logging.WARNING, request="replacement", workers=decision.without_room,
                     reason=f"all {self.header.slot_count} slots of the board are taken; the old workers serve on",
                     remedy="run fewer workers (SIGTTOU)")  # fmt: skip
        self._has_room = not stuck

    def _any_leaves(self) -> bool:
        return any(member.told or member.state is not WorkerState.SERVING for member in self.roster.members())

    def _manage_workers_guarded(self) -> None:
        # Before anybody is served, an error (a `pre_fork` of the user that raises) ends the start, as gunicorn has it.
        if self.gate.opened:
            guarded("manage_workers", self.manage_workers)()
            return
        try:
            with self.start_message.reporting():
                self.manage_workers()
        except Exception as error:
            if self.predecessor_link is not None and not isinstance(error, StopIteration):
                self.predecessor_link.fail(f"{type(error).__name__}: {error}")
            raise

    def _close_door(self) -> None:
        if self.kept or self.header.successor_pid or self.awaits_promotion:
            self.listening.keep(but_added=self.awaits_promotion)
        else:
            self.listening.shut()

    def _stop(self, graceful: bool = True) -> None:
        # gunicorn's own closes them in an order of its own, and cannot close an abstract Unix socket.
        is_last = not (self.kept or self.server.reexec_pid or self.header.successor_pid or self.awaits_promotion)
        guarded("takeover", self.takeover.close)()
        guarded("takeover", self.coordinator.end_given_up)()
        guarded("listeners", lambda: self.listening.close(for_good=is_last))()
        self._gunicorn_stop(graceful)

    def reap_workers(self) -> None:
        """Have gunicorn reap all but the probe port's process, which it does not know."""
        self.probes.look()
        self._gunicorn_reap()

    def _reaped(self, pid: int, status: int) -> None:
        self.roster.reaped(pid, status)
        for child in (self.coordinator.upgrade, self.coordinator.cancelled, self.reload.proof):
            if child is not None and child.pid == pid:
                child.reaped(status)

    # -- in the children

    def after_fork(self, slot: Slot) -> None:
        """Take from a worker what is the master's alone: its death must be seen, and its words must be its own."""
        self.board.restrict(slot)
        # Its own exit statuses are gunicorn's.
        del self.server.WORKER_BOOT_ERROR, self.server.APP_LOAD_ERROR
        self.gate.keep_reader()
        self.probes.after_fork()
        self.coordinator.after_fork()
        self.deploys.after_fork()
        self.reload.after_fork()
        self.stderr_relay.after_fork()
        self.takeover.after_fork()
        if self.predecessor_link is not None:
            self.predecessor_link.forget()
        if self.board.fd >= 0:
            os.close(self.board.fd)
            self.board.fd = -1
