"""How the last upgrade ended, on the board, where `zdd-web upgrade` reads it."""

from __future__ import annotations

from zdd_web.board import Header, UpgradeState
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.upgrade.states import OUTCOME
from zdd_web.gunicorn.upgrade.successor_process import Upgrade
from zdd_web.system import clock


class Outcome:
    """The words of the header that tell it."""

    def __init__(self, header: Header) -> None:
        self._header = header

    def requested(self) -> None:
        """Count a SIGUSR2 whose outcome is on the board now: the command that sent it waits for this."""
        self._header.upgrade_number += 1

    def publish(self, upgrade: Upgrade, reason: str = "") -> None:
        """Write what follows from a successor's state."""
        state = OUTCOME[upgrade.state]
        if state is UpgradeState.FAILED:
            # First: a command that sees the state reads it.
            guarded("boot log", upgrade.boot_log.publish)()
        self._write(state, reason)

    def refused(self, reason: str, *, under_way: bool) -> None:
        """Write that the request which is counted next was refused.

        The outcome of an upgrade that is `under_way` stays: the command that began it reads it.
        """
        self._header.refused_reason = reason
        self._header.refused_number = self._header.upgrade_number + 1
        if not under_way:
            self._write(UpgradeState.REFUSED, reason)
        self._header.upgrades_refused += 1

    def _write(self, state: UpgradeState, reason: str) -> None:
        self._header.upgrade_reason = reason
        self._header.upgrade_since = clock.now_ns()
        self._header.upgrade_state = state
