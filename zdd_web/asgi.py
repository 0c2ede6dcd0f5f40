"""Probes for any ASGI 3 app: `app = zdd_web.asgi.ProbeMiddleware(app)`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from zdd_web.probes import Probes

if TYPE_CHECKING:
    from zdd_web.health import Reply

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ProbeMiddleware:
    """Answer probes in the event loop before the app sees them; pass everything else on untouched.

    Websockets and lifespan are the app's. `probes` is for adaptors.

    >>> import asyncio
    >>> async def app(scope, receive, send): ...
    >>> async def send(message): print(message.get("status", message.get("body")))
    >>> scope = {"type": "http", "method": "GET", "path": "/livez"}
    >>> asyncio.run(ProbeMiddleware(app)(scope, None, send))
    200
    b'ok\\n'
    """

    def __init__(self, app: App, probes: Probes | None = None) -> None:
        self.app = app
        self._probes = probes or Probes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            # The path within the app, as PATH_INFO is. Servers disagree on whether `path` begins with `root_path`.
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if self._probes.asks(path):
                if self._probes.must_wait():
                    await asyncio.to_thread(self._probes.wait)
                reply = self._answer(scope, path)
                if reply is not None:
                    await _send(reply, send)
                    return
        await self.app(scope, receive, send)

    def _answer(self, scope: Scope, path: str) -> Reply | None:
        client = scope.get("client")
        return self._probes.answer(
            path,
            scope["method"],
            query=scope.get("query_string", b"").decode("latin-1"),
            accept=", ".join(value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"accept"),
            peer=(client and client[0]) or "",
        )


async def _send(reply: Reply, send: Send) -> None:
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
