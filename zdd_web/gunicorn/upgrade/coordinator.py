"""The predecessor's side of a deploy: from SIGUSR2 to the end of this master.

`Upgrade` (upgrade.py) knows one successor, and judges it; here stands what the judgement means for this master: its
phase, its office (office.py), and what the operator is told.

An upgrade that was refused, failed or cancelled leaves everything as it was. The order of a commit: the office, the
word to the successor, then the phase, whose change has the roster retire the workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING

from zdd_web import log, metrics
from zdd_web.board import LAYOUT, Board, UpgradeState, WorkerState
from zdd_web.errors import UpgradeError, ZddError
from zdd_web.gunicorn.adapter import compat
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.handoff.handover import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch, read_env_file
from zdd_web.gunicorn.handoff.parentage import Parentage
from zdd_web.gunicorn.termination_message import first_boot
from zdd_web.gunicorn.upgrade.ancestors import Ancestors
from zdd_web.gunicorn.upgrade.error_watch import ErrorWatch
from zdd_web.gunicorn.upgrade.external_successor import ExternalSuccessor
from zdd_web.gunicorn.upgrade.identity import ServiceIdentity
from zdd_web.gunicorn.upgrade.orphans import Orphans
from zdd_web.gunicorn.upgrade.successor_process import Stage, Upgrade, Verdict
from zdd_web.health import Probe, Status, examine
from zdd_web.lifecycle import STOPPING, Event, Phase
from zdd_web.probes import look
from zdd_web.service import Line
from zdd_web.system import clock, fd_passing, masking, proc, stdio
from zdd_web.system.boot_log import BootLog

if TYPE_CHECKING:
    from zdd_web.gunicorn.master.master import Master

#: A worker hears SIGTERM between two bytecodes; one that is deep in C code is busy and accepts nothing either.
LAST_ACCEPTS_WITHIN = 2.0


def _successor_health(board: Board) -> tuple[int, str]:
    """Return the phase that a successor's probes speak of, and what is wrong with it while it serves."""
    header = board.header
    if header.layout != LAYOUT:
        return header.phase, ""
    if header.phase == Phase.RETIRING and header.successor_phase:
        # It has a successor itself, and speaks for that.
        return header.successor_phase, header.successor_trouble
    if header.phase != Phase.SERVING:
        return header.phase, ""
    failed = [each for each in examine(Probe.READINESS, look(board)) if each.status is Status.FAIL]
    # A check may have the name of something else that is looked at, such as "workers".
    return header.phase, "; ".join(each.name if each.is_check else f"{each.name}: {each.text}" for each in failed)


