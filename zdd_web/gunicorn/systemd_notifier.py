"""What systemd is told of the service, in every listener mode, wherever NOTIFY_SOCKET is set (sd_notify(3)).

Only the active generation sends. A new one is not the main process yet, and systemd reads that one's messages alone
(`NotifyAccess=main`); an old one is no longer, and its STOPPING=1 would have systemd end the new one as well. In the
commit the old one names the new: after its own exit no process is left that systemd knows.

The first part of this module makes the messages and does nothing; `SystemdNotifier` is told what happens and
sends them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from zdd_web import log
from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.health import Probe, Status, examine
from zdd_web.lifecycle import Phase
from zdd_web.probes import look
from zdd_web.system import clock
from zdd_web.system.sd_notify import notify

#: How long a full socket is waited for, seconds: where the message is MAINPID, without which the unit ends with this
#: process, and elsewhere.
PATIENCE_IN_COMMIT, PATIENCE = 2.0, 0.5

#: What a stop may take beyond its budget before systemd kills, seconds: `on_exit` hooks on a machine that is short of
#: everything.
STOP_MARGIN = 5.0

#: WATCHDOG=1 is sent as soon as this part of WATCHDOG_USEC has passed, and looked after as often: twice in time always.
WATCHDOG_PART = 4

Lines = tuple[str, ...]


def ready(status: str) -> Lines:
    """Return the message that a start, an upgrade or a reload is over, however it went."""
    return "READY=1", f"STATUS={status}"


def reloading(status: str, now_ns: int) -> Lines:
    """Return the message that an upgrade or a reload has begun; systemd waits for READY=1 from here on.

    >>> reloading("generation 1: reloading", now_ns=5_000_000)
    ('RELOADING=1', 'MONOTONIC_USEC=5000', 'STATUS=generation 1: reloading')
    """
    return "RELOADING=1", f"MONOTONIC_USEC={now_ns // 1000}", f"STATUS={status}"


def main_process(pid: int | None, status: str) -> Lines:
    """Return the message that another process is the service; None where the pid stays (KEEP_PID)."""
    return (*(() if pid is None else (f"MAINPID={pid}",)), *ready(status))


def stopping(status: str, seconds: float) -> Lines:
    """Return the message that the service ends, in so many seconds at most.

    >>> stopping("generation 1: draining", seconds=33.5)
    ('STOPPING=1', 'STATUS=generation 1: draining', 'EXTEND_TIMEOUT_USEC=33500000')
    """
    return "STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


def watchdog_seconds(environ: Mapping[str, str], pid: int, predecessor: int) -> float:
    """Return how often systemd wants to hear WATCHDOG=1, in seconds; 0 when it does not, or means another process.

    >>> watchdog_seconds({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "4711"}, pid=4711, predecessor=0)
    30.0
    """
    meant = environ.get("WATCHDOG_PID", "")
    microseconds = environ.get("WATCHDOG_USEC", "")
    if meant not in ("", str(pid), str(predecessor or pid)) or not microseconds.isdecimal():
        return 0.0
    return int(microseconds) / 1e6


def count(number: int, what: str) -> str:
    """Spell a number of things.

    >>> count(1, "worker"), count(2, "worker")
    ('1 worker', '2 workers')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


