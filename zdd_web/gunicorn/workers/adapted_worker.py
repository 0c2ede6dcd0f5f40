"""A worker as the adapter of its class sees it: what an adapter may read, and the verbs that it may call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from zdd_web.board import Board, Slot
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.workers.kept_connections import KeptConnections
from zdd_web.gunicorn.workers.request_counts import RequestCounter
from zdd_web.gunicorn.workers.worker_end import WorkerEnd
from zdd_web.process import Process
from zdd_web.settings import Settings

if TYPE_CHECKING:
    import asyncio


class AdaptedWorker(Protocol):
    """A worker, as its adapter sees it; `WorkerRuntime` implements it."""

    #: gunicorn's worker.
    worker: WorkerFacade
    board: Board
    slot: Slot
    process: Process
    pid: int
    requests: RequestCounter
    end: WorkerEnd
    kept: KeptConnections
    #: Calls `worker_exit`, for a worker that ends within a signal handler.
    run_exit_hook: Callable[[], None]

    @property
    def settings(self) -> Settings:
        """Those in force, with those of the app once it is loaded."""

    def boot_step(self) -> AbstractContextManager[Callable[[str], None]]:
        """Report what is raised within as a failed boot; gives a function that names the step that begins."""

    def pass_checks(self, beat: Callable[[], None], loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Wait until the app's own checks pass, calling `beat()`; async checks run in `loop`."""

    def wait_at_gate(self, interval: float) -> None:
        """Mark this worker as ready, wait for the gate with a heartbeat each `interval` seconds, and pass it."""

    def arrive_at_gate(self) -> int:
        """Mark this worker as ready; return the descriptor that is readable once `pass_gate()` may be called."""

    def pass_gate(self) -> None:
        """Mark this worker as serving. Ends it if the gate did not open but the master is gone."""

    def notify(self) -> None:
        """Take a turn: send the heartbeat, follow orders, and go on with the shutdown."""

    @property
    def is_finishing(self) -> bool:
        """Whether the next turn may bring the shutdown forward."""

    def accepts_no_more(self) -> None:
        """Mark this worker as leaving on the board, and close its listeners."""
