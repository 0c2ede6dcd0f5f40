"""The requests of one worker, counted on its slot: in hand, answered, answered with an error, late."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zdd_web import checks, log, waitgroup
from zdd_web.board import Header
from zdd_web.gunicorn.workers.late_arrivals import LateCounter
from zdd_web.health import table
from zdd_web.lifecycle import STOPPING
from zdd_web.process import Process
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Response


class RequestCounter:
    """Counts on a slot; `started()` and `finished()` are gunicorn's `pre_request` and `post_request`.

    A worker that has answered `limit` requests asks its master to replace it. `is_on_new_connection(request)` tells
    whether a request that came after the begin of a stop is on a connection that did so too.
    """

    def __init__(
        self, process: Process, limit: int, trusted: Sequence[str], is_on_new_connection: Callable[[Any], bool]
    ) -> None:
        assert process.slot is not None
        self._process, self._slot, self._limit = process, process.slot, limit
        self._is_on_new_connection = is_on_new_connection
        self._words, self._seldom_lock = process.board.header.words, threading.Lock()
        self._late = LateCounter(self._slot, process.settings.drain_delay, trusted)
        self._count_in, self._count_out = process.request_counters()

    def started(self, worker: object, request: Any) -> None:
        """Count a request in."""
        self._count_in()
        waitgroup.current_request.set(request)
        # Probes are sent to the end, by those that act on them.
        if self._words[_PHASE] in STOPPING and not self._is_probe(request):
            by = clock.now_ns() - self._process.board.header.stop_since
            self._late.count(request, by, is_new=self._is_on_new_connection(request))

    def finished(self, worker: object, request: Any, environ: object, response: Response | None) -> None:
        """Count a request out, and ask to be replaced at `max_requests`."""
        if self._count_out() >= self._limit and not self._slot.recycle_requested:
            self._slot.recycle_requested = 1
            log.emit("worker.recycled", pid=os.getpid(), requests=self._slot.requests)
        # Where the app has raised before it had a status there is none, or no such attribute, and gunicorn answers 500.
        if response is not None and (getattr(response, "status_code", None) or 500) >= 500:
            self.failed(request)

    def failed(self, request: Any) -> None:
        """Count a reply with a status of 500 or more; that of a probe is its proper answer."""
        if not self._is_probe(request):
            with self._seldom_lock:
                self._slot.server_errors += 1

    def stop(self) -> None:
        """Leave what is in hand in the count: it is cut off, and not finished."""
        self._count_out = lambda: 0

    def _is_probe(self, request: Any) -> bool:
        # At the end: an app may be mounted somewhere.
        path: str = request.path
        return path.endswith(tuple(table(self._process.settings, checks.kinds())))


_PHASE = Header.phase.index
