"""Which path is which probe, and what each phase answers to it.

Liveness stays 200 through a drain: a probe that failed there would have Kubernetes kill what is still finishing its
work. Readiness is 503 from the moment a stop begins, while everything is still accepted.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings


class Probe(enum.Enum):
    """What a probe asks."""

    LIVENESS = "liveness"
    READINESS = "readiness"


@dataclass(frozen=True)
class Reply:
    """An answer that an adaptor translates for its framework; `body` is empty for HEAD."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def status_line(self) -> str:
        """The status as WSGI wants it."""
        return f"{self.status} {self.reason}"


#: A balancer that asks again after this many seconds finds another pod, or this one restarted.
RETRY_AFTER = 5


def table(settings: Settings) -> dict[str, Probe]:
    """Map each path that is a probe, with and without a slash at its end, to what it asks.

    >>> table(Settings())["/healthz/"].value
    'readiness'
    """
    paths = {
        settings.liveness_path: Probe.LIVENESS,
        settings.readiness_path: Probe.READINESS,
        settings.health_path: Probe.READINESS,
    }
    return paths | {f"{path}/": probe for path, probe in paths.items()}


def decide(probe: Probe, method: str, phase: Phase, successor: Phase | None = None) -> Reply:
    """Answer a probe from the phase of the generation and, while it retires, of its successor.

    >>> decide(Probe.READINESS, "GET", Phase.SERVING).status
    200
    """
    if method not in ("GET", "HEAD"):
        return _reply(405, "Method Not Allowed", "method not allowed", method, ("Allow", "GET, HEAD"))
    # A connection that a client keeps to the retiring generation still asks about the service, not about this process.
    speaking = successor if phase is Phase.RETIRING and successor is not None else phase
    if probe is Probe.LIVENESS or speaking is Phase.SERVING:
        return _reply(200, "OK", "ok", method)
    return _reply(503, "Service Unavailable", speaking.label, method, ("Retry-After", str(RETRY_AFTER)))


def _reply(status: int, reason: str, text: str, method: str, *headers: tuple[str, str]) -> Reply:
    body = f"{text}\n".encode()
    all_headers = (
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        *headers,
    )
    return Reply(status, reason, all_headers, b"" if method == "HEAD" else body)
