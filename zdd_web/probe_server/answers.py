"""Which path is what on the probe port, and when a verdict has changed."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple
from urllib.parse import unquote

from zdd_web import log
from zdd_web.board import Board
from zdd_web.health import Health, Probe, Question, Reply, Status, answer, examine, not_found, plain, table
from zdd_web.lifecycle import Phase
from zdd_web.metrics import Collector
from zdd_web.probe_server.scrapes import Scrapes
from zdd_web.probes import kinds, look, may_see
from zdd_web.settings import Settings
from zdd_web.system import proc

#: How often an unknown path may make the table anew, seconds: a worker may have registered a check meanwhile.
REMAKE = 1.0

#: For how long a master must be seen to stall before that is logged, seconds.
CONFIRM = 1.0

METRICS_PATH = "/metrics"


class Asked(NamedTuple):
    """A request, as far as an answer depends on it."""

    method: str
    path: str
    query: str = ""
    accept: str = ""
    peer: str = ""

    @classmethod
    def read(cls, method: bytes, target: bytes, accept: bytes, peer: str) -> Asked:
        """Take a request's target apart; a proxy's absolute form means the same path.

        >>> Asked.read(b"GET", b"http://10.0.0.7/readyz?verbose", b"", "").path
        '/readyz'
        """
        text = target.decode("latin-1")
        if "://" in text.partition("?")[0]:
            text = "/" + text.partition("://")[2].partition("/")[2]
        path, _, query = text.partition("?")
        return cls(method.decode("latin-1"), unquote(path), query, accept.decode("latin-1"), peer)


class Answers:
    """The answers of one generation."""

    def __init__(self, board: Board, settings: Settings, predecessors: Board | None = None) -> None:
        self._board, self._settings, self._predecessors = board, settings, predecessors
        # Kept: what it has shown once never becomes less.
        self._scrapes = Scrapes(Collector(board, predecessors))
        self._probes: dict[str, tuple[Probe, str]] = {}
        self._made_at = -REMAKE
        self._liveness_path = settings.liveness_path.encode()
        #: No process moves the phase of this generation any more.
        self.orphaned = False

    def is_liveness(self, head: bytes | bytearray) -> bool:
        """Tell whether a request that begins like this asks for liveness, without taking it apart."""
        target = head[:256].partition(b" ")[2]
        return target.startswith(self._liveness_path)

    def reply(self, asked: Asked) -> Reply:
        """Answer a request."""
        found = self._find(asked.path)
        details = may_see(self._settings.details, asked.peer, default="loopback")
        if found is not None:
            probe, only = found
            question = Question.read(asked.method, asked.query, asked.accept, only=only, details=details)
            return answer(probe, question, self.look())
        if asked.path == METRICS_PATH:
            return self._metrics(asked, details=details)
        return not_found(asked.method)

    def _metrics(self, asked: Asked, *, details: bool) -> Reply:
        try:
            content_type, body = self._scrapes.get(asked.accept, details=details)
        except ImportError:
            return plain(
                501,
                "Not Implemented",
                "prometheus_client is not installed: pip install 'zdd-web[metrics]'\n",
                asked.method,
            )
        return plain(200, "OK", body.decode(), asked.method, content_type=content_type)

    def look(self) -> Health:
        """Read the board; that of a master that is gone only says what had been."""
        ready = self._settings.lame_duck_ready
        health, header = look(self._board, lame_duck_ready=ready), self._board.header
        if header.successor_pid:
            # Retired, to the end of its last connection: a question is about the service, which its successor is.
            return health._replace(phase=Phase.RETIRING)
        if not self.orphaned:
            return health
        before = self._predecessors
        if before is not None and proc.alive(before.header.master_pid, before.header.master_start):
            # It takes over again, or has never ceased to serve.
            return look(before, lame_duck_ready=ready)
        return health._replace(phase=Phase.STOPPED)

    def _find(self, path: str) -> tuple[Probe, str] | None:
        if path not in self._probes and time.monotonic() - self._made_at >= REMAKE:
            self._made_at = time.monotonic()
            self._probes = table(self._settings, kinds(self._board))
        return self._probes.get(path)


class Verdicts:
    """What liveness and readiness were when they were last looked at; a change is logged, once."""

    def __init__(self) -> None:
        self._failing: dict[Probe, bool] = {Probe.LIVENESS: False, Probe.READINESS: False}
        #: Since when the master stalls, on the monotonic clock; None while it does not. And whether that was logged.
        self._stalled_since: float | None = None
        self._stall_logged = False

    def see(self, health: Health) -> None:
        """Log what has changed. Not of a generation that boots, nor of one whose successor says it."""
        self._see_master(health.master_stalled)
        if health.phase in (Phase.BOOTING, Phase.RETIRING):
            return
        for probe, was in self._failing.items():
            bad = [each for each in examine(probe, health) if each.status is Status.FAIL]
            if bool(bad) == was:
                continue
            self._failing[probe] = bool(bad)
            if bad:
                # A stop that was asked for does not raise an alarm.
                level = logging.WARNING if health.speaking is Phase.SERVING else logging.INFO
                reason = "; ".join(f"{each.name}: {each.text}" for each in bad)
                log.emit("probe.failing", level, probe=probe.value, reason=reason)
            else:
                log.emit("probe.passing", probe=probe.value)

    def _see_master(self, stalled: float) -> None:
        if not stalled:
            if self._stall_logged:
                log.emit("master.resumed")
            self._stalled_since, self._stall_logged = None, False
            return
        # When the whole host was paused, this process may look before the master had a chance to run.
        self._stalled_since = self._stalled_since or time.monotonic()
        if not self._stall_logged and time.monotonic() - self._stalled_since >= CONFIRM:
            self._stall_logged = True
            log.emit("master.stalled", logging.WARNING, seconds=stalled)
