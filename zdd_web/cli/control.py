"""Signal a master and follow its board to the end: what `upgrade`, `drain` and `cancel` do, without their output.

Ctrl-C and SIGTERM do not end a command that has signalled a master: the master goes on, and the operator would know
less than before. The first asks the master to give up the upgrade, and the command waits for what becomes of it; the
second ends the command. A stop cannot be taken back, so there the first only says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from zdd_web.board import LAYOUT, Snapshot, UpgradeState
from zdd_web.cli.unfinished_work import UnfinishedWork
from zdd_web.lifecycle import STOPPING, Phase
from zdd_web.service import Generation, line_of
from zdd_web.system import boot_log, clock
from zdd_web.system.memfd import NotAMemfd

#: A master in its loop answers a signal at its next turn, at the latest after a second.
ANSWER_WITHIN = 10.0
#: One that has not been round its loop for so long is stopped or stuck, seconds.
STANDS_STILL = 60.0
POLL = 0.02

UNDER_WAY = (UpgradeState.BOOTING, UpgradeState.COMMITTING)
ENDED = (UpgradeState.DONE, UpgradeState.FAILED, UpgradeState.REFUSED)

Progress = Callable[[Snapshot], None]


def silent(snapshot: Snapshot) -> None:
    """Show no progress."""


class Interrupts:
    """Counts SIGINT and SIGTERM while a master is followed, in place of what Python does at them."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        # Elsewhere they are not delivered to this thread: `rehearse` upgrades in threads of its own.
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: object) -> None:
        self.count += 1


class GaveUp(Exception):
    """A master was waited for in vain; the text says how long."""


class Left(Exception):
    """The operator has interrupted a second time."""


def follow(generation: Generation, sent: str, answered: Callable[[Snapshot], bool]) -> Iterator[Snapshot]:
    """Yield the board of a master that was sent something, again and again, until the master has ended.

    Raises `GaveUp` when it has not `answered` within `ANSWER_WITHIN`, or has stood still for `STANDS_STILL`, and
    `BoardError`.
    """
    began = time.monotonic()
    while True:
        # Before the board: what it wrote last is read when it has ended.
        alive = generation.alive
        snapshot = generation.snapshot()
        yield snapshot
        if not alive:
            return
        if not answered(snapshot) and time.monotonic() - began > ANSWER_WITHIN:
            raise GaveUp(f"did not answer {sent} within {ANSWER_WITHIN:g} s")
        if snapshot.tick_at and clock.since(snapshot.tick_at) > STANDS_STILL:
            raise GaveUp(f"has stood still for {STANDS_STILL:g} s")
        time.sleep(POLL)


# -- upgrade


@dataclass(frozen=True)
class UpgradeResult:
    """How an upgrade ended; `log` is the end of what the new generation had printed when it failed.

    `serves_on` is true when the master itself has written that the upgrade is over and that it serves; `phase` is the
    last that it was seen in. `left` is true when the operator did not wait for the end.
    """

    ok: bool
    reason: str
    log: str
    seconds: float
    requested_at: float
    generation: int
    serves_on: bool
    cancelled: bool = False
    left: bool = False
    phase: Phase = Phase.SERVING


def no_permission(generation: Generation) -> str:
    """Return why a master could not be signalled."""
    return f"no permission to signal process {generation.pid}: run this as its user or as root"


def upgrade(
    generation: Generation,
    progress: Progress = silent,
    *,
    interrupts: Interrupts | None = None,
    on_interrupt: Callable[[bool], None] = lambda asked: None,
) -> UpgradeResult:
    """Send SIGUSR2 and wait until the new generation is active, or the upgrade was refused or has failed.

    The master ends every upgrade within its UPGRADE_TIMEOUT, one way or the other; one that stands still itself is
    waited for until `STANDS_STILL`, and asked to begin nothing when it runs again. At the first of `interrupts` it is
    asked to cancel, and `on_interrupt` gets whether it can be. Raises `BoardError` when the service runs another
    version of zdd_web.
    """
    # Held from now on: it outlives its master.
    number = generation.board.header.upgrade_number + 1
    expected = generation.header.generation + 1
    began = time.monotonic()
    none = UpgradeResult(False, "", "", 0.0, began, expected, False)
    try:
        # What an earlier command asked for, whose SIGUSR2 never came, is not meant for this one.
        with contextlib.suppress(OSError):
            generation.ask_to_cancel(number, take_back=True)
        generation.signal(signal.SIGUSR2)
    except PermissionError:
        return replace(none, reason=no_permission(generation))
    except ProcessLookupError:
        return replace(none, reason=f"the master {generation.pid} is gone")
    try:
        result = _upgrade(generation, number, none, progress, interrupts or Interrupts(), on_interrupt)
    except GaveUp as why:
        withdrawn = _asked(generation, number)
        then = "its SIGUSR2 is withdrawn" if withdrawn else "its SIGUSR2 still waits: it may upgrade when it runs again"
        reason = f"the master {generation.pid} {why}: {then}"
        result = replace(none, reason=reason, phase=generation.snapshot().phase)
    return replace(result, seconds=time.monotonic() - began)


