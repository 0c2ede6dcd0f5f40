"""The app of the service under test, and the ways in which a release of it is broken.

Each release is a file that names its version and, if it is broken, how: see service.py. A reply is computed from what
was asked, so that one that belongs to another request, or has an end missing, is found out.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from zdd_web import process
from zdd_web.board import WorkerState
from zdd_web.wsgi import ProbeMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Answers with the release's version.
VERSION_PATH = "/version"


def pattern(number: str, size: int) -> bytes:
    """Return `size` bytes that no other number has.

    >>> pattern("17", 8)
    b'17.17.17'
    """
    unit = f"{number}.".encode()
    return (unit * (size // len(unit) + 1))[:size]


def answer(version: str, path: str, body: bytes) -> bytes:
    """Return the body of a reply: that of a POST, or what `/NUMBER/SIZE` asks for.

    >>> answer("2", "/17/8", b""), answer("2", "/", b"body"), answer("2", "/version", b"")
    (b'17.17.17', b'body', b'2')
    """
    if path == VERSION_PATH:
        return version.encode()
    number, _, size = path.lstrip("/").partition("/")
    return pattern(number, int(size)) if size.isdigit() else body


def wsgi(version: str) -> WSGIApplication:
    """Return the app as a WSGI app."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = answer(version, environ["PATH_INFO"], environ["wsgi.input"].read())
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    return ProbeMiddleware(app)


def asgi(version: str) -> Callable[[Any, Any, Any], Any]:
    """Return the app as an ASGI app."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        received, more = b"", True
        while more:
            message = await receive()
            received += message.get("body", b"")
            more = message.get("more_body", False)
        body = answer(version, scope["path"], received)
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def break_as(fault: str) -> None:
    """Do what a broken release does while it is imported. Raises ImportError for "import_error"."""
    if fault == "import_error":
        raise ImportError("this release is broken: it raises at import")
    if fault == "never_ready":
        time.sleep(3600)
    elif fault == "worker_crash":
        _at_the_gate(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif fault == "master_crash":
        _at_the_gate(lambda: os.kill(os.getppid(), signal.SIGKILL))
    elif fault:
        raise ValueError(f"fault {fault!r}: one of import_error, never_ready, worker_crash, master_crash")


def _at_the_gate(crash: Callable[[], None]) -> None:
    """Crash as soon as this worker has begun to serve, which is within the commit window."""

    def watch() -> None:
        while True:
            slot = process.current().slot
            if slot is not None and slot.state == WorkerState.SERVING:
                crash()
                return
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
