"""The view that the servers under test answer with: as little as WSGI allows, so that what is around it shows."""

from __future__ import annotations

from zdd_web.wsgi import ProbeMiddleware

BODY = b"ok\n"
HEADERS = [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))]


def plain(environ, start_response):
    """Answer without zdd_web."""
    start_response("200 OK", HEADERS)
    return [BODY]


probed = ProbeMiddleware(plain)