def _upgrade(
    generation: Generation,
    number: int,
    none: UpgradeResult,
    progress: Progress,
    interrupts: Interrupts,
    on_interrupt: Callable[[bool], None],
) -> UpgradeResult:
    asked = obeys = False
    snapshot, header = generation.snapshot(), generation.board.header
    for snapshot in follow(generation, "SIGUSR2", lambda seen: seen.upgrade_number >= number):
        ours = snapshot.upgrade_number >= number
        if ours and header.refused_number == number:
            # The upgrade that is on the board is another command's.
            serves = snapshot.phase is Phase.SERVING
            return replace(none, reason=f"refused: {header.refused_reason}", serves_on=serves, phase=snapshot.phase)
        if ours:
            progress(snapshot)
        if ours and snapshot.upgrade_state in ENDED:
            return _outcome(generation, snapshot, none, asked)
        if interrupts.count > 1:
            return replace(none, left=True, cancelled=obeys, phase=snapshot.phase)
        if interrupts.count and not asked:
            asked, obeys = True, _asked(generation, number)
            on_interrupt(obeys)
    if snapshot.upgrade_state is UpgradeState.DONE and snapshot.upgrade_number >= number:
        return replace(none, ok=True)
    reason = f"the master {generation.pid} ended during the upgrade"
    return replace(none, reason=reason, phase=Phase.STOPPED)


def _asked(generation: Generation, number: int) -> bool:
    try:
        return generation.ask_to_cancel(number)
    except OSError:
        return False  # SIGUSR2 was allowed and this is not: a security module


def _outcome(generation: Generation, snapshot: Snapshot, none: UpgradeResult, asked: bool) -> UpgradeResult:
    state = snapshot.upgrade_state
    if state is UpgradeState.DONE:
        return replace(none, ok=True, cancelled=asked)
    failed = state is UpgradeState.FAILED
    cancelled = asked and "cancelled by process" in snapshot.upgrade_reason
    return replace(
        none,
        reason=f"{state.name.lower()}: {snapshot.upgrade_reason}",
        log=_boot_log(generation, snapshot) if failed and not cancelled else "",
        serves_on=snapshot.phase is Phase.SERVING,
        cancelled=cancelled,
        phase=snapshot.phase,
    )


def _boot_log(generation: Generation, snapshot: Snapshot) -> str:
    if not snapshot.boot_log_fd:
        return ""
    try:
        # The number is what the board says: any other file of the master's is not for the operator's eyes.
        fd = generation.open_memfd(snapshot.boot_log_fd, boot_log.MEMFD_NAME)
    except NotAMemfd as error:
        return f"descriptor {snapshot.boot_log_fd} of process {generation.pid} is not its boot log: {error}"
    except OSError:
        return ""
    try:
        return boot_log.tail(fd)
    finally:
        os.close(fd)


# -- cancel


@dataclass(frozen=True)
class CancelResult:
    """What became of a request to cancel; `snapshot` is the board as it was seen last.

    Of a master that `hangs` it is not known whether it serves.
    """

    cancelled: bool
    reason: str
    snapshot: Snapshot
    hangs: bool = False


def cancel(generation: Generation) -> CancelResult:
    """Ask a master to give up the upgrade under way, and wait for the end of that, one way or the other.

    A master that hangs is asked not to begin the upgrade for which SIGUSR2 may wait. Raises `BoardError`, and OSError
    when this user may not ask.
    """
    snapshot = generation.snapshot()
    number = snapshot.upgrade_number
    hangs = bool(snapshot.tick_at) and clock.since(snapshot.tick_at) > ANSWER_WITHIN
    under_way = snapshot.upgrade_state in UNDER_WAY and snapshot.phase is Phase.SERVING
    if not under_way and not hangs:
        return CancelResult(False, "no upgrade is under way", snapshot)
    if not generation.ask_to_cancel(number if under_way else number + 1):
        return CancelResult(False, f"the master {generation.pid} cannot be asked: its zdd_web is older", snapshot)
    if not under_way:
        reason = f"the master {generation.pid} hangs: an upgrade that waits for it is refused when it runs again"
        return CancelResult(True, reason, snapshot, hangs=True)
    try:
        for snapshot in follow(generation, "the request to cancel", lambda seen: seen.upgrade_number > number):
            if snapshot.upgrade_state not in UNDER_WAY or snapshot.phase is not Phase.SERVING:
                break
    except GaveUp as why:
        return CancelResult(False, f"the master {generation.pid} {why}; it gives up when it runs again", snapshot, True)
    cancelled = snapshot.upgrade_state is UpgradeState.FAILED
    return CancelResult(cancelled, snapshot.upgrade_reason if cancelled else "", snapshot)


