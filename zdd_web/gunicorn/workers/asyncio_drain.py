"""What an asyncio worker does between the order to leave and the end of its loop: it finishes everything within it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.asgi_request_counter import CountingApp
from zdd_web.gunicorn.workers.worker_adapter import LINGER
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import AsyncioProtocol

#: A connection that was accepted is known a few turns of the loop later; seconds.
SETTLE = 0.2


class DrainedAdapter(Protocol):
    """The adapter of an asyncio worker, as far as its drain goes."""

    runtime: AdaptedWorker
    app: CountingApp | None
    #: Whether requests in hand were given up at the deadline.
    has_cut: bool

    @property
    def connections(self) -> Iterable[AsyncioProtocol]:
        """The protocols of the connections that were accepted."""

    def stop_accepting(self) -> None:
        """Close the listeners of this process."""

    def is_reading_a_head(self) -> bool:
        """Tell whether a part of a request's head has arrived on a connection; such a connection is not idle."""


class AsyncioDrain:
    """A worker between the order to leave and the end of its loop; see `Leaving`."""

    def __init__(self, adapter: DrainedAdapter) -> None:
        self._adapter, self._runtime = adapter, adapter.runtime
        self._since: float | None = None

    def over(self) -> bool:
        """See `Leaving`."""
        adapter, runtime = self._adapter, self._runtime
        if self._since is None:
            self._since = time.monotonic()
            adapter.stop_accepting()
        if runtime.slot.in_flight:
            # What is cut stays in the count.
            adapter.has_cut = clock.passed(runtime.process.deadline_ns)
            if adapter.has_cut:
                runtime.end.give_up_background()
            return adapter.has_cut
        if adapter.is_reading_a_head() and not clock.passed(runtime.process.deadline_ns):
            return False
        # A request may be on its way on a kept connection, or on one that was accepted a moment ago.
        if time.monotonic() - self._since < (LINGER if self._is_connected() else SETTLE):
            return False
        if not runtime.end.background_is_over():
            return False
        # The end of the loop cancels tasks, and a task that is cancelled counts as done.
        runtime.end.give_up_background()
        return True

    def _is_connected(self) -> bool:
        # uvicorn gives a websocket's transport to another protocol: the one that accepted it may be collected already.
        if self._adapter.app is not None and self._adapter.app.websockets:
            return True
        transports = (each.transport for each in list(self._adapter.connections))
        # None while it is being made, and in its TLS handshake.
        return any(transport is None or not transport.is_closing() for transport in transports)
