"""Probes for any WSGI app: `app = zdd_web.wsgi.ProbeMiddleware(app)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zdd_web.probes import Probes

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["ProbeMiddleware", "Probes"]


class ProbeMiddleware:
    """Answer probes before the app sees them; pass everything else on untouched.

    >>> app = ProbeMiddleware(lambda environ, start_response: [b"app"])
    >>> app({"PATH_INFO": "/livez", "REQUEST_METHOD": "GET"}, lambda status, headers: None)
    [b'ok\\n']
    """

    def __init__(self, app: WSGIApplication, probes: Probes | None = None) -> None:
        self.app = app
        self._probes = probes or Probes()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if not self._probes.asks(path):
            return self.app(environ, start_response)
        reply = self._probes.answer(
            path,
            environ["REQUEST_METHOD"],
            query=environ.get("QUERY_STRING", ""),
            accept=environ.get("HTTP_ACCEPT", ""),
            peer=environ.get("REMOTE_ADDR", ""),
        )
        if reply is None:
            return self.app(environ, start_response)
        start_response(reply.status_line, list(reply.headers))
        return [reply.body]
