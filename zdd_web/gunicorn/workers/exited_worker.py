"""What the master has seen of a worker that has ended."""

from __future__ import annotations

import os
from typing import NamedTuple

from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter.exits import APP_LOAD_ERROR, WORKER_BOOT_ERROR
from zdd_web.system import proc


class ExitedWorker(NamedTuple):
    """What a worker that is no more had last said on the board."""

    pid: int
    state: WorkerState
    error: str
    abandoned: int
    in_flight: int
    told: bool
    status: int | None
    late: int = 0
    late_by: float = 0.0
    late_peer: str = ""
    late_quarters: tuple[int, ...] = (0, 0, 0, 0)
    late_new_by: float = 0.0
    requests: int = 0
    server_errors: int = 0
    handed_over: int = 0
    received: int = 0
    closed_idle: int = 0

    @property
    def lost(self) -> bool:
        """Whether it had served and ended without having been told to."""
        if self.told:
            return False
        # A worker that gunicorn's `timeout` ends has time to say that it leaves; a person may have asked one to.
        failed = self.killed or self.exit_status != 0
        return self.state is WorkerState.SERVING or (self.state is WorkerState.LEAVING and failed)

    @property
    def ended(self) -> str:
        """How it ended, as a text; "" when it was not seen."""
        return "" if self.status is None else proc.describe(self.status)

    @property
    def exit_status(self) -> int:
        """Its exit status; 0 when a signal ended it or its end was not seen."""
        return os.waitstatus_to_exitcode(self.status) if self.status is not None and os.WIFEXITED(self.status) else 0

    @property
    def killed(self) -> bool:
        """Whether a signal ended it."""
        return self.status is not None and os.WIFSIGNALED(self.status)

    @property
    def could_not_boot(self) -> bool:
        """Whether it ended in the way in which gunicorn's workers end when they cannot boot, or not load the app."""
        return self.exit_status in (WORKER_BOOT_ERROR, APP_LOAD_ERROR)
