"""The master: the only writer of the phase.

Theory of operation
-------------------
A handful of the arbiter's methods are replaced on the *instance* when `on_starting` runs. gunicorn's loop
(arbiter.py:250-272) looks them up by name on each round:

    maybe_promote_master   the tick: hear what others said, move the phase
    handle_term, _usr2, _hup, _int, _quit
    manage_workers         spawn, retire, and end: the drain happens here and not in `stop()`, which closes the
                           listeners first, blocks, kills without a word and exits 0
    reap_workers           look at exit statuses before gunicorn throws them away

Everything of ours runs in that one loop, in one thread, so nothing here needs a lock. The loop ends by gunicorn's own means:
`StopIteration` and `HaltServer`. Each replacement stands behind the boundary (boundary.py).

While something is under way the loop is made to turn fifty times a second instead of once.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

from gunicorn.errors import HaltServer

from zdd_web import clock, lifecycle, log, proc, process
from zdd_web.board import Board, UpgradeState, WorkerState
from zdd_web.errors import UpgradeError, ZddError
from zdd_web.gunicorn import bootlog, compat, reload
from zdd_web.gunicorn.boundary import guarded
from zdd_web.gunicorn.gate import Gate
from zdd_web.gunicorn.handover import Inheritance
from zdd_web.gunicorn.launch import Launch
from zdd_web.gunicorn.pidfile import PidFile
from zdd_web.gunicorn.roster import Roster, plan
from zdd_web.gunicorn.succession import Succession
from zdd_web.gunicorn.upgrade import Stage, Upgrade
from zdd_web.lifecycle import Event, Phase
from zdd_web.settings import Settings

#: How often the loop turns while something is under way, seconds.
BUSY_TICK = 0.02
IDLE_TICK = 1.0

#: A worker hears SIGTERM between two bytecodes; one that is deep in C code is busy and accepts nothing either.
LAST_ACCEPTS_WITHIN = 2.0

#: A generation that is stopped before it served has promised nothing.
BOOT_STOP_BUDGET = 2.0


class Master:
    """What zdd_web adds to gunicorn's arbiter, in the master's process."""

    def __init__(self, server: Any, settings: Settings, launch: Launch, name: str, heir: Inheritance | None) -> None:
        self.server, self.settings, self.launch = server, settings, launch
        self.board = Board.create(name)
        self.header = self.board.header
        self.header.generation = heir.generation if heir else 1
        self.header.predecessor_pid = heir.predecessor if heir else 0
        self.header.master_start = proc.start_time(os.getpid())
        self.header.started_at = self.header.phase_since = clock.now_ns()
        self.header.master_pid = os.getpid()
        self.gate = Gate()
        self.roster = Roster(server, self.board)
        self.upgrade: Upgrade | None = None
        self.succession = Succession(heir, server, self.board) if heir else None
        self.proof: reload.Proof | None = None
        self._lame_duck_ends = clock.NEVER
        self._boot_log = -1
        self._prepared = ""
        self._abandoned = 0
        self._halting = False
        self._upgrade_when_in_office = False
        self._stopping_since = clock.NEVER
        process.attach(self.board, None, settings)

    @property
    def phase(self) -> Phase:
        """The phase of this generation."""
        return Phase(self.header.phase)

    def emit(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        """Write an event line of this generation."""
        log.emit(event, level, generation=self.header.generation, **fields)

    # -- start

    def take_over(self) -> None:
        """Replace the arbiter's methods on this instance; called from `on_starting`."""
        server = self.server
        self._gunicorn_reap: Callable[[], None] = server.reap_workers
        self._gunicorn_int: Callable[[], None] = server.handle_int
        self._gunicorn_quit: Callable[[], None] = server.handle_quit
        server.maybe_promote_master = guarded("tick", self.tick)
        server.manage_workers = guarded("manage_workers", self.manage_workers)
        server.reap_workers = guarded("reap_workers", self.reap_workers)
        server.handle_term = guarded("handle_term", self.handle_term)
        server.handle_int = self.handle_int
        server.handle_quit = self.handle_quit
        server.handle_hup = guarded("handle_hup", self.handle_hup)
        server.handle_usr2 = guarded("handle_usr2", self.handle_usr2)
        compat.set_wait(server, self._interval)
        if self.succession is not None:
            self.succession.adopt()
        elif server.pidfile is not None:
            server.pidfile = PidFile(server.pidfile.fname, os.getpid())
        self.header.workers_wanted = server.num_workers
        self.emit("boot.started", pid=os.getpid(), workers=server.num_workers, listener=self.settings.listener,
                  name=self.header.name)  # fmt: skip

    def _interval(self) -> float:
        return IDLE_TICK if self.phase is Phase.SERVING and self._settled() else BUSY_TICK

    def _settled(self) -> bool:
        if self.upgrade is not None or self._awaits_office or self.proof is not None:
            return False
        return all(member.state is WorkerState.SERVING and not member.told for member in self.roster.members())

    # -- the tick

    def tick(self) -> None:
        """One round of the loop: hear what others said, then move the phase."""
        self.header.tick_at = clock.now_ns()
        self.header.workers_wanted = self.server.num_workers
        self._bury_workers()
        if self.succession is not None:
            self._follow_predecessor(self.succession)
        if self.phase is Phase.BOOTING:
            self._follow_boot()
        if self.upgrade is not None:
            self._follow_upgrade(self.upgrade)
        if self.proof is not None:
            self._follow_proof(self.proof)
        if self.phase is Phase.LAME_DUCK and clock.passed(self._lame_duck_ends):
            self._move(Event.LAME_DUCK_OVER)
        if self._settled():
            self.roster.booted()

    def _move(self, event: Event, **fields: Any) -> None:
        since = self.header.phase_since
        phase = lifecycle.after(self.phase, event)
        self.header.phase_since = clock.now_ns()
        self.header.phase = phase
        self.emit(f"phase.{phase.label}", after=round(clock.since(since), 3), workers=len(self.roster), **fields)

    def _bury_workers(self) -> None:
        for gone in self.roster.reconcile():
            self._abandoned += gone.abandoned
            if gone.told or gone.state not in (WorkerState.BOOTING, WorkerState.READY):
                continue
            reason = f"worker {gone.pid} ended before it served" + (f": {gone.error}" if gone.error else "")
            if self.phase is Phase.BOOTING and self.succession is not None and not self.succession.alone:
                self.succession.fail(reason)
                raise HaltServer(reason, self.server.WORKER_BOOT_ERROR)
            if self.phase in lifecycle.SPAWNING and self.gate.opened:
                wait = self.roster.boot_failed()
                self.emit(
                    "worker.boot_failed",
                    logging.ERROR,
                    pid=gone.pid,
                    error=gone.error or "no reason given",
                    retry_in=wait,
                )

    def _follow_boot(self) -> None:
        ready = sum(member.state is WorkerState.READY for member in self.roster.members())
        if ready < self.server.num_workers:
            return
        if self.succession is None or self.succession.may_serve(ready):
            self._serve()

    def _serve(self) -> None:
        self.header.ready_at = clock.now_ns()
        self._move(Event.READY, pid=os.getpid())
        self.gate.open()

    # -- as a successor

    @property
    def _awaits_office(self) -> bool:
        return self.succession is not None and not self.succession.in_office

    def _release_predecessor(self) -> None:
        if self.succession is not None:
            self.succession.release()

    def _follow_predecessor(self, succession: Succession) -> None:
        if succession.follow():
            self.succession = None
        if self._upgrade_when_in_office and not self._awaits_office:
            self._upgrade_when_in_office = False
            self.handle_usr2()

    # -- as a predecessor

    def handle_usr2(self) -> None:
        """SIGUSR2: begin an upgrade, or say why not."""
        if self._awaits_office and self.phase is Phase.SERVING:
            # A deploy right after a deploy: a second at most, and worth waiting for.
            self._upgrade_when_in_office = True
            return
        try:
            self._refuse_upgrade_unless_possible()
            if self._boot_log >= 0:
                os.close(self._boot_log)
            self._boot_log = self.header.boot_log_fd = bootlog.create()
            self.upgrade = Upgrade.begin(
                self.launch,
                self.header.generation + 1,
                [listener.fileno() for listener in self.server.LISTENERS],
                self.server.cfg.bind,
                self._boot_log,
                self.settings.upgrade_timeout,
            )
        except (UpgradeError, OSError) as error:
            self._outcome(UpgradeState.REFUSED, str(error))
            self.header.upgrade_number += 1
            self.emit("refused", logging.WARNING, signal="USR2", reason=str(error))
            return
        # gunicorn reaps by this: an unknown child that exits with 3 or 4 ends the service before 26.
        self.server.reexec_pid = self.upgrade.pid
        self._outcome(UpgradeState.BOOTING, "")
        self.header.upgrade_number += 1
        self.emit("upgrade.started", successor=self.upgrade.pid, timeout=self.settings.upgrade_timeout,
                  command=" ".join(self.launch.command), directory=self.launch.directory)  # fmt: skip

    def _refuse_upgrade_unless_possible(self) -> None:
        if self.upgrade is not None:
            raise UpgradeError(f"an upgrade is under way (successor {self.upgrade.pid}): wait for its end")
        if self.phase is not Phase.SERVING:
            raise UpgradeError(f"the generation is {self.phase.label}: only a serving one can be upgraded")
        if self.proof is not None:
            raise UpgradeError("a reload (SIGHUP) is under way: wait for its end")
        if os.getpid() == 1:
            raise UpgradeError(
                "this master is PID 1 and its exit would end the container: deploy by replacing the pod or container, "
                "which zdd_web drains on SIGTERM"
            )
        obstacle = self.launch.obstacle()
        if obstacle:
            raise UpgradeError(f"{obstacle}: restore it, or restart the service from where it is now")

    def _outcome(self, state: UpgradeState, reason: str) -> None:
        self.header.upgrade_reason = reason
        self.header.upgrade_since = clock.now_ns()
        self.header.upgrade_state = state

    def _follow_upgrade(self, upgrade: Upgrade) -> None:
        if upgrade.board is not None:
            self.header.successor_phase = upgrade.board.header.phase
        verdict = upgrade.poll()
        if verdict is not None and verdict.ready:
            self._let_go(upgrade, verdict.workers)
        elif verdict is not None and upgrade.stage is Stage.IN_OFFICE:
            self._return_to_office(upgrade, verdict.reason)
        elif verdict is not None:
            self._fail(upgrade, verdict.reason)
        elif upgrade.committed:
            self._commit(upgrade)
        elif upgrade.stage is Stage.IN_OFFICE and self.header.upgrade_state == UpgradeState.COMMITTING:
            self._follow_last_accepts()

    def _follow_last_accepts(self) -> None:
        # An operator who is told "done" expects no answer of the old code to a request sent from now on.
        leaving = all(member.state is WorkerState.LEAVING for member in self.roster.members())
        if leaving or clock.since(self.header.phase_since) >= LAST_ACCEPTS_WITHIN:
            self.header.upgrades_done += 1
            self._outcome(UpgradeState.DONE, "")

    def _let_go(self, upgrade: Upgrade, workers: int) -> None:
        try:
            # A full disk shall be found out now, while nothing has been promised.
            self._prepared = self._prepare_pid_file(upgrade)
        except OSError as error:
            self._fail(upgrade, f"the pid file {self.server.pidfile.fname} cannot be replaced: {error.strerror}")
            return
        self.emit("upgrade.ready", successor=upgrade.pid, workers=workers, seconds=upgrade.seconds)
        self._outcome(UpgradeState.COMMITTING, "")
        upgrade.go()

    def _prepare_pid_file(self, upgrade: Upgrade) -> str:
        pid_file = self.server.pidfile
        if pid_file is None or os.path.abspath(pid_file.fname) != upgrade.pid_file:
            return ""
        prepared: str = pid_file.prepare(upgrade.pid)
        return prepared

    def _fail(self, upgrade: Upgrade, reason: str) -> None:
        upgrade.end(now=upgrade.stage is Stage.BOOTING)
        self._discard_prepared()
        self._forget_successor()
        said = bootlog.tail(self._boot_log)
        if said and upgrade.board is None and not upgrade.pid_file:
            # It ended with the boot log as its stderr: nobody has read that yet.
            with contextlib.suppress(OSError):
                os.write(2, said.encode())
        self.header.upgrades_failed += 1
        self._outcome(UpgradeState.FAILED, reason)
        self.emit("upgrade.failed", logging.ERROR, successor=upgrade.pid, seconds=upgrade.seconds, reason=reason)

    def _discard_prepared(self) -> None:
        if self._prepared:
            with contextlib.suppress(OSError):
                os.unlink(self._prepared)
            self._prepared = ""

    def _forget_successor(self) -> None:
        self.upgrade = None
        self.server.reexec_pid = 0
        self.header.successor_pid = self.header.successor_phase = 0

    def _commit(self, upgrade: Upgrade) -> None:
        if self._prepared:
            self.server.pidfile.commit(self._prepared)
            self._prepared = ""
        compat.suspend_control_server(self.server)
        self.header.successor_pid = upgrade.pid
        upgrade.hand_over_office()
        self._release_predecessor()
        self.emit("upgrade.committed", successor=upgrade.pid, seconds=upgrade.seconds)
        self._move(Event.SUCCEEDED, successor=upgrade.pid)

    def _return_to_office(self, upgrade: Upgrade, reason: str) -> None:
        upgrade.end(now=False)
        self._forget_successor()
        if self.header.deadline:
            return  # a stop was asked for meanwhile: nobody shall serve
        self.emit("successor.lost", logging.ERROR, successor=upgrade.pid, reason=reason)
        if self.server.pidfile is not None:
            self.server.pidfile.create(os.getpid())
        compat.resume_control_server(self.server)
        self._move(Event.SUCCESSOR_LOST)

    # -- reload

    def handle_hup(self) -> None:
        """SIGHUP: try config and app in a child; the rest happens when it has succeeded."""
        obstacle = ""
        if self.phase is not Phase.SERVING:
            obstacle = f"the generation is {self.phase.label}"
        elif self.upgrade is not None or self._awaits_office:
            obstacle = "an upgrade is under way"
        elif self.proof is not None:
            obstacle = "a reload is under way"
        if obstacle:
            self.emit("refused", logging.WARNING, signal="HUP", reason=obstacle, remedy="send it again later")
            return
        self.proof = reload.Proof.begin(self.server, self.settings.upgrade_timeout)
        self.emit("reload.started", child=self.proof.pid)

    def _follow_proof(self, proof: reload.Proof) -> None:
        reason = proof.poll()
        if reason is None:
            return
        self.proof = None
        said = proof.close()
        if not reason and self.phase is Phase.SERVING:
            try:
                reload.apply(self.server)
            except ZddError as error:
                reason = str(error)
        if reason:
            with contextlib.suppress(OSError):
                os.write(2, said.encode())
            self.emit("refused", logging.ERROR, signal="HUP", reason=reason, remedy="mend it and send SIGHUP again; "
                      "the old workers serve on")  # fmt: skip
            return
        self.roster.outdate()
        self.header.reload_number += 1
        self.emit("reload.done", workers=self.server.num_workers)

    # -- stop

    def handle_term(self) -> None:
        """SIGTERM: the stop begins, or, the second time, skips what is left of the lame duck."""
        phase = self.phase
        self._cancel_upgrade()
        self._release_predecessor()
        if phase is Phase.BOOTING:
            self.header.deadline = clock.after_ns(min(BOOT_STOP_BUDGET, self.settings.stop_budget().work))
        elif not self.header.deadline:
            budget = self.settings.stop_budget()
            lame_duck = budget.lame_duck if phase is Phase.SERVING else 0.0
            self._lame_duck_ends = clock.after_ns(lame_duck)
            self.header.deadline = clock.after_ns(lame_duck + budget.work)
        elif phase is Phase.LAME_DUCK:
            self.header.deadline = clock.after_ns(self.settings.stop_budget().work)
        self._stopping_since = self._stopping_since or clock.now_ns()
        self._move(Event.STOP)
        if self.phase is Phase.LAME_DUCK and clock.passed(self._lame_duck_ends):
            self._move(Event.LAME_DUCK_OVER)

    def handle_int(self) -> None:
        """SIGINT keeps gunicorn's meaning: stop now."""
        self._prepare_to_end()
        self._gunicorn_int()

    def handle_quit(self) -> None:
        """SIGQUIT keeps gunicorn's meaning: stop now."""
        self._prepare_to_end()
        self._gunicorn_quit()

    def _prepare_to_end(self) -> None:
        guarded("cancel_upgrade", self._cancel_upgrade)()
        guarded("release_predecessor", self._release_predecessor)()

    def _cancel_upgrade(self) -> None:
        if self.proof is not None:
            self.proof.end()
        upgrade = self.upgrade
        if upgrade is None or upgrade.stage is Stage.IN_OFFICE:
            return
        reason = "the service was stopped"
        if upgrade.stage is Stage.COMMITTING:
            # It has requests in hand: it stops as this generation does, and its board says that it may go.
            upgrade.ask_to_stop()
            upgrade.forget()
        else:
            upgrade.end(now=True)
        self._discard_prepared()
        self._forget_successor()
        self._outcome(UpgradeState.FAILED, reason)
        self.emit("upgrade.cancelled", logging.WARNING, successor=upgrade.pid, reason=reason)

    # -- workers

    def manage_workers(self) -> None:
        """Spawn and retire as the roster plans, and end the loop when nobody is left or the deadline passed."""
        if self.phase in (Phase.DRAINING, Phase.RETIRING):
            self._end_if_finished()
        decision = plan(self.roster.members(), self.server.num_workers, self.phase)
        if self.phase in lifecycle.SPAWNING and (self.phase is Phase.BOOTING or self.roster.may_spawn()):
            for _ in range(decision.spawn):
                self.server.spawn_worker()
        deadline = self.header.deadline
        if self.phase in lifecycle.SPAWNING:
            deadline = clock.after_ns(self.settings.recycle_timeout)
        self.roster.retire(decision.retire, deadline)
        self.roster.repeat()

    def _end_if_finished(self) -> None:
        if not self.server.WORKERS:
            self._bury_workers()
            if self.header.upgrade_state == UpgradeState.COMMITTING:
                self._follow_last_accepts()
            self._move(Event.FINISHED, seconds=self._leaving_for())
            if self._abandoned and self.header.deadline:
                raise HaltServer(f"{self._abandoned} background tasks were abandoned at the deadline", 1)
            raise StopIteration
        # Workers name what they abandon at the deadline; they get half of the margin to say so and to exit.
        deadline = self.header.deadline
        if deadline == clock.NEVER or clock.since(deadline) < self.settings.stop_budget().margin / 2:
            return
        snapshot = self.board.snapshot()
        killed = self.roster.kill()
        self.emit("drain.abandoned", logging.ERROR, workers=killed, requests=snapshot.in_flight, tasks=snapshot.tasks,
                  seconds=self._leaving_for())  # fmt: skip
        raise HaltServer("work was abandoned at the deadline", 1)

    def _leaving_for(self) -> float:
        return clock.since(self._stopping_since or self.header.phase_since)

    def reap_workers(self) -> None:
        """Note the exit status of our own children, then have gunicorn reap the rest."""
        for child in (self.upgrade, self.proof):
            if child is None or child.status is not None:
                continue
            # gunicorn's reaper takes any child and forgets the status: look first, without reaping.
            with contextlib.suppress(ChildProcessError):
                found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None:
                    killed = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                    child.reaped(found.si_status if killed else found.si_status << 8)
        while True:
            try:
                self._gunicorn_reap()
                return
            except HaltServer:
                # A second worker that could not boot would interrupt the halt that the first one began, and leave
                # the pid file behind (arbiter.py:681, called from stop()).
                if not self._halting:
                    self._halting = True
                    raise

    # -- in the children

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone: its death must be seen by those who listen for it."""
        self.gate.keep_reader()
        if self.upgrade is not None:
            self.upgrade.forget()
        if self.succession is not None:
            self.succession.forget()
        if self._boot_log >= 0:
            os.close(self._boot_log)
        if self.board.fd >= 0:
            os.close(self.board.fd)
            self.board.fd = -1
