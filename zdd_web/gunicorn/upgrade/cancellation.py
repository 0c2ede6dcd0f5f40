"""What `zdd-web cancel` has asked of this master, and for which of its upgrades."""

from __future__ import annotations

from zdd_web.board import Header
from zdd_web.board.cancel_request import CancelRequest
from zdd_web.errors import UpgradeError


class Cancellation:
    """The request to give up an upgrade, read by the number of the SIGUSR2 that has begun it."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self.request = CancelRequest()
        #: Of the SIGUSR2 that has begun the upgrade under way.
        self.number = 0

    def refuse_if_asked(self) -> None:
        """Raise `UpgradeError` for the upgrade that is about to begin, if it was cancelled meanwhile."""
        asked_by = self.request.asked_by(self._header.upgrade_number + 1)
        if asked_by is not None:
            raise UpgradeError(
                f"it was cancelled by process {asked_by} before it began: ask for it again if it is still wanted"
            )

    def began(self) -> None:
        """Note that the last SIGUSR2 that was counted has begun an upgrade."""
        self.number = self._header.upgrade_number

    def began_without_a_number(self) -> None:
        """Note that a takeover has begun: a request for the last SIGUSR2 must not reach it."""
        self.request.clear()
        self.began()

    def asked_by(self) -> int | None:
        """Return the pid of the process that wants the upgrade under way to be given up, None while there is none."""
        asked_by = self.request.asked_by(self.number)
        # A SIGUSR2 that was refused meanwhile has a number too, the last that a command sees.
        return self.request.asked_by(self._header.upgrade_number) if asked_by is None else asked_by

    def close(self) -> None:
        """Close, in a worker, what is the master's alone."""
        self.request.close()
