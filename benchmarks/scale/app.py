"""The app of the service under test: a trivial view, and one that begins background tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import zdd_web
from benchmarks.apps import plain
from zdd_web.wsgi import ProbeMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_never = threading.Event()


def _app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    what, _, count = environ["PATH_INFO"].lstrip("/").partition("/")
    if what == "tasks":
        for _ in range(int(count)):
            zdd_web.background.go(_never.wait, name="scale")
    return plain(environ, start_response)


app = ProbeMiddleware(_app)
