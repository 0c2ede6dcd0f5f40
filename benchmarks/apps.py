"""The view that the servers under test answer with: as little as WSGI allows, so that what is around it shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import zdd_web
from zdd_web.wsgi import ProbeMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

BODY = b"ok\n"
HEADERS = [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))]


def plain(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer without zdd_web."""
    start_response("200 OK", HEADERS)
    return [BODY]


probed = ProbeMiddleware(plain)


def slow(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer after 20 ms: more clients than workers then wait in the kernel's queue."""
    time.sleep(0.02)
    return plain(environ, start_response)


def _echo(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer after 20 ms with what came: the body of a POST, the path of a GET; and the port that it came from."""
    body = environ["wsgi.input"].read() or environ["PATH_INFO"].lstrip("/").encode("latin-1")
    time.sleep(0.02)
    port = environ.get("REMOTE_PORT", "")
    start_response(
        "200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), ("X-Upstream-Port", port)]
    )
    return [body]


echoing = ProbeMiddleware(_echo)


def _block(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/block":
        time.sleep(600)
    return plain(environ, start_response)


blocking = ProbeMiddleware(_block)


def with_a_job(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer at once; each hundredth request leaves five seconds of work to a thread that nobody cuts off."""
    global _requests
    _requests += 1
    if _requests % 100 == 0:
        threading.Thread(target=time.sleep, args=(5,)).start()
    return plain(environ, start_response)


def with_a_tracked_job(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Do as `with_a_job`, with work that zdd_web tracks."""
    global _requests
    _requests += 1
    if _requests % 100 == 0:
        zdd_web.background.go(time.sleep, 5)
    return plain(environ, start_response)


_requests = 0


async def plain_asgi(scope: Any, receive: Any, send: Any) -> None:
    """Answer at once, as `plain` does, in ASGI."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
