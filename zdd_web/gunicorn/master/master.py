"""The master: the only writer of the phase.

Theory of operation
-------------------
A handful of the arbiter's methods are replaced on the *instance* when `on_starting` runs. gunicorn's loop looks them up
by name on each round (tests/contract: test_loop_looks_its_methods_up_on_the_instance_each_turn):

    maybe_promote_master   the tick: read what other processes sent, move the phase
    handle_term, _usr2, _hup, _int, _quit
    manage_workers         spawn, retire, and end: the drain happens here and not in `stop()`, which closes the
                           listeners first, blocks, kills without a word and exits 0
    reap_workers           read exit statuses before gunicorn discards them

Everything of ours runs in that one loop, in one thread, so nothing here needs a lock. The loop ends by gunicorn's own
means: `StopIteration` and `HaltServer`. Each replacement stands behind the boundary (adapter/boundary.py).

The master's roles each have a module of their own: `PredecessorLink` (it has a predecessor), `UpgradeCoordinator` (it
has a successor), `Boot` (it is about to serve), `Reload`, `Roster` and `Workforce` (its workers), `Capacity` (how
many), `Stop` (its end). Each receives the `Generation` (context.py) and what else it uses; none receives the master.
They move the phase through `Generation.move()`, which runs the entry actions of `lifecycle.ON_ENTRY`.

While something is under way the loop is made to turn fifty times a second instead of once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from zdd_web import log, process
from zdd_web.board import Board, Slot
from zdd_web.errors import SettingsError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade, silence_systemd, tell_exits
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.exits import HaltServer
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.log_rotation import AdjacentGeneration, Rotation
from zdd_web.gunicorn.master import heap
from zdd_web.gunicorn.master.boot import Boot
from zdd_web.gunicorn.master.manage_workers import Workforce
from zdd_web.gunicorn.master.probe_process import ProbePort
from zdd_web.gunicorn.master.reload import Reload
from zdd_web.gunicorn.master.stop import Stop
from zdd_web.gunicorn.master.worker_count import Capacity, too_many_workers
from zdd_web.gunicorn.master.worker_roster import Roster
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.sockets.exchange import Exchange
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.systemd_notifier import SystemdNotifier
from zdd_web.gunicorn.termination_message import StartMessage
from zdd_web.gunicorn.upgrade.canary import Canary
from zdd_web.gunicorn.upgrade.coordinator import UpgradeCoordinator
from zdd_web.gunicorn.upgrade.deploy_history import Deploys
from zdd_web.gunicorn.upgrade.predecessor_link import PredecessorLink
from zdd_web.gunicorn.upgrade.takeover import TakeoverListener
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.gunicorn.workers.orders import Once
from zdd_web.lifecycle import Phase
from zdd_web.settings import IN_KUBERNETES, Settings
from zdd_web.system import clock, pauses, proc
from zdd_web.system.boot_log import StderrRelay

#: How often the loop turns while something is under way, seconds.
BUSY_TICK = 0.02
IDLE_TICK = 1.0


class Master:
    """What zdd_web adds to gunicorn's arbiter, in the master's process."""

    def __init__(
        self,
        server: ArbiterFacade,
        settings_in_force: Callable[[], Settings],
        launch: Launch,
        name: str,
        inherited: Inheritance | None,
    ) -> None:
        settings = settings_in_force()
        self.server = server
        self.board = Board.create(name)
        self.header = self.board.header
        self.generation = Generation(self.board, settings_in_force)
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
        self.generation.predecessor = self.predecessor_link
        self.canary = Canary(server, inherited.canary if inherited else "")
        self._inherited_as_kept = inherited.kept if inherited else False
        self.deploys = Deploys(self.header, launch, server.cfg.chdir, settings.release, inherited)
        self.notifier = SystemdNotifier(self.generation, inherited, self.roster.__len__, self.not_now)
        self.stderr_relay = StderrRelay(inherited.stderr_pipes if inherited else ())
        self.listening = ListenerManager(server, self.generation, inherited)
        self.boot = Boot(
            self.generation,
            self.roster,
            self.listening,
            lambda: self.predecessor_link,
            required=lambda: self.canary.at_gate,
        )
        self.exchange = Exchange(inherited, is_on=settings.hand_over_connections)
        self.coordinator = UpgradeCoordinator(
            server,
            self.generation,
            self.deploys,
            inherited,
            self.listening,
            self.notifier,
            given=self._fields_to_inherit,
            reloads=lambda: self.reload.under_way,
            all_leave=lambda: self.roster.all_leave,
            close_takeover=lambda: self.takeover.close(),
        )
        self.takeover = TakeoverListener(self.generation, self.coordinator.admit)
        self.reload = Reload(
            server,
            self.generation,
            self.listening,
            self.notifier,
            forwards=self.coordinator.descendants.forwards,
            obstacle=self.not_now,
            has_room=lambda: bool(self.roster.room),
            done=self._reloaded,
            note=self.deploys.reloaded,
            release=lambda: self.deploys.label,
        )
        self.rotation = Rotation(self._reopen_logs, self._adjacent_generations)
        self.capacity = Capacity(server, self.header.slot_count, self.not_now)
        self.stop = Stop(
            server,
            self.generation,
            self.roster,
            self.listening,
            self.notifier,
            self.coordinator,
            self.reload,
            self.gate,
            self.start_message,
        )
        self.workforce = Workforce(
            server,
            self.generation,
            self.roster,
            self.listening,
            self.capacity,
            lambda: self.canary.wanted,
            self.stop,
            self.gate,
            self.start_message,
        )
        self.generation.on_move(
            self.roster.__len__,
            self.notifier.moved,
            {
                "open_gate": self._open_gate,
                "block_new_connections": self._block_new_connections,
                "drain_unwanted_listeners": self.coordinator.drain_unwanted_listeners,
                "retire_workers": self.workforce.retire_all,
            },
        )
        process.attach(self.board, None, settings)
        log.use_generation(self.header.generation)
        self.probes = ProbePort(
            server, self.board, settings, inherited, self.listening.probe_socket, forget=self.deploys.after_fork
        )
        if inherited is None:
            # Before `preload_app` loads the app: this may take a minute, and probes are answered from now on.
            self.probes.start(None)

    # -- start

    def take_over(self) -> None:
        """Replace the arbiter's methods on this instance; called from `on_starting`."""
        server = self.server
        # `Workforce` decides.
        server.survive_failed_boots()
        tell_exits(self._reaped)
        silence_systemd()
        server.replace("maybe_promote_master", guarded("tick", self.tick))
        server.replace("manage_workers", self.workforce.follow)
        self._gunicorn_reap: Callable[[], None] = server.replace(
            "reap_workers", guarded("reap_workers", self.reap_workers)
        )
        self._gunicorn_stop: Callable[[bool], None] = server.replace("stop", self._stop)
        self.stop.take_over()
        server.replace("handle_hup", guarded("handle_hup", self.reload.request))
        server.replace("handle_usr2", guarded("handle_usr2", self.coordinator.request))
        self._gunicorn_usr1: Callable[[], None] = server.replace(
            "handle_usr1", guarded("handle_usr1", self.rotation.request)
        )
        server.set_wait(self._interval)
        self.capacity.take_over()
        if self.generation.settings.keep_pid:
            # Grandchildren whose master retired become ours, and the keeper's after us.
            proc.become_subreaper()
            for sig in (signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH):
                server.replace_handler(sig, partial(self._unless_forwarded, sig))
        if self.predecessor_link is not None:
            self.predecessor_link.adopt(
                self.listening, takes_connections=self.exchange.is_taken_from(server.cfg), canary=self.canary.size
            )
        else:
            if server.pid_file is not None:
                server.set_pid_file(PidFile(server.pid_file.fname, os.getpid()))
            self.listening.take()
            self.takeover.open()
        self.probes.start(self.predecessor_link)
        self.start_message.doing("its workers booted")
        self._note_workers()
        settings = self.generation.settings
        log.emit("boot.started", pid=os.getpid(), workers=self.canary.wanted, listener=settings.listener,
                 grace_period=settings.grace_period, drain_delay=settings.drain_delay,
                 kubernetes="yes" if IN_KUBERNETES in os.environ else "no", name=self.header.name,
                 release=self.deploys.label, **self.canary.described)  # fmt: skip
        heap.freeze()

    def _interval(self) -> float:
        if self.generation.phase is Phase.SERVING and self._settled():
            return min(IDLE_TICK, self.notifier.interval)
        return BUSY_TICK

    def _settled(self) -> bool:
        if (
            self.coordinator.under_way
            or self.generation.awaits_promotion
            or self.reload.under_way
            or self.takeover.busy
        ):
            return False
        if self.listening.is_busy or self.stderr_relay.busy:
            return False
        return not self.roster.any_leaves

    # -- the tick

    def tick(self) -> None:
        """One turn of the loop: read what other processes sent, then move the phase."""
        pauses.turn()
        self.header.tick_at = clock.now_ns()
        self.capacity.limit()
        self._note_workers()
        # A reload may change it.
        self.header.worker_timeout = int(self.server.cfg.timeout * 1e9)
        self.header.boot_timeout = int(self.generation.settings.upgrade_timeout * 1e9)
        self.header.worker_uid = self.server.cfg.uid + 1
        try:
            if self.predecessor_link is not None and self.predecessor_link.follow():
                self.predecessor_link = self.generation.predecessor = None
            self.canary.follow(self.predecessor_link)
            if self.generation.phase is Phase.BOOTING:
                self.boot.follow()
        except HaltServer as halt:
            # No other error ends the start from here: the loop goes on.
            self.start_message.failed(str(halt.reason))
            raise
        # Whatever may go wrong below, a lame duck ends.
        self.stop.follow()
        guarded("history", self.deploys.follow)(is_active=not self.generation.awaits_promotion)
        self.coordinator.follow()
        if self.predecessor_link is None or self.predecessor_link.is_active or self.predecessor_link.alone:
            # The predecessor does it until then.
            guarded("stderr", self.stderr_relay.follow)()
        guarded("takeover", self.takeover.follow)()
        self.reload.follow()
        self.rotation.follow()
        guarded("probe port", self.probes.follow)(
            self.generation, self.coordinator.upgrade, lambda: self.roster.any_serves
        )
        if self.roster.serving() >= self.canary.wanted:
            self.roster.booted()
        # Last: nothing that moves the phase waits for them.
        guarded("systemd", self.notifier.follow)()
        if self.generation.phase is Phase.SERVING and self.predecessor_link is None and not self.coordinator.under_way:
            guarded("listeners", self.listening.fit)(self.server.num_workers)
        guarded("listeners", self.listening.note)()

    def _note_workers(self) -> None:
        self.header.workers_wanted, self.header.workers_full = self.canary.wanted, self.server.num_workers

    def _open_gate(self) -> None:
        self.gate.open()
        self.start_message.served()

    @property
    def kept(self) -> bool:
        """Whether a gunicorn goes on to use all of the listeners when this service has ended."""
        return self._inherited_as_kept or self.server.has_stock_predecessor

    def _fields_to_inherit(self) -> dict[str, Any]:
        probe, probe_bind = self.probes.inheritance
        return {
            "probe": probe,
            "probe_bind": probe_bind,
            "kept": self.kept,
            "stderr_pipes": self.stderr_relay.pipes,
            **self.exchange.inheritance(),
        }

    def _reloaded(self) -> None:
        # A new configuration is in force: every worker is to be replaced.
        self.roster.outdate()
        # What could not boot before may well do now: it was proved a moment ago.
        self.roster.booted()
        self.header.reload_number += 1
        settings = self.generation.settings
        guarded("release", self.deploys.identify)(settings.release)
        guarded("probe port", self.probes.renew)(settings)

    # -- what a person asks of it

    def not_now(self) -> str:
        """Say why the workers are not to be touched just now; "" when nothing is under way."""
        if self.generation.phase is not Phase.SERVING:
            return f"the generation is {self.generation.phase.label}"
        if self.coordinator.under_way or self.generation.awaits_promotion:
            return "an upgrade is under way"
        return "a reload is under way" if self.reload.under_way else ""

    def _reopen_logs(self) -> None:
        guarded("probe port", self.probes.reopen_logs)()
        self._gunicorn_usr1()

    def _adjacent_generations(self) -> list[AdjacentGeneration]:
        """The generations that this one has a channel to."""
        return [
            each
            for each in (self.predecessor_link, self.coordinator.upgrade, *self.coordinator.failed)
            if each is not None
        ]

    def _unless_forwarded(self, sig: signal.Signals, handler: Callable[[], None]) -> Callable[[], None]:
        def handle() -> None:
            if not guarded("forward", self.coordinator.descendants.forwards)(sig):
                handler()

        return handle

    def _block_new_connections(self) -> None:
        if self.kept or self.header.successor_pid or self.generation.awaits_promotion:
            self.listening.keep(but_added=self.generation.awaits_promotion)
        else:
            self.listening.shut()

    def _stop(self, graceful: bool = True) -> None:
        # gunicorn's own closes them in an order of its own, and cannot close an abstract Unix socket.
        is_last = not (
            self.kept or self.server.successor_pid or self.header.successor_pid or self.generation.awaits_promotion
        )
        guarded("takeover", self.takeover.close)()
        guarded("takeover", self.coordinator.failed.kill)()
        guarded("listeners", lambda: self.listening.close(for_good=is_last))()
        self._gunicorn_stop(graceful)

    def reap_workers(self) -> None:
        """Have gunicorn reap all but the probe port's process, which it does not know."""
        self.probes.look()
        self._gunicorn_reap()

    def _reaped(self, pid: int, status: int) -> None:
        self.roster.reaped(pid, status)
        for child in (self.coordinator.upgrade, *self.coordinator.failed, self.reload.proof):
            if child is not None and child.pid == pid:
                child.reaped(status)

    # -- in the children

    def after_fork(self, slot: Slot) -> None:
        """Take from a worker what is the master's alone: its death must be seen, and its words must be its own."""
        self.board.restrict(slot)
        self.server.own_exit_statuses()
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
