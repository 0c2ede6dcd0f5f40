"""uvicorn_worker's worker, and uvicorn's own server and configuration, which it makes and keeps to itself."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvicorn.server import Server

    from zdd_web.gunicorn.adapter.protocols import App
    from zdd_web.gunicorn.adapter.worker import WorkerFacade


class UvicornServer:
    """What one worker runs in the place of uvicorn_worker's own server, which takes the signals."""

    def __init__(self, worker: WorkerFacade) -> None:
        self._config = worker.raw.config
        self._config.limit_max_requests = None
        self._made: Server | None = None

    def make(self, app: App) -> None:
        """Make the server of an app."""
        from uvicorn.server import Server

        self._config.app = app
        made: Any = Server(self._config)
        made.capture_signals = contextlib.nullcontext
        self._made = made

    async def serve(self, worker: WorkerFacade) -> bool:
        """Serve until `end()`; tell whether the app's start-up succeeded."""
        made = self._made
        assert made is not None
        await made.serve(sockets=list(worker.sockets))
        return made.started

    def end_within(self, seconds: int | None) -> None:
        """Give its end so many seconds, or no limit."""
        self._config.timeout_graceful_shutdown = seconds

    def end(self) -> None:
        """Have it end; it closes what is idle, and websockets with 1012."""
        assert self._made is not None
        self._made.should_exit = True