# -- stop


@dataclass(frozen=True)
class DrainResult:
    """How a stop ended: `requests` were cut off and background `tasks` abandoned; `left` as in `UpgradeResult`."""

    ok: bool
    reason: str
    seconds: float
    requests: int = 0
    tasks: int = 0
    left: bool = False


def stops(generation: Generation) -> bool:
    """Tell whether a stop is under way already."""
    return generation.header.phase in (*STOPPING, Phase.STOPPED)


def request_stop(generation: Generation) -> None:
    """Send SIGTERM, unless a stop is under way: a second one would end its lame duck. Raises OSError."""
    if not stops(generation):
        generation.signal(signal.SIGTERM)


def drain(
    generation: Generation,
    progress: Progress = silent,
    *,
    interrupts: Interrupts | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> DrainResult:
    """Stop a service and wait until all of its masters have ended.

    `generation` is the active one; those that still retire are stopped by it, and counted with it. A master ends
    within GRACE_PERIOD; one that stands still is waited for until `STANDS_STILL`. Raises `BoardError` when the service
    runs another version of zdd_web, before anything is done, and OSError when it cannot be signalled.
    """
    generation.snapshot()
    began = time.monotonic()
    retiring = [each for each in line_of(generation) if each.pid != generation.pid and _retires(each)]
    everyone = (generation, *retiring)
    unfinished = [UnfinishedWork(each.board) for each in everyone]
    counted, shown = interrupts or Interrupts(), False

    def look() -> None:
        nonlocal shown
        for one in everyone:
            one.refresh()
        for each in unfinished:
            each.look()
        if counted.count > 1:
            raise Left
        if counted.count and not shown:
            shown = True
            on_interrupt()

    look()
    request_stop(generation)
    try:
        _follow_stop(generation, look, progress)
        for each in retiring:
            _follow_retirement(each, look, progress)
        look()
    except GaveUp as why:
        return DrainResult(False, str(why), time.monotonic() - began)
    except Left:
        return DrainResult(False, "", time.monotonic() - began, left=True)
    seconds = time.monotonic() - began
    counts = [each.count() for each in unfinished]
    requests, tasks = sum(count[0] for count in counts), sum(count[1] for count in counts)
    if requests or tasks:
        return DrainResult(False, "", seconds, requests, tasks)
    last = generation.snapshot().phase
    if last in (Phase.BOOTING, Phase.SERVING, Phase.LAME_DUCK):
        return DrainResult(False, f"the master ended while {last.label}: it was killed, or told to stop now", seconds)
    return DrainResult(True, "", seconds)


def _retires(generation: Generation) -> bool:
    header = generation.board.header
    return header.phase == Phase.RETIRING and header.layout == LAYOUT


def _follow_stop(generation: Generation, look: Callable[[], None], progress: Progress) -> None:
    """Wait for the end of the active generation. Raises `GaveUp` and `Left`."""
    not_yet = (Phase.BOOTING, Phase.SERVING)
    try:
        for snapshot in follow(generation, "SIGTERM", lambda seen: seen.phase not in not_yet):
            look()
            if snapshot.phase not in (*not_yet, Phase.STOPPED):
                progress(snapshot)
    except GaveUp as why:
        raise GaveUp(f"the master {why}") from None


def _follow_retirement(generation: Generation, look: Callable[[], None], progress: Progress) -> None:
    """Wait for the end of a generation that retires. Raises `GaveUp` and `Left`."""
    which = f"generation {generation.board.header.generation} (pid {generation.pid})"
    if not generation.alive:
        return
    try:
        for snapshot in follow(generation, "the stop", lambda seen: bool(seen.deadline)):
            look()
            progress(snapshot)
    except GaveUp as why:
        if generation.snapshot().deadline:
            raise GaveUp(f"the master of {which} {why}") from None
        raise GaveUp(f"{which} goes on retiring, it has no deadline: send it SIGTERM") from None
