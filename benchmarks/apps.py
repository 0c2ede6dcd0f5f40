"""The view that the servers under test answer with: as little as WSGI allows, so that what is around it shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