class UpgradeCoordinator:
    """What this master knows of its successor, if there is one."""

    def __init__(self, master: Master, inherited: Inheritance | None) -> None:
        self._master = master
        self._server, self._header, self._settings = master.server, master.header, master.settings
        self._deploys = master.deploys
        self.ancestors = Ancestors(inherited.ancestors if inherited else ())
        env_file = self._settings.env_file
        self._deploys.note_env_file(read_env_file(env_file) if env_file else ())
        self.upgrade: Upgrade | None = None
        #: A successor that was told to stop, together with this generation, when it had requests in hand already.
        self.cancelled: Upgrade | None = None
        #: Successors that were given up, are nobody's children here, and have not ended yet.
        self._given_up: list[ExternalSuccessor] = []
        #: Workers of successors whose master was killed after `go`.
        self._orphans: list[Orphans] = []
        #: Whoever has started this process waits for its pid.
        self._was_started = inherited is None or inherited.taken
        self._boot_log: BootLog | None = None
        self._identity = ServiceIdentity(master.server, master.notifier)
        self._when_active = False
        self._watch: ErrorWatch | None = None
        self._line: Line | None = None

    def request(self) -> None:
        """SIGUSR2: begin an upgrade, or say why not."""
        if self.forwards(signal.SIGUSR2):
            return
        master = self._master
        if master.awaits_promotion and master.phase is Phase.SERVING:
            # A deploy right after a deploy: a second at most, and worth waiting for.
            self._when_active = True
            return
        try:
            self._deploys.begin()
            self._refuse_unless_possible()
            launch, boot_log = self._next_launch(), self._new_boot_log()
            self._deploys.started()
            timeout, window = self._settings.upgrade_timeout, self._settings.commit_window
            window = max(window, self._deploys.watch(self._settings)[0])
            inheritance = self._inheritance(boot_log)
            self.upgrade = Upgrade.begin(launch, inheritance, boot_log, timeout, window, self._pre_exec)
        except (ZddError, OSError) as error:
            self._close_unused_pipe()
            guarded("history", self._deploys.ended)("refused", str(error))
            self._outcome(UpgradeState.REFUSED, str(error))
            self._header.upgrades_refused += 1
            self._header.upgrade_number += 1
            guarded("systemd", master.notifier.refused)("upgrade", str(error))
            log.emit("refused", logging.WARNING, signal="USR2", reason=str(error))
            return
        finally:
            self._deploys.close_lineage()
        self.upgrade.hint = first_boot(self._header)
        guarded("systemd", master.notifier.upgrade_began)()
        # gunicorn reaps by this: an unknown child that exits with 3 or 4 ends the service before 26.
        self._server.reexec_pid = self.upgrade.pid
        self._outcome(UpgradeState.BOOTING, "")
        self._header.upgrade_number += 1
        log.emit("upgrade.started", successor=self.upgrade.pid, timeout=self._settings.upgrade_timeout,
                  command=" ".join(masking.command(launch.command)), directory=launch.directory,
                  release=self._deploys.next_label)  # fmt: skip

    def admit(self, end: socket.socket, who: fd_passing.Credentials, told: int, name: str) -> None:
        """A takeover: send one that was started what one that is forked inherits, or say why not."""
        try:
            if name != self._header.name:
                raise UpgradeError(
                    f"this is the service {self._header.name!r}, and that one {name!r}: give each its TAKEOVER_SOCKET, "
                    f"or the same NAME if they are one"
                )
            self._deploys.begin("takeover")
            self._refuse_unless_possible(forks=False)
            self._deploys.started()
            boot_log = self._new_boot_log()
            inheritance = self._inheritance(boot_log, forks=False)
            self.upgrade = ExternalSuccessor.send_handoff(
                end, who, told, inheritance, boot_log, self._settings.upgrade_timeout, self._settings.commit_window
            )
        except (ZddError, OSError) as error:
            self._close_unused_pipe()
            with contextlib.suppress(OSError):
                fd_passing.send(end, {"kind": "refused", "reason": str(error)})
            end.close()
            self._header.upgrades_refused += 1
            log.emit("refused", logging.WARNING, request="takeover", peer=who.pid or told, reason=str(error))
            guarded("history", self._deploys.ended)("refused", str(error))
            return
        self.upgrade.hint = first_boot(self._header)
        self._outcome(UpgradeState.BOOTING, "")
        log.emit("upgrade.started", successor=self.upgrade.pid, timeout=self._settings.upgrade_timeout,
                 by="takeover")  # fmt: skip

    def _inheritance(self, boot_log: BootLog, *, forks: bool = True) -> Inheritance:
        """Return what a successor is given, all but its end of the channel. Raises OSError."""
        master = self._master
        probe, probe_bind = master.probes.inheritance
        return Inheritance(
            generation=self._header.generation + 1,
            predecessor=os.getpid(),
            channel=-1,
            boot_log=boot_log.fd,
            stderr=-1,
            stderr_pipes=(boot_log.output.reader, *master.stderr_relay.pipes),
            ancestors=(*self.ancestors.alive(), (os.getpid(), self._header.master_start)),
            **master.listening.inheritance(),
            kept=master.kept,
            board=master.board.fd,
            probe=probe,
            probe_bind=probe_bind,
            **self._deploys.hand_on(forks=forks),
        )

    def _new_boot_log(self) -> BootLog:
        if self._boot_log is not None:
            self._boot_log.close()
            self._boot_log = None
        self._boot_log = BootLog()
        self._header.boot_log_fd = self._boot_log.fd
        return self._boot_log

    def _close_unused_pipe(self) -> None:
        if self.upgrade is None and self._boot_log is not None:
            self._boot_log.output.close()

    def _refuse_unless_possible(self, *, forks: bool = True) -> None:
        if self.upgrade is not None:
            raise UpgradeError(f"an upgrade is under way (successor {self.upgrade.pid}): wait for its end")
        if self._master.phase is not Phase.SERVING:
            raise UpgradeError(f"the generation is {self._master.phase.label}: only a serving one can be upgraded")
        if self._master.reload.under_way:
            raise UpgradeError("a reload (SIGHUP) is under way: wait for its end")
        # What rejected successors have left count too: they hold the listeners, and memory.
        alive = len(self.ancestors.alive()) + 1 + len(self._given_up) + len(self._orphans)
        if alive >= self._settings.max_generations:
            raise UpgradeError(
                f"{alive} generations are alive, and MAX_GENERATIONS = {self._settings.max_generations}: wait until an "
                f"older one has finished its requests (`zdd-web status` shows them), or raise the limit"
            )
        if self._server.cfg.settings.get("dirty_apps") and self._server.cfg.dirty_apps:
            raise UpgradeError(
                "dirty_apps are set: their processes cannot be handed over, and a second master would end those of the "
                "first; restart the service, or move them into a service of their own"
            )
        if forks and not self._settings.keep_pid:
            parentage = Parentage.of_this_process(adopted=not self._was_started)
            obstacle = parentage.obstacle(parent_stays=self._settings.parent_stays)
            if obstacle:
                raise UpgradeError(obstacle)

    def _next_launch(self) -> Launch:
        launch = self._deploys.next_launch(self._settings.release_dir)
        if self._settings.env_file:
            launch = self._deploys.refreshed(launch, read_env_file(self._settings.env_file))
        obstacle = launch.obstacle()
        if obstacle:
            raise UpgradeError(f"{obstacle}: restore it, set RELEASE_DIR, or restart the service from where it is now")
        if launch.left:
            log.emit("upgrade.left_behind", logging.WARNING, variables=",".join(launch.left),
                     remedy="they name paths of the old release that the new one lacks, such as those of an agent: set "
                     "them in ENV_FILE, or restart the service")  # fmt: skip
        return launch

    def _pre_exec(self, launch: Launch) -> Launch:
        given, removed = compat.call_pre_exec(self._server)
        environ = {key: value for key, value in launch.environ.items() if key not in removed}
        return dataclasses.replace(launch, environ={**environ, **given})

    def _outcome(self, state: UpgradeState, reason: str) -> None:
        if state is UpgradeState.FAILED and self._boot_log is not None:
            # A command that sees the state reads it.
            self._boot_log.publish()
        self._header.upgrade_reason = reason
        self._header.upgrade_since = clock.now_ns()
        self._header.upgrade_state = state

    def follow(self) -> None:
        """Hear the successor and do what its verdict means; the tick's call."""
        if self._when_active and not self._master.awaits_promotion:
            self._when_active = False
            self.request()
        self._given_up = [each for each in self._given_up if not each.follow_end()]
        self._orphans = [each for each in self._orphans if not each.follow()]
        upgrade = self.upgrade
        if upgrade is None:
            return
        if upgrade.board is not None:
            self._header.successor_phase = upgrade.board.header.phase
            guarded("probes", self._speak_for)(upgrade.board)
        verdict = upgrade.poll() or self._compare(upgrade)
        if upgrade.released and upgrade.stage is Stage.IN_OFFICE:
            # This master will not serve again, and who still holds a listener keeps clients waiting in its queue.
            self._master.listening.close(for_good=False)
        if verdict is not None and verdict.ready:
            self._approve(upgrade, verdict.workers)
        elif verdict is not None and upgrade.stage is Stage.IN_OFFICE:
            self._return_to_office(upgrade, verdict.reason)
        elif verdict is not None:
            self._fail(upgrade, verdict.reason)
        elif upgrade.committed:
            self._watch = None
            self._commit(upgrade)
        elif upgrade.stage is Stage.IN_OFFICE:
            self.follow_last_accepts()

    def _compare(self, upgrade: Upgrade) -> Verdict | None:
        """Return the verdict of a watch (`upgrade --watch`), None while nothing is against the new generation."""
        watch = self._watch
        if watch is None or upgrade.stage is not Stage.COMMITTING or upgrade.board is None:
            return None
        reason = watch.judge(is_over=upgrade.committed)
        return Verdict(ready=False, reason=reason) if reason else None

    def _speak_for(self, successor: Board) -> None:
        self._header.successor_phase, self._header.successor_trouble = _successor_health(successor)

    def follow_last_accepts(self) -> None:
        """Call the upgrade done, and close what it has dropped, once no worker of this generation accepts any more."""
        leaving = all(member.state is WorkerState.LEAVING for member in self._master.roster.members())
        if leaving:
            # Not before: who is busy may hold them for long, and they could not be bound again.
            guarded("listeners", self._master.listening.close_dropped)()
        if self._header.upgrade_state != UpgradeState.COMMITTING:
            return
        # An operator who is told "done" expects no answer of the old code to a request sent from now on.
        if leaving or clock.since(self._header.phase_since) >= LAST_ACCEPTS_WITHIN:
            self._header.upgrades_done += 1
            self._outcome(UpgradeState.DONE, "")

    def _approve(self, upgrade: Upgrade, workers: int) -> None:
        try:
            self._identity.prepare(upgrade.pid, upgrade.pid_file)
        except OSError as error:
            self._fail(upgrade, f"the pid file {self._server.pidfile.fname} cannot be replaced: {error.strerror}")
            return
        log.emit("upgrade.ready", successor=upgrade.pid, workers=workers, seconds=upgrade.seconds,
                 release=self._deploys.label_of(upgrade.board))  # fmt: skip
        self._outcome(UpgradeState.COMMITTING, "")
        seconds, allowed = self._deploys.watch(self._settings)
        if seconds and upgrade.is_child and upgrade.board is not None:
            self._watch = ErrorWatch(self._master.board, upgrade.board, allowed)
        upgrade.go()

    def _fail(self, upgrade: Upgrade, reason: str) -> None:
        label = self._deploys.label_of(upgrade.board)
        self._end(upgrade, now=upgrade.stage is Stage.BOOTING, reason=reason)
        self._identity.discard()
        self._identity.forget_attempt(upgrade.pid)
        self._forget_successor()
        said = upgrade.boot_log.text()
        if said and not upgrade.speaks:
            # It ended before it had its own stderr: this is written nowhere yet.
            stdio.write_stderr(said)
        self._header.upgrades_failed += 1
        guarded("systemd", self._master.notifier.upgrade_ended)("failed", reason)
        guarded("history", self._deploys.ended)("failed", reason, label)
        self._outcome(UpgradeState.FAILED, reason)
        log.emit("upgrade.failed", logging.ERROR, successor=upgrade.pid, seconds=upgrade.seconds, reason=reason,
                 release=label)  # fmt: skip

    def _end(self, upgrade: Upgrade, *, now: bool, reason: str) -> None:
        board = None
        if upgrade.is_child and not now and upgrade.board is not None and upgrade.board.header.layout == LAYOUT:
            board, upgrade.keeps_board = upgrade.board, True
        upgrade.end(now=now, reason=reason)
        if board is not None:
            # As long as an old generation may take for what it has in hand.
            limit = clock.after_ns(self._settings.retire_timeout)
            self._orphans.append(Orphans(board, upgrade.signal_worker, limit))
        if isinstance(upgrade, ExternalSuccessor) and not upgrade.follow_end():
            self._given_up.append(upgrade)

    def end_given_up(self) -> None:
        """Have none of those that were given up outlive this master, if it can be helped: they hold its listeners."""
        for each in self._given_up:
            each.follow_end(wait=False)
        for orphans in self._orphans:
            orphans.end()

    def _forget_successor(self) -> None:
        for path in self.upgrade.added_paths if self.upgrade is not None else ():
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.upgrade = self._line = self._watch = None
        self._server.reexec_pid = 0
        self._header.successor_pid = self._header.successor_phase = 0

    def _commit(self, upgrade: Upgrade) -> None:
        try:
            workers = upgrade.board.header.workers_wanted if upgrade.board is not None else 0
            self._identity.hand_over(upgrade.pid, workers=workers, is_child=upgrade.is_child)
        except Exception as error:
            # Each step once: tried again at every tick, an error that lasts would hold the upgrade for ever.
            self._fail(upgrade, f"the office cannot be handed over: {type(error).__name__}: {error}")
            self._identity.take_back()
            return
        self._header.successor_pid = upgrade.pid
        self._header.upgrade_took = int(upgrade.seconds * 1e9)
        label = self._deploys.label_of(upgrade.board)
        # The successor reads it when it is told that it is active.
        guarded("history", self._deploys.ended)("done", label=label)
        # First of all: the successor offers itself there when it hears that it is in office.
        guarded("takeover", self._master.takeover.close)()
        upgrade.promote_successor()
        if upgrade.dropped:
            guarded("listeners", self._master.listening.drop)(upgrade.dropped)
        self._master.release_predecessor()
        log.emit("upgrade.committed", successor=upgrade.pid, seconds=upgrade.seconds, release=label)
        self._master.move(Event.SUCCEEDED, successor=upgrade.pid)

    def _return_to_office(self, upgrade: Upgrade, reason: str) -> None:
        guarded("history", self._deploys.ended)("lost", reason, self._deploys.label_of(upgrade.board))
        if upgrade.board is not None:
            guarded("metrics", metrics.take_back)(self._master.board, upgrade.board)
        self._end(upgrade, now=False, reason=reason)
        self._forget_successor()
        if self._header.upgrade_state == UpgradeState.COMMITTING:
            self._outcome(UpgradeState.FAILED, reason)
        if self._header.deadline:
            return  # a stop was asked for meanwhile: nobody shall serve
        log.emit("successor.lost", logging.ERROR, successor=upgrade.pid, reason=reason)
        # First of all: whatever fails below, there is nobody else to serve.
        self._master.move(Event.SUCCESSOR_LOST)
        guarded("listeners", self._master.listening.take_back)()
        self._identity.take_back()

    def forwards(self, sig: signal.Signals, *, unless_it_stops: bool = False) -> bool:
        """Send a signal on to the successor: where the pid must stay, it still means the service."""
        if not (self.leaves_a_keeper and self._master.phase is Phase.RETIRING and self.upgrade is not None):
            return False
        current = self._descendants(self.upgrade).is_active()
        if current is not None and not (unless_it_stops and current.board.header.phase in STOPPING):
            proc.kill(current.pid, current.board.header.master_start, sig)
        return True

    def _descendants(self, upgrade: Upgrade) -> Line:
        # One for all ticks: once it has found the active generation it asks that one's board, and not all of /proc.
        if self._line is None:
            self._line = Line(os.getpid(), self._header.name, upgrade.pid)
        return self._line

    @property
    def leaves_a_keeper(self) -> bool:
        """Whether this pid must stay for a successor: KEEP_PID, and who came on its own has a pid and a parent too."""
        return self._settings.keep_pid and self.upgrade is not None and self.upgrade.is_child

    @property
    def becomes_the_keeper(self) -> bool:
        """Whether this is the process that stays: the first of those that have forked each other."""
        return self.leaves_a_keeper and self._was_started

    def identity_status(self) -> int | None:
        """Return the exit status of the service that this master's successors were; None while one of them lives."""
        upgrade = self.upgrade
        if upgrade is None or upgrade.status is None:
            return None
        if self._descendants(upgrade).is_active() is not None:
            return None
        code = os.waitstatus_to_exitcode(upgrade.status)
        return 128 - code if code < 0 else code

    def cancel(self, sig: signal.Signals) -> None:
        """End an upgrade under way, because the service is being stopped by this signal."""
        upgrade = self.upgrade
        if upgrade is None or upgrade.stage is Stage.IN_OFFICE:
            return
        reason = "the service was stopped"
        if upgrade.stage is Stage.COMMITTING and not upgrade.is_child:
            # It serves, and whoever stops this process means this one alone: that one has a pid of its own.
            self._commit(upgrade)
            return
        if upgrade.stage is Stage.COMMITTING:
            # It has requests in hand: it stops as this generation does, which waits for it.
            upgrade.ask_to_stop(sig)
            self.cancelled = upgrade
        else:
            self._end(upgrade, now=True, reason=reason)
        self._identity.discard()
        self._forget_successor()
        guarded("systemd", self._master.notifier.upgrade_ended)("was cancelled", reason)
        guarded("history", self._deploys.ended)("cancelled", reason)
        self._outcome(UpgradeState.FAILED, reason)
        log.emit("upgrade.cancelled", logging.WARNING, successor=upgrade.pid, reason=reason)

    def waits_for_cancelled(self) -> bool:
        """Tell whether a cancelled successor, or workers of a failed one, are still here.

        Those that stand still, or take too long, are killed.
        """
        # Of a stop, or of a retirement that has taken too long.
        too_late = clock.passed(self._master.stop.ends_at)
        if self._orphans and not too_late:
            return True  # they finish what they have in hand
        if any(each.stage is Stage.BOOTING for each in self._given_up) and not too_late:
            return True  # it is to say why it ends, and has two seconds for it
        upgrade = self.cancelled
        if upgrade is None:
            return False
        if upgrade.status is not None:
            # Its workers may be left, where it was killed.
            self.cancelled = None
            self._end(upgrade, now=False, reason="")
            return bool(self._orphans)
        if too_late or upgrade.is_stalled():
            upgrade.end(now=True)
            return False
        return True

    @property
    def under_way(self) -> bool:
        """Whether there is a successor, in office or not."""
        return self.upgrade is not None

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        for upgrade in (self.upgrade, self.cancelled, *self._given_up):
            if upgrade is not None:
                upgrade.forget()
        for orphans in self._orphans:
            orphans.forget()
        if self._boot_log is not None:
            self._boot_log.close()
            self._boot_log = None
