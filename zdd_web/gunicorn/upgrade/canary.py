"""`upgrade --canary`: a new generation that serves with a few workers while it is watched, and then with all.

How many stands in the inheritance, since workers are forked before the two masters speak. The predecessor sends `grow`
when the watch is passed, and keeps all of its own workers until all of the new ones serve. Where no predecessor is left
to send it, the new generation is the service and grows at once.

gunicorn's `num_workers` stays the full number, which SIGTTIN and SIGTTOU change; `wanted` is what is to run just now.
"""

from __future__ import annotations

from typing import Any, Protocol

from zdd_web import log
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade


class Watching(Protocol):
    """The predecessor, as far as a canary needs it; see `PredecessorLink`."""

    may_grow: bool

    @property
    def is_active(self) -> bool:
        """Whether it has handed the service over."""

    @property
    def alone(self) -> bool:
        """Whether it has ended before it could."""


def workers_of(share: str, full: int) -> int:
    """Return how many of `full` workers a canary has; `share` is a number or a percentage, "" for all.

    A percentage is rounded up.

    >>> workers_of("25%", 4), workers_of("25%", 5), workers_of("9", 4), workers_of("", 4)
    (1, 2, 4, 4)
    """
    if not share:
        return full
    few = -(-full * int(share[:-1]) // 100) if share.endswith("%") else int(share)
    return min(full, max(1, few))


def why_to_grow(link: Watching | None) -> str:
    """Return why a canary is to start the rest of its workers, "" while it is not to.

    >>> why_to_grow(None)
    'no predecessor is left'
    """
    if link is None or link.alone:
        return "no predecessor is left"
    if link.may_grow:
        return "the watch is passed"
    return "it is active" if link.is_active else ""


class Canary:
    """How many workers of this generation are to run."""

    def __init__(self, server: ArbiterFacade, share: str) -> None:
        """`share` as for `workers_of()`."""
        self._server = server
        few = workers_of(share, server.num_workers)
        #: With how many workers it begins; 0 for all of them.
        self.size = few if few < server.num_workers else 0
        self._is_on = bool(self.size)

    @property
    def at_gate(self) -> int:
        """How many workers must be ready before this generation may serve."""
        full = self._server.num_workers
        return min(self.size, full) if self.size else full

    @property
    def wanted(self) -> int:
        """How many workers there are to be just now."""
        return self.at_gate if self._is_on else self._server.num_workers

    @property
    def described(self) -> dict[str, Any]:
        """What a log line says of it; empty for a generation that begins with all workers."""
        return {"canary": f"{self.size} of {self._server.num_workers}"} if self._is_on else {}

    def follow(self, link: Watching | None) -> None:
        """Grow when that is due; the tick's call. `link` is the predecessor, None when there is none."""
        reason = why_to_grow(link) if self._is_on else ""
        if reason:
            self._is_on = False
            log.emit("upgrade.grows", workers=self._server.num_workers, canary=self.size, reason=reason)
