"""An ASGI app around the app, which counts its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from zdd_web.gunicorn.workers.worker_adapter import request_number
from zdd_web.settings import REQUEST_HEADER

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import App, SocketName
    from zdd_web.gunicorn.workers.worker_adapter import WorkerAdapter

_NUMBER = REQUEST_HEADER.lower().encode()

#: An event, and what a connection tells of itself; see the ASGI specification.
Event: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]

Send: TypeAlias = Callable[[Event], Coroutine[Any, Any, None]]
Receive: TypeAlias = Callable[[], Awaitable[Event]]


class _Request(NamedTuple):
    """What of a request is needed to count it."""

    peer_addr: SocketName
    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    receive: Receive


class _Outcome:
    """Whether a request was answered with an error: some frameworks send their 500 and then raise as well."""

    error = False


class CountingApp:
    """Counts requests in and out: from the moment their headers have arrived until the app has returned."""

    def __init__(
        self,
        app: App,
        adapter: WorkerAdapter,
        headers: tuple[tuple[bytes, bytes], ...],
        *,
        says_close: bool,
    ) -> None:
        self.app = app
        self.websockets: set[Send] = set()
        #: Kept from the garbage collector.
        self.closing: set[asyncio.Task[None]] = set()
        #: The message of the app whose lifespan start-up failed.
        self.startup_error: str | None = None
        self._adapter, self._runtime, self._headers, self._says_close = adapter, adapter.runtime, headers, says_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            request = _Request(scope.get("client"), scope["method"], scope["path"], scope["headers"], receive)
            outcome = _Outcome()
            self._runtime.requests.started(None, request)
            try:
                await self.app(scope, receive, self._noting(send, outcome, scope))
            except Exception:
                # The server answers 500; where the reply had begun its status was another, and it breaks off.
                outcome.error = True
                raise
            finally:
                if outcome.error:
                    self._runtime.requests.failed(request)
                # What is cut at the deadline stays in the count.
                if not self._adapter.has_cut:
                    self._runtime.requests.finished(None, None, None, None)
        elif scope["type"] == "websocket":
            self.websockets.add(send)
            try:
                await self.app(scope, receive, send)
            finally:
                self.websockets.discard(send)
        else:
            await self.app(scope, receive, self._listening(send))

    def _listening(self, send: Send) -> Send:
        async def note(message: Event) -> None:
            if message["type"] == "lifespan.startup.failed":
                self.startup_error = message.get("message") or "no reason given"
            await send(message)

        return note

    def _noting(self, send: Send, outcome: _Outcome, scope: Scope) -> Send:
        http1, ours = scope["http_version"].startswith("1"), self._headers
        if ours:
            numbers = (request_number(value.decode("latin-1")) for name, value in scope["headers"] if name == _NUMBER)
            ours = (*ours, *((_NUMBER, number.encode()) for number in numbers if number))

        async def note(message: Event) -> None:
            if message["type"] == "http.response.start":
                outcome.error = message["status"] >= 500
                headers = [*message.get("headers", ()), *ours]
                # HTTP/2 has no such header. Not decided when the request begins: the reply may come a minute later.
                if http1 and self._says_close and self._runtime.kept.are_to_close():
                    headers = [each for each in headers if each[0].lower() != b"connection"]
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        return note
