"""Warm-up: requests that a worker sends to its own app before it is ready.

Django loads its URLconf, templates and database drivers at the first request. Without a warm-up a user waits for that.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zdd_web import log
from zdd_web.errors import UpgradeError
from zdd_web.system.stdio import TolerantStream

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import App


def warm_up(
    app: App,
    paths: Sequence[str],
    beat: Callable[[], None],
    step: Callable[[str], None] = lambda what: None,
) -> None:
    """GET each path from the app in this process, calling `beat()` between them, and `step()` with what is next.

    A path may be written as a URL, for an app that answers only to its own host (Django's ALLOWED_HOSTS) or redirects
    http to https. Raises what the app raises, and `UpgradeError` for a status of 500 or more. A status of 400 to 499 is
    logged: such a reply has hardly warmed anything.

    >>> warm_up(lambda environ, start: (start("200 OK", []), [b"warm"])[1], ["/"], lambda: None)
    """
    for path in paths:
        beat()
        step(f"warming up ({path})")
        _judge(path, _get(app, path))


async def warm_up_asgi(app: App, paths: Sequence[str], step: Callable[[str], None] = lambda what: None) -> None:
    """As `warm_up()`, for an ASGI app, whose loop beats meanwhile."""
    for path in paths:
        step(f"warming up ({path})")
        _judge(path, await _get_asgi(app, path))


def _judge(path: str, status: str) -> None:
    if status[:1] not in ("1", "2", "3", "4"):
        raise UpgradeError(f"WARMUP path {path!r} answered {status!r}: the app is not ready for requests")
    if status[:1] == "4":
        remedy = "name a path that answers, as a URL (https://HOST/path) if the app asks for its host"
        log.emit("warmup.cold", logging.WARNING, pid=os.getpid(), path=path, status=status, remedy=remedy)


def _get(app: App, path: str) -> str:
    from wsgiref.util import setup_testing_defaults

    statuses: list[str] = []

    def start_response(status: str, headers: object, exc_info: object = None) -> Callable[[bytes], None]:
        statuses.append(status)
        return lambda data: None

    url = urllib.parse.urlsplit(path)
    environ: dict[str, object] = {
        "PATH_INFO": url.path or "/",
        "QUERY_STRING": url.query,
        "SCRIPT_NAME": "",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": url.netloc or "localhost",
        "SERVER_NAME": url.hostname or "localhost",
        "SERVER_PORT": str(url.port or (443 if url.scheme == "https" else 80)),
        "wsgi.url_scheme": url.scheme or "http",
        "HTTP_USER_AGENT": "zdd_web-warmup",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": TolerantStream(sys.stderr),
    }
    setup_testing_defaults(environ)
    body = app(environ, start_response)
    try:
        for _ in body:
            pass
    finally:
        if hasattr(body, "close"):
            body.close()
    return statuses[-1] if statuses else "500 start_response was never called"


async def _get_asgi(app: App, path: str) -> str:
    statuses: list[int] = []
    asked = False

    async def receive() -> dict[str, object]:
        nonlocal asked
        if asked:
            import asyncio  # not in the master, nor in workers without a loop

            # The client is still there: Django listens for its end beside the view, and would cancel that.
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    url = urllib.parse.urlsplit(path)
    scheme = url.scheme or "http"
    headers = {"host": url.netloc or "localhost", "user-agent": "zdd_web-warmup"}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": scheme,
        "path": urllib.parse.unquote(url.path) or "/",
        "raw_path": (url.path or "/").encode("latin-1"),
        "query_string": url.query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("127.0.0.1", 0),
        "server": (url.hostname or "localhost", url.port or (443 if scheme == "https" else 80)),
        "state": {},
    }
    await app(scope, receive, send)
    return str(statuses[-1]) if statuses else "500 no reply was sent"