class SystemdNotifier:
    """Sends systemd this master's messages."""

    def __init__(
        self,
        generation: Generation,
        inherited: Inheritance | None,
        workers: Callable[[], int],
        not_now: Callable[[], str],
    ) -> None:
        """`workers` counts them; `not_now` returns why an upgrade or a reload is under way, "" when none is."""
        self._generation, self._header = generation, generation.header
        self._workers, self._not_now = workers, not_now
        #: Whether systemd has started this very process, which then has a unit of its own.
        self._was_started = inherited is None or inherited.taken
        forked_by = inherited.predecessor if inherited is not None and not inherited.taken else 0
        self._watchdog = watchdog_seconds(os.environ, os.getpid(), forked_by)
        self._is_ready = False
        #: Whether the service lives on in another unit, and this one ends with this generation.
        self._superseded = False
        self._told_alive_at = clock.NEVER
        self._withheld = False
        #: Whether the last message did not get through: said once, and not waited for again.
        self._unheard = False

    @property
    def interval(self) -> float:
        """How often the master's loop must turn for the watchdog, in seconds; infinity where there is none."""
        return self._watchdog / WATCHDOG_PART if self._watchdog else float("inf")

    @property
    def _is_the_unit(self) -> bool:
        """Whether this master is its unit's main process."""
        if self._generation.phase is Phase.RETIRING:
            return self._superseded
        return self._was_started or not self._generation.awaits_promotion

    def _status(self, text: str) -> str:
        return f"generation {self._header.generation}: {text}"

    # -- what happens

    def moved(self, before: Phase, after: Phase) -> None:
        """The phase has changed."""
        if before is Phase.RETIRING or not self._is_the_unit:
            return
        if after is Phase.SERVING:
            self._say_ready()
        elif after is not Phase.RETIRING:
            seconds = clock.remaining(self._header.deadline) or 0.0
            self._stops(f"{after.label}, {self._in_hand()}", seconds)

    def _say_ready(self) -> None:
        # One that takes over from another unit has to be active first: until then the upgrade may fail.
        if not self._is_ready and not self._generation.awaits_promotion:
            self._is_ready = True
            self._tell(*ready(self._status(f"serving, {count(self._workers(), 'worker')}")))

    def ends_now(self, within: float) -> None:
        """SIGINT or SIGQUIT: this master ends within so many seconds."""
        if self._is_the_unit:
            self._stops("stopping now", within)

    def upgrade_began(self) -> None:
        """A successor was forked."""
        text = self._status(f"upgrading to generation {self._header.generation + 1}")
        self._tell(*reloading(text, clock.now_ns()))

    def upgrade_ended(self, how: str, reason: str) -> None:
        """The upgrade came to nothing: it "failed" or "was cancelled"."""
        self._tell(*ready(self._status(f"the upgrade {how}: {reason}")))

    def reload_began(self) -> None:
        """SIGHUP is obeyed."""
        self._tell(*reloading(self._status("reloading"), clock.now_ns()))

    def reload_ended(self, reason: str) -> None:
        """The reload is over; `reason` is why it failed, "" when it did not."""
        text = f"the reload failed: {reason}" if reason else "reloaded"
        self._tell(*ready(self._status(text)))

    def refused(self, what: str, reason: str) -> None:
        """Neither an upgrade nor a reload will begin: a systemd that waits for it (`Type=notify-reload`) goes on."""
        if not self._not_now():
            text = self._status(f"the {what} was refused: {reason}")
            self._tell(*reloading(text, clock.now_ns()))
            self._tell(*ready(text))

    def hand_over(self, pid: int, workers: int) -> None:
        """The commit: another master is the service. To be called before this one goes on; tells whom that concerns.

        Raises `UpgradeError` when there is a systemd that does not receive it.
        """
        status = f"generation {self._header.generation + 1}: serving, {count(workers, 'worker')}"
        lines = main_process(self._unless_kept(pid), status)
        try:
            notify(*lines, patience=PATIENCE_IN_COMMIT)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            self._note_unheard(lines, error)
        except OSError as error:
            self._note_unheard(lines, error)
            if not self._generation.settings.keep_pid:
                raise UpgradeError(
                    f"systemd does not hear MAINPID={pid} ({error}), and would end the service with this master"
                ) from None

    def superseded(self, pid: int) -> None:
        """The commit of a takeover: the service lives on in another unit, and this one may take its time to end."""
        # No STOPPING=1, after which TimeoutStopSec= counts: what is in hand may take longer, and this may come back.
        self._superseded = True
        self._tell(f"STATUS={self._status(f'retiring, process {pid} has taken over')}")

    def take_back(self) -> None:
        """This master is the service again."""
        self._superseded = False
        text = self._status(f"serving again, {count(self._workers(), 'worker')}")
        self._tell(*main_process(self._unless_kept(os.getpid()), text))

    def follow(self) -> None:
        """Say that the service lives, when it is time to and while it does; the tick's call."""
        if self._was_started and self._generation.phase is Phase.SERVING:
            self._say_ready()
        if not self._watchdog or not self._is_the_unit or self._generation.phase in (Phase.BOOTING, Phase.STOPPED):
            return
        if self._told_alive_at and clock.since(self._told_alive_at) < self.interval:
            return
        found = examine(Probe.LIVENESS, look(self._generation.board))
        failed = [f"{each.name}: {each.text}" for each in found if each.status is Status.FAIL]
        if failed and not self._withheld:
            log.emit("watchdog.withheld", logging.ERROR, reason="; ".join(failed), watchdog=self._watchdog)
        self._withheld = bool(failed)
        if not failed:
            self._told_alive_at = clock.now_ns()
            self._tell("WATCHDOG=1", patience=0.0)

    # -- how it is said

    def _unless_kept(self, pid: int) -> int | None:
        return None if self._generation.settings.keep_pid else pid

    def _in_hand(self) -> str:
        board = self._generation.board.snapshot()
        return f"{count(board.in_flight, 'request')} and {count(board.tasks, 'background task')} in hand"

    def _stops(self, text: str, seconds: float) -> None:
        seconds += self._generation.settings.stop_budget().margin + STOP_MARGIN
        self._tell(*stopping(self._status(text), seconds))

    def _tell(self, *lines: str, patience: float = PATIENCE) -> None:
        try:
            notify(*lines, patience=0.0 if self._unheard else patience)
        except OSError as error:
            self._note_unheard(lines, error)
        else:
            self._unheard = False

    def _note_unheard(self, lines: Lines, error: OSError) -> None:
        if not self._unheard:
            log.emit("notify.failed", logging.WARNING, socket=os.environ.get("NOTIFY_SOCKET", ""),
                     message=" ".join(lines), error=error.strerror or str(error))  # fmt: skip
        self._unheard = True
