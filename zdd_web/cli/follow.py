"""Ask a master for an upgrade and follow it on its board to the end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from zdd_web.board import Snapshot, UpgradeState
from zdd_web.service import Generation
from zdd_web.system import boot_log, clock, proc
from zdd_web.system.memfd import NotAMemfd

#: A master in its loop answers a signal at its next turn, at the latest after a second.
ANSWER_WITHIN = 10.0
#: One that has not been round its loop for so long is stopped or stuck, seconds.
STANDS_STILL = 60.0
POLL = 0.02


@dataclass(frozen=True)
class UpgradeResult:
    """How an upgrade ended; `log` is the end of what the new generation had said when it failed.

    `serves_on` is true when the master itself has said that it does.
    """

    ok: bool
    reason: str
    log: str
    seconds: float
    requested_at: float
    generation: int
    serves_on: bool


def upgrade(generation: Generation, progress: Callable[[Snapshot], None] = lambda snapshot: None) -> UpgradeResult:
    """Send SIGUSR2 and wait until the new generation is in office, or the upgrade was refused or has failed.

    The master ends every upgrade within its UPGRADE_TIMEOUT, one way or the other; one that stands still itself is
    waited for until `STANDS_STILL`. Raises `BoardError` when the service runs another version of zdd_web.
    """
    # Held from now on: it outlives its master.
    header = generation.board.header
    before = header.upgrade_number
    began = time.monotonic()
    expected = header.generation + 1

    def outcome(ok: bool, reason: str, log: str = "", serves_on: bool = False) -> UpgradeResult:
        return UpgradeResult(ok, reason, log, time.monotonic() - began, began, expected, serves_on)

    try:
        generation.signal(signal.SIGUSR2)
    except PermissionError:
        return outcome(False, f"no permission to signal process {generation.pid}: run this as its user or as root")
    except ProcessLookupError:
        return outcome(False, f"the master {generation.pid} is gone")
    last = UpgradeState.NONE
    while True:
        snapshot = generation.snapshot()
        if header.refused_number == before + 1 <= snapshot.upgrade_number:
            # The upgrade that is on the board is another command's.
            return outcome(False, f"refused: {header.refused_reason}", serves_on=True)
        if snapshot.upgrade_number != before:
            if snapshot.upgrade_state is not last:
                last = snapshot.upgrade_state
                progress(snapshot)
            if last is UpgradeState.DONE:
                return outcome(True, "")
            if last in (UpgradeState.FAILED, UpgradeState.REFUSED):
                log = _boot_log(generation, snapshot) if last is UpgradeState.FAILED else ""
                return outcome(False, f"{last.name.lower()}: {snapshot.upgrade_reason}", log, serves_on=True)
        elif time.monotonic() - began > ANSWER_WITHIN:
            return outcome(False, f"the master {generation.pid} did not answer SIGUSR2 within {ANSWER_WITHIN:g} s")
        if snapshot.tick_at and clock.since(snapshot.tick_at) > STANDS_STILL:
            return outcome(False, f"the master {generation.pid} has stood still for {STANDS_STILL:g} s")
        if not proc.alive(generation.pid, snapshot.master_start):
            # Its last words are on the board, which outlives it.
            if generation.snapshot().upgrade_state is UpgradeState.DONE:
                return outcome(True, "")
            return outcome(False, f"the master {generation.pid} ended during the upgrade")
        time.sleep(POLL)


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
