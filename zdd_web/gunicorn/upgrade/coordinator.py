"""The predecessor's side of a deploy: from SIGUSR2 to the end of this master.

`Upgrade` (successor_process.py) knows one successor, and judges it; here stands what the judgement means for this
master: its phase, its identity (service_identity.py), and what the operator is told. How far the successor has come is
one state (states.py); `Preparation` has what it is started with, `FailedSuccessors` what remains of one that was
rejected, `Descendants` what is owed to those that are active after this one.

An upgrade that was refused, failed or cancelled leaves everything as it was. The order of a commit: the identity, the
message to the successor, then the phase, whose entry actions retire the workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from zdd_web import log, metrics
from zdd_web.board import Board
from zdd_web.errors import UpgradeError, ZddError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.boot_progress import first_boot
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.systemd_notifier import SystemdNotifier
from zdd_web.gunicorn.upgrade.ancestors import Ancestors
from zdd_web.gunicorn.upgrade.cancellation import Cancellation
from zdd_web.gunicorn.upgrade.deploy_history import Deploys
from zdd_web.gunicorn.upgrade.descendants import Descendants
from zdd_web.gunicorn.upgrade.error_watch import ErrorWatch
from zdd_web.gunicorn.upgrade.external_successor import ExternalSuccessor
from zdd_web.gunicorn.upgrade.failed_successors import FailedSuccessors
from zdd_web.gunicorn.upgrade.outcome import Outcome
from zdd_web.gunicorn.upgrade.prepare_successor import Preparation
from zdd_web.gunicorn.upgrade.service_identity import ServiceIdentity
from zdd_web.gunicorn.upgrade.states import (
    HANDED_OVER,
    RELEASED,
    SERVES_BESIDE,
    SUCCESSOR,
    Successor,
    SuccessorEvent,
    knows,
    when,
)
from zdd_web.gunicorn.upgrade.successor_health import successor_health
from zdd_web.gunicorn.upgrade.successor_process import Upgrade, Verdict
from zdd_web.lifecycle import Event, Phase
from zdd_web.settings import Settings
from zdd_web.system import clock, fd_passing, masking, stdio

#: A worker's handler of SIGTERM runs between two bytecodes; a worker that is deep in C code accepts nothing either.
LAST_ACCEPTS_WITHIN = 2.0


class UpgradeCoordinator:
    """What this master knows of its successor, if there is one."""

    def __init__(
        self,
        server: ArbiterFacade,
        generation: Generation,
        deploys: Deploys,
        inherited: Inheritance | None,
        listening: ListenerManager,
        notifier: SystemdNotifier,
        *,
        given: Callable[[], dict[str, Any]],
        reloads: Callable[[], bool],
        all_leave: Callable[[], bool],
        close_takeover: Callable[[], None],
    ) -> None:
        """`given` returns the fields of `Inheritance` that other roles know, `reloads` whether a reload is under way.

        `all_leave` returns whether no worker of this generation accepts any more; `close_takeover` ends the listening
        for takeovers.
        """
        self._server, self._generation, self._header = server, generation, generation.header
        self._deploys, self._listening, self._notifier = deploys, listening, notifier
        self._all_leave, self._close_takeover = all_leave, close_takeover
        self.ancestors = Ancestors(inherited.ancestors if inherited else ())
        self.upgrade: Upgrade | None = None
        self.failed = FailedSuccessors()
        #: The process that has started this one waits for its pid.
        self._was_started = inherited is None or inherited.taken
        self._preparation = Preparation(
            server,
            generation,
            deploys,
            listening,
            self.ancestors,
            self.failed,
            was_started=self._was_started,
            given=given,
            reloads=reloads,
        )
        self.descendants = Descendants(generation, lambda: self.upgrade, was_started=self._was_started)
        self._outcome = Outcome(self._header)
        self._identity = ServiceIdentity(server, notifier)
        self._when_active = False
        self._watch: ErrorWatch | None = None
        self._cancellation = Cancellation(self._header)

    @property
    def _settings(self) -> Settings:
        return self._generation.settings

    def request(self) -> None:
        """SIGUSR2: begin an upgrade, or say why not."""
        if self.descendants.forwards(signal.SIGUSR2):
            return
        if self._generation.awaits_promotion and self._generation.phase is Phase.SERVING:
            # A deploy right after a deploy: a second at most, and worth waiting for.
            self._when_active = True
            return
        try:
            self._deploys.begin()
            self._refuse_another()
            self._cancellation.refuse_if_asked()
            self._preparation.refuse_unless_possible()
            launch, boot_log = self._preparation.next_launch(), self._preparation.new_boot_log()
            self._deploys.started()
            timeout, window = self._settings.upgrade_timeout, self._settings.commit_window
            window = max(window, self._deploys.watch(self._settings)[0])
            inheritance = self._preparation.inheritance(boot_log)
            self.upgrade = Upgrade.begin(launch, inheritance, boot_log, timeout, window, self._preparation.pre_exec)
        except (ZddError, OSError) as error:
            if self.upgrade is None:
                self._preparation.close_unused_pipe()
            guarded("history", self._deploys.ended)("refused", str(error))
            self._outcome.refused(str(error), under_way=self.upgrade is not None)
            self._outcome.requested()
            guarded("systemd", self._notifier.refused)("upgrade", str(error))
            log.emit("refused", logging.WARNING, signal="USR2", reason=str(error))
            return
        finally:
            self._deploys.close_lineage()
        self.upgrade.hint = first_boot(self._header)
        guarded("systemd", self._notifier.upgrade_began)()
        # gunicorn reaps by this: an unknown child that exits with 3 or 4 ends the service before 26.
        self._server.set_successor(self.upgrade.pid)
        self._outcome.publish(self.upgrade)
        self._outcome.requested()
        self._cancellation.began()
        log.emit("upgrade.started", successor=self.upgrade.pid, timeout=self._settings.upgrade_timeout,
                  command=" ".join(masking.command(launch.command)), directory=launch.directory,
                  release=self._deploys.next_label)  # fmt: skip

    def _refuse_another(self) -> None:
        if self.upgrade is not None:
            raise UpgradeError(f"an upgrade is under way (successor {self.upgrade.pid}): wait for its end")

    def admit(self, end: socket.socket, who: fd_passing.Credentials, told: int, name: str) -> None:
        """A takeover: send one that was started what one that is forked inherits, or say why not."""
        try:
            if name != self._header.name:
                raise UpgradeError(
                    f"this is the service {self._header.name!r}, and that one {name!r}: give each its TAKEOVER_SOCKET, "
                    f"or the same NAME if they are one"
                )
            self._deploys.begin("takeover")
            self._refuse_another()
            self._preparation.refuse_unless_possible(forks=False)
            self._deploys.started()
            boot_log = self._preparation.new_boot_log()
            inheritance = self._preparation.inheritance(boot_log, forks=False)
            self.upgrade = ExternalSuccessor.send_handoff(
                end,
                who,
                told,
                inheritance,
                boot_log,
                self._settings.upgrade_timeout,
                self._settings.commit_window,
            )
        except (ZddError, OSError) as error:
            if self.upgrade is None:
                self._preparation.close_unused_pipe()
            with contextlib.suppress(OSError):
                fd_passing.send(end, {"kind": "refused", "reason": str(error)})
            end.close()
            self._header.upgrades_refused += 1
            log.emit("refused", logging.WARNING, request="takeover", peer=who.pid or told, reason=str(error))
            guarded("history", self._deploys.ended)("refused", str(error))
            return
        self.upgrade.hint = first_boot(self._header)
        self._cancellation.began_without_a_number()
        self._outcome.publish(self.upgrade)
        log.emit("upgrade.started", successor=self.upgrade.pid, timeout=self._settings.upgrade_timeout,
                 by="takeover")  # fmt: skip

    def follow(self) -> None:
        """Read the successor's messages and do what the verdict means; the tick's call."""
        if self._when_active and not self._generation.awaits_promotion:
            self._when_active = False
            self.request()
        guarded("requests", self._deploys.forget_dead_requests)(
            signal_waits=self._when_active or self._server.has_queued(signal.SIGUSR2)
        )
        self.failed.follow()
        upgrade = self.upgrade
        if upgrade is None:
            return
        if upgrade.board is not None:
            self._header.successor_phase = upgrade.board.header.phase
            guarded("probes", self._speak_for)(upgrade.board)
        asked_by = None if upgrade.state in HANDED_OVER else self._cancellation.asked_by()
        if asked_by is not None:
            self._fail(upgrade, f"cancelled by process {asked_by} {when(upgrade.state)}", cancelled=True)
            return
        verdict = upgrade.poll() or self._compare(upgrade)
        if upgrade.state in RELEASED:
            # This master will not serve again, and a process that still holds a listener keeps clients waiting.
            self._listening.close(for_good=False)
        if verdict is not None and verdict.ready:
            self._approve(upgrade, verdict.workers)
        elif verdict is not None and upgrade.state in HANDED_OVER:
            self._serve_again(upgrade, verdict.reason)
        elif verdict is not None:
            self._fail(upgrade, verdict.reason)
        elif upgrade.committed and upgrade.grow(self._settings.commit_window):
            self._outcome.publish(upgrade)
        elif upgrade.committed:
            self._watch = None
            self._commit(upgrade)
        elif upgrade.state in HANDED_OVER:
            self.follow_last_accepts()

    def _compare(self, upgrade: Upgrade) -> Verdict | None:
        """Return the verdict of a watch (`upgrade --watch`), None while nothing is against the new generation."""
        if self._watch is None or upgrade.state not in SERVES_BESIDE:
            return None
        reason = self._watch.judge(is_over=upgrade.committed)
        return Verdict(ready=False, reason=reason) if reason else None

    def _speak_for(self, successor: Board) -> None:
        self._header.successor_phase, self._header.successor_trouble = successor_health(successor)

    def follow_last_accepts(self) -> None:
        """Call the upgrade done, and close what it has dropped, once no worker of this generation accepts any more."""
        leaving = self._all_leave()
        if leaving:
            # Not before: a busy worker may hold them for long, and they could not be bound again.
            guarded("listeners", self._listening.close_dropped)()
        upgrade = self.upgrade
        if upgrade is None or not knows(SUCCESSOR, upgrade.state, SuccessorEvent.LAST_ACCEPT):
            return
        if leaving or clock.since(self._header.phase_since) >= LAST_ACCEPTS_WITHIN:
            upgrade.move(SuccessorEvent.LAST_ACCEPT)
            self._header.upgrades_done += 1
            self._outcome.publish(upgrade)

    def _approve(self, upgrade: Upgrade, workers: int) -> None:
        try:
            self._identity.prepare(upgrade.pid, upgrade.pid_file)
        except OSError as error:
            self._fail(upgrade, f"the pid file {upgrade.pid_file} cannot be replaced: {error.strerror}")
            return
        log.emit("upgrade.ready", successor=upgrade.pid, workers=workers, seconds=upgrade.seconds,
                 release=self._deploys.label_of(upgrade.board))  # fmt: skip
        seconds, allowed = self._deploys.watch(self._settings)
        if seconds and upgrade.is_child and upgrade.board is not None:
            self._watch = ErrorWatch(self._generation.board, upgrade.board, allowed)
        if upgrade.canary and upgrade.board is not None:
            self._deploys.note_canary(upgrade.canary, upgrade.board.header.workers_full)
        # From here on it serves, also if this master is killed.
        self._header.successor_takes = upgrade.pid if upgrade.takes_connections else 0
        upgrade.go()
        self._outcome.publish(upgrade)

    def _fail(self, upgrade: Upgrade, reason: str, *, cancelled: bool = False) -> None:
        label = self._deploys.label_of(upgrade.board)
        self._end(upgrade, now=not upgrade.has_accepted, reason=reason)
        # Not before: if that raises, the next tick finds the same state and tries again.
        upgrade.move(SuccessorEvent.FAILED)
        self._identity.discard()
        self._identity.forget_attempt(upgrade.pid)
        self._forget_successor()
        said = upgrade.boot_log.text()
        if said and not upgrade.has_own_stderr:
            # It ended before it had its own stderr: this is written nowhere yet.
            stdio.write_stderr(said)
        self._header.upgrades_failed += not cancelled
        guarded("systemd", self._notifier.upgrade_ended)("was cancelled" if cancelled else "failed", reason)
        # Before the outcome is published: a command that sees it may ask for the history at once.
        guarded("history", self._deploys.ended)("cancelled" if cancelled else "failed", reason, label)
        self._outcome.publish(upgrade, reason)
        if cancelled:
            log.emit("upgrade.cancelled", logging.WARNING, successor=upgrade.pid, seconds=upgrade.seconds,
                     reason=reason)  # fmt: skip
            return
        log.emit("upgrade.failed", logging.ERROR, successor=upgrade.pid, seconds=upgrade.seconds, reason=reason,
                 release=label)  # fmt: skip

    def _end(self, upgrade: Upgrade, *, now: bool, reason: str) -> None:
        # As long as an old generation may take for the requests that it has accepted.
        self.failed.end(upgrade, now=now, reason=reason, workers_have=self._settings.retire_timeout)

    def _forget_successor(self) -> None:
        for path in self.upgrade.added_paths if self.upgrade is not None else ():
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.upgrade = self._watch = None
        self.descendants.forget()
        self._server.set_successor(0)
        self._header.successor_pid = self._header.successor_phase = self._header.successor_takes = 0

    def _commit(self, upgrade: Upgrade) -> None:
        try:
            workers = upgrade.board.header.workers_wanted if upgrade.board is not None else 0
            self._identity.hand_over(upgrade.pid, workers=workers, is_child=upgrade.is_child)
        except Exception as error:
            # Each step once: tried again at every tick, an error that lasts would hold the upgrade for ever.
            self._fail(upgrade, f"the identity cannot be handed over: {type(error).__name__}: {error}")
            self._identity.take_back()
            return
        self._header.upgrade_took = int(upgrade.seconds * 1e9)
        label = self._deploys.label_of(upgrade.board)
        # The successor reads it when it is told that it is active.
        guarded("history", self._deploys.ended)("done", label=label)
        # First of all: the successor listens there as soon as it is told that it is active.
        guarded("takeover", self._close_takeover)()
        upgrade.promote_successor()
        # From here on signals to the service go to the successor. Not earlier: it reads its messages before it obeys.
        self._header.successor_pid = upgrade.pid
        self._generation.release_predecessor()
        log.emit("upgrade.committed", successor=upgrade.pid, seconds=upgrade.seconds, release=label)
        self._generation.move(Event.SUCCEEDED, successor=upgrade.pid)

    def drain_unwanted_listeners(self) -> None:
        """Begin to empty the listeners that the successor does not use; a retiring generation's entry action."""
        if self.upgrade is not None and self.upgrade.dropped:
            self._listening.drop(self.upgrade.dropped)

    def _serve_again(self, upgrade: Upgrade, reason: str) -> None:
        guarded("history", self._deploys.ended)("lost", reason, self._deploys.label_of(upgrade.board))
        if upgrade.board is not None:
            guarded("metrics", metrics.take_back)(self._generation.board, upgrade.board)
        self._end(upgrade, now=False, reason=reason)
        upgrade.move(SuccessorEvent.FAILED)
        self._forget_successor()
        if upgrade.state is Successor.REJECTED:
            self._outcome.publish(upgrade, reason)
        # Its pipe too: what it has left behind would fill it, and block.
        guarded("boot log", upgrade.boot_log.publish)()
        if self._header.deadline:
            return  # a stop was requested meanwhile: no generation is to serve
        log.emit("successor.lost", logging.ERROR, successor=upgrade.pid, reason=reason)
        # First of all: whatever fails below, no other generation serves.
        self._generation.move(Event.SUCCESSOR_LOST)
        guarded("listeners", self._listening.take_back)()
        self._identity.take_back()

    def cancel(self, sig: signal.Signals) -> None:
        """End an upgrade under way, because the service is being stopped by this signal."""
        upgrade = self.upgrade
        if upgrade is None or upgrade.state in HANDED_OVER:
            return
        reason = "the service was stopped"
        if upgrade.state in SERVES_BESIDE and not upgrade.is_child:
            # It serves, and a signal to this process means this one alone: the successor has a pid of its own.
            self._commit(upgrade)
            return
        label = self._deploys.label_of(upgrade.board)
        if upgrade.state in SERVES_BESIDE:
            # It has accepted requests: it stops as this generation does, which waits for it.
            self.failed.stop(upgrade, sig)
            upgrade.move(SuccessorEvent.STOP)
        else:
            self._end(upgrade, now=True, reason=reason)
            upgrade.move(SuccessorEvent.FAILED)
        self._identity.discard()
        self._forget_successor()
        guarded("systemd", self._notifier.upgrade_ended)("was cancelled", reason)
        guarded("history", self._deploys.ended)("cancelled", reason, label)
        self._outcome.publish(upgrade, reason)
        log.emit("upgrade.cancelled", logging.WARNING, successor=upgrade.pid, reason=reason)

    def waits_for_failed(self, deadline: int) -> bool:
        """Tell whether processes of an upgrade are still to be waited for, until `deadline` (monotonic nanoseconds)."""
        return self.failed.wait(clock.passed(deadline), self._settings.retire_timeout)

    @property
    def under_way(self) -> bool:
        """Whether there is a successor, active or not."""
        return self.upgrade is not None

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        if self.upgrade is not None:
            self.upgrade.forget()
        self.failed.after_fork()
        self._preparation.after_fork()
        self._cancellation.close()
