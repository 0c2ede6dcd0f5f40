"""What an upgrade that came to nothing has left behind, until it has ended.

Three kinds of processes outlive an upgrade:

- a successor that was started on its own and has been rejected: it ends by itself, and is killed if it does not;
- workers of a successor whose master was killed after `go`: they finish their requests (orphaned_workers.py);
- a successor that was told to stop together with this generation, when it had accepted requests already.

They hold the listeners, so each counts as a generation, and this master waits for them before it ends.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

from zdd_web.board import LAYOUT
from zdd_web.gunicorn.upgrade.external_successor import ExternalSuccessor
from zdd_web.gunicorn.upgrade.orphaned_workers import Orphans
from zdd_web.gunicorn.upgrade.successor_process import Upgrade
from zdd_web.system import clock


class FailedSuccessors:
    """The processes of earlier upgrades that have not ended yet."""

    def __init__(self) -> None:
        #: Rejected, and not children of this process.
        self._rejected: list[ExternalSuccessor] = []
        self._orphans: list[Orphans] = []
        #: Stops as this generation does.
        self._stopping: Upgrade | None = None

    def __len__(self) -> int:
        """Count them as generations, the one that stops with this generation aside."""
        return len(self._rejected) + len(self._orphans)

    def __iter__(self) -> Iterator[Upgrade]:
        """Return the successors to which this master still has a channel that is in use."""
        return iter(() if self._stopping is None else (self._stopping,))

    def end(self, upgrade: Upgrade, *, now: bool, reason: str, workers_have: float) -> None:
        """End a successor, and keep what does not end at once; `now` spares no request.

        Its workers have `workers_have` seconds for the requests that they have accepted.
        """
        board = None
        if upgrade.is_child and not now and upgrade.board is not None and upgrade.board.header.layout == LAYOUT:
            board, upgrade.keeps_board = upgrade.board, True
        upgrade.end(now=now, reason=reason)
        if board is not None:
            self._orphans.append(Orphans(board, upgrade.signal_worker, clock.after_ns(workers_have)))
        if isinstance(upgrade, ExternalSuccessor) and not upgrade.follow_end():
            self._rejected.append(upgrade)

    def stop(self, upgrade: Upgrade, sig: signal.Signals) -> None:
        """Have a successor that has accepted requests stop as this generation does, by the same signal."""
        upgrade.ask_to_stop(sig)
        self._stopping = upgrade

    def follow(self) -> None:
        """Look which have ended; the tick's call."""
        self._rejected = [each for each in self._rejected if not each.follow_end()]
        self._orphans = [each for each in self._orphans if not each.follow()]

    def wait(self, too_late: bool, workers_have: float) -> bool:
        """Tell whether the end of this generation is to wait for them.

        The one that stops with it is killed when it stands still, or when it is `too_late`.
        """
        if self._orphans and not too_late:
            return True  # they finish what they have accepted
        if not too_late and any(not each.has_accepted for each in self._rejected):
            return True  # it is to log why it ends, and has two seconds for it
        upgrade = self._stopping
        if upgrade is None:
            return False
        if upgrade.status is not None:
            # Its workers may be left, where it was killed.
            self._stopping = None
            self.end(upgrade, now=False, reason="", workers_have=workers_have)
            return bool(self._orphans)
        if too_late or upgrade.is_stalled():
            upgrade.end(now=True)
            return False
        return True

    def kill(self) -> None:
        """Kill what is left, as far as possible: a process that outlived this master would hold its listeners."""
        for each in self._rejected:
            each.follow_end(wait=False)
        for orphans in self._orphans:
            orphans.end()

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        for upgrade in (*self, *self._rejected):
            upgrade.forget()
        for orphans in self._orphans:
            orphans.forget()
