"""Answers to scrapes of `/metrics`: each is kept for a moment, since to make one takes longer than ten probes."""

from __future__ import annotations

import contextlib
import time

from zdd_web.metrics import Collector, exposition

#: For how long an answer is given again, seconds. Nothing scrapes as often.
KEEP = 1.0
#: Formats for which an answer is kept; a client that asks for any other meanwhile gets the plain one.
FORMATS = 4
#: Characters of an Accept header; Prometheus' own has 300.
ACCEPT_CHARACTERS = 1024

PLAIN = ""


def load_library() -> None:
    """Import what makes an answer, if it is installed: the first scrape would hold up every probe meanwhile."""
    with contextlib.suppress(ImportError):
        import prometheus_client.exposition  # noqa: F401


class Scrapes:
    """The metrics, as they were at most a second ago."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._kept: dict[tuple[str, bool], tuple[str, bytes]] = {}
        self._made_at = -KEEP

    def get(self, accept: str, *, details: bool) -> tuple[str, bytes]:
        """Return content type and body. Raises ImportError without `prometheus_client`."""
        now = time.monotonic()
        if now - self._made_at >= KEEP:
            self._kept.clear()
            self._made_at = now
        if len(accept) > ACCEPT_CHARACTERS:
            accept = PLAIN
        if (accept, details) not in self._kept and len(self._kept) >= FORMATS:
            accept = PLAIN
        kept = self._kept.get((accept, details))
        if kept is None:
            kept = self._kept[accept, details] = exposition(self._collector, accept, details=details)
        return kept
