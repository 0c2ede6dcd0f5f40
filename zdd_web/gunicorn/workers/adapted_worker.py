"""What the adapter of a worker class sees of the worker that it adapts, and all that it may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from zdd_web.board import Board, Slot
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.workers.after_loop import AfterLoop
from zdd_web.gunicorn.workers.exchange import KeptConnections
from zdd_web.gunicorn.workers.request_counts import RequestCounter
from zdd_web.process import Process
from zdd_web.settings import Settings


class AdaptedWorker(Protocol):
    """A worker, as its adapter sees it; `WorkerRuntime` is one."""

    #: gunicorn's worker.
    worker: WorkerFacade
    board: Board
    slot: Slot
    process: Process
    pid: int
    requests: RequestCounter
    after_loop: AfterLoop
    kept: KeptConnections
    #: Calls `worker_exit`, where a worker ends from within a signal handler.
    run_exit_hook: Callable[[], None]

    @property
    def settings(self) -> Settings:
        """Those in force, with those of the app once it is loaded."""

    def boot_step(self) -> AbstractContextManager[Callable[[str], None]]:
        """Have what is raised reported as a failed boot; gives a function that names what is begun."""

    def pass_checks(self, beat: Callable[[], None], loop: Any = None) -> None:
        """Wait until the app's own checks pass, calling `beat()`; async checks run in `loop`."""

    def wait_at_gate(self, interval: float) -> None:
        """Say that this worker is ready, wait for the gate with a heartbeat each `interval` seconds, and pass it."""

    def arrive_at_gate(self) -> int:
        """Say that this worker is ready; return the descriptor that is readable once `pass_gate()` may be called."""

    def pass_gate(self) -> None:
        """Say that this worker serves. Ends it where the gate did not open but the master is gone."""

    def notify(self) -> None:
        """Take a turn: beat, follow orders, and go on with the way out."""

    @property
    def is_finishing(self) -> bool:
        """Whether the next turn may bring this worker further on its way out."""

    def accepts_no_more(self) -> None:
        """Say on the board that nothing more is accepted, and close the listeners."""
