"""Probes for any WSGI app: `app = zdd_web.wsgi.ProbeMiddleware(app)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from zdd_web import process
from zdd_web.health import Probe, Reply, decide, table
from zdd_web.lifecycle import Phase
from zdd_web.settings import FrameworkSettings, Settings, of_app

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Probes:
    """Which paths are probes, for one app, and the answers to them. For adaptors.

    `brought` is called for the app's own settings when they are first needed, and again after `forget()` and whenever
    the settings of the process have changed.
    """

    def __init__(self, brought: Callable[[], FrameworkSettings] | None = None) -> None:
        self._brought = brought
        # Kept, since each request of the app is looked up in it; in one attribute, so that threads see both or neither.
        self._made: tuple[Settings | None, dict[str, Probe]] = (None, {})

    def forget(self) -> None:
        """Have the app's settings read again: they have changed."""
        self._made = (None, {})

    def answer(self, path: str, method: str) -> Reply | None:
        """Return the reply to a probe; None when the path is none."""
        here = process.current()
        made_of, paths = self._made
        if made_of is not here.settings:
            paths = self._make(here)
        probe = paths.get(path)
        if probe is None:
            return None
        header = here.board.header
        successor = header.successor_phase
        return decide(probe, method, here.phase, Phase(successor) if successor else None)

    def _make(self, here: process.Process) -> dict[str, Probe]:
        settings = here.settings
        paths = table(of_app(settings, here.fixed, self._brought()) if self._brought else settings)
        self._made = settings, paths
        return paths


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
        reply = self._probes.answer(environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"])
        if reply is None:
            return self.app(environ, start_response)
        start_response(reply.status_line, list(reply.headers))
        return [reply.body]
