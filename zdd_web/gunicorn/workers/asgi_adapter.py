"""gunicorn's own `asgi` worker (25 and later)."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from zdd_web.gunicorn.adapter import asgi, request_heads
from zdd_web.gunicorn.adapter.kept_asyncio import AsgiConnections, AsyncioConnections
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.asyncio_adapter import TURN, AsyncioAdapter
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import AsgiProtocol

#: How long a client may take to answer to the end of its websocket or HTTP/2 connection, seconds; as in gunicorn.
CLOSE_WITHIN = 5.0


class AsgiAdapter(AsyncioAdapter["AsgiProtocol"]):
    """gunicorn.workers.gasgi.ASGIWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        self._drained = asyncio.Event()
        self.says_close = not asgi.adapt_protocol(runtime.kept.are_to_close)

    def make_store(self) -> AsyncioConnections[AsgiProtocol]:
        """See `AsyncioAdapter`."""
        limit = self.worker.cfg.worker_connections
        return AsgiConnections(self.runtime.kept, lambda: list(self.connections), self._websockets, limit)

    def stand_at_gate(self) -> None:
        """See `WorkerAdapter`; the gate itself comes after lifespan start-up."""
        self.worker.set_asgi(self.count(self.worker.asgi))
        asgi.replace_loop(self.worker, self._serving, self._shutting_down)

    def _serving(self, serve: asgi.Coroutine) -> asgi.Coroutine:
        async def then_serve() -> None:
            self.enter_loop()
            await serve()

        return then_serve

    def _shutting_down(self, shutdown: asgi.Coroutine) -> asgi.Coroutine:
        async def shutdown_when_drained() -> None:
            # gunicorn comes here by itself when the master is gone: test_asgi_shuts_down_when_its_master_is_gone.
            self._obey_term()
            await self._drained.wait()
            await self._close_connections()
            asgi.forget_connections(self.worker)
            await shutdown()

        return shutdown_when_drained

    def reads_a_head(self, connection: AsgiProtocol) -> bool:
        """See `AsyncioAdapter`."""
        return request_heads.gunicorn_reads_a_head(connection)

    def stop_accepting(self) -> None:
        """See `AsyncioAdapter`."""
        super().stop_accepting()
        # Connections close after their next reply, HTTP/2 sends GOAWAY; see `_shutting_down()`.
        self.worker.end_loop()

    def end_loop(self) -> None:
        """See `WorkerAdapter`."""
        self._drained.set()

    async def _close_connections(self) -> None:
        if self.has_cut:
            return
        assert self.loop is not None and self.app is not None
        for send in self.app.websockets:
            # 1012: service restart.
            self.app.closing.add(self.loop.create_task(send({"type": "websocket.close", "code": 1012})))
        transports, idle = [], []
        for connection in list(self.connections):
            if connection.transport is not None:
                transports.append(connection.transport)
                # gunicorn waits for as long as `keepalive`. What has a reader is HTTP/2 and takes its leave by itself.
                if self.store.can_travel and self.store.is_idle(connection):
                    idle.append(connection)
                elif not (connection.reader or connection._websocket):
                    connection.transport.close()
        since = time.monotonic()
        while not clock.passed(self.runtime.process.deadline_ns):
            for connection in idle:
                # One whose next request has arrived is answered first.
                self.store.close_idle(connection)
            unsent = any(transport.get_write_buffer_size() for transport in transports)
            is_open = not all(transport.is_closing() for transport in transports)
            if not unsent and not (is_open and time.monotonic() - since < CLOSE_WITHIN):
                break
            await asyncio.sleep(TURN)
