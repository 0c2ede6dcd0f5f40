"""uvicorn's worker, of the package uvicorn-worker."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zdd_web.gunicorn.adapter import request_heads
from zdd_web.gunicorn.adapter.exits import WORKER_BOOT_ERROR
from zdd_web.gunicorn.adapter.kept_asyncio import AsyncioConnections, UvicornConnections
from zdd_web.gunicorn.adapter.uvicorn import UvicornServer
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.asyncio_adapter import AsyncioAdapter
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import UvicornProtocol

#: For how long requests that have arrived on idle connections are read before the loop ends, and how often, seconds.
LAST_LOOKS, LOOK_AGAIN = 0.5, 0.02


class UvicornAdapter(AsyncioAdapter["UvicornProtocol"]):
    """uvicorn_worker.UvicornWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        self._uvicorn = UvicornServer(runtime.worker)

    def make_store(self) -> AsyncioConnections[UvicornProtocol]:
        """See `AsyncioAdapter`."""
        return UvicornConnections(self.runtime.kept, lambda: list(self.connections), self._websockets)

    def stand_at_gate(self) -> None:
        """See `WorkerAdapter`; the gate itself comes after lifespan start-up."""
        self.worker.set_wsgi(self.count(self.worker.wsgi))
        self.worker.replace("_serve", self._serve)

    async def _serve(self) -> None:
        self._uvicorn.make(self.worker.wsgi)
        self.enter_loop()
        if not await self._uvicorn.serve(self.worker):
            raise SystemExit(WORKER_BOOT_ERROR)

    def reads_a_head(self, connection: UvicornProtocol) -> bool:
        """See `AsyncioAdapter`."""
        return request_heads.uvicorn_reads_a_head(connection)

    def end_loop(self) -> None:
        """See `WorkerAdapter`."""
        left = clock.remaining(self.runtime.process.deadline_ns)
        self._uvicorn.end_within(None if left is None else 0 if self.has_cut else max(1, math.ceil(left)))
        self._close_idle(clock.after_ns(LAST_LOOKS))

    def _close_idle(self, until: int) -> None:
        # uvicorn would look at none of them before it closes them all.
        assert self.loop is not None
        left = [each for each in self.store.idle() if not self.store.close_idle(each)]
        if left and not self.has_cut and not clock.passed(until):
            self.loop.call_later(LOOK_AGAIN, self._close_idle, until)
        else:
            self._uvicorn.end()
