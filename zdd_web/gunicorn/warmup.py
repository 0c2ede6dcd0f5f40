"""Warm-up: requests that a worker answers to itself before it says that it is ready.

Django loads its URLconf, templates and database drivers at the first request; without this a user waits for it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any
from wsgiref.util import setup_testing_defaults

from zdd_web import log
from zdd_web.errors import UpgradeError


def warm_up(app: Callable[..., Any], paths: Sequence[str], beat: Callable[[], None]) -> None:
    """GET each path from the app in this process, calling `beat()` between them.

    A path may be written as a URL, for an app that answers to its own host alone (Django's ALLOWED_HOSTS) or redirects
    http to https. Raises what the app raises, and `UpgradeError` for an answer of 500 or more. An answer below is one
    that the app chose to give; one of 400 or more has hardly warmed anything, and is logged.

    >>> warm_up(lambda environ, start: (start("200 OK", []), [b"warm"])[1], ["/"], lambda: None)
    """
    for path in paths:
        beat()
        status = _get(app, path)
        if status[:1] not in ("1", "2", "3", "4"):
            raise UpgradeError(f"WARMUP path {path!r} answered {status!r}: the app is not ready for requests")
        if status[:1] == "4":
            remedy = "name a path that answers, as a URL (https://HOST/path) if the app asks for its host"
            log.emit("warmup.cold", logging.WARNING, pid=os.getpid(), path=path, status=status, remedy=remedy)


def _get(app: Callable[..., Any], path: str) -> str:
    statuses: list[str] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        statuses.append(status)
        return lambda data: None

    url = urllib.parse.urlsplit(path)
    environ: dict[str, Any] = {
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
        "wsgi.errors": sys.stderr,
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
