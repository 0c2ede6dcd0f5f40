"""Probes for any WSGI app: `app = zdd_web.wsgi.ProbeMiddleware(app)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zdd_web import process
from zdd_web.health import Probe, Reply, decide, table
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def answer(path: str, method: str) -> Reply | None:
    """Return the reply to a probe; None when the path is none. For adaptors."""
    here = process.current()
    probe = _table(here).get(path)
    if probe is None:
        return None
    header = here.board.header
    successor = header.successor_phase
    return decide(probe, method, here.phase, Phase(successor) if successor else None)


_cached: tuple[Settings, dict[str, Probe]] | None = None


def _table(here: process.Process) -> dict[str, Probe]:
    # One table a Settings object: it is looked up on every request of the app.
    global _cached
    if _cached is None or _cached[0] is not here.settings:
        _cached = here.settings, table(here.settings)
    return _cached[1]


class ProbeMiddleware:
    """Answer probes before the app sees them; pass everything else on untouched.

    >>> app = ProbeMiddleware(lambda environ, start_response: [b"app"])
    >>> app({"PATH_INFO": "/livez", "REQUEST_METHOD": "GET"}, lambda status, headers: None)
    [b'ok\\n']
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        reply = answer(environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"])
        if reply is None:
            return self.app(environ, start_response)
        start_response(reply.status_line, list(reply.headers))
        return [reply.body]
