"""The requests of one worker, counted on its slot: in hand, answered, answered with an error, late.

The threads of a worker count together, and take no lock for it: it would be taken twice for each request. CPython,
since 3.10, switches threads where a function is called or begins and where code jumps back, and nowhere else. Between
reading a count and writing it to the slot there is none of these, as tests/pure/test_process.py shows. An interpreter
without the GIL runs each hook under a lock.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zdd_web import checks, log, waitgroup
from zdd_web.board import Header, Slot
from zdd_web.gunicorn.workers.late_arrivals import LateCounter
from zdd_web.health import table
from zdd_web.lifecycle import STOPPING
from zdd_web.process import Process
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Response

    #: gunicorn's `pre_request` and `post_request`.
    Started = Callable[[object, Any], None]
    Finished = Callable[[object, Any, object, Response | None], None]


class RequestCounter:
    """Counts on a slot.

    A worker that has answered `limit` requests asks its master to replace it. `is_on_new_connection(request)` tells
    whether a request that came after the begin of a stop is on a connection that did so too.
    """

    def __init__(
        self, process: Process, limit: int, trusted: Sequence[str], is_on_new_connection: Callable[[Any], bool]
    ) -> None:
        assert process.slot is not None
        self._process, self._slot, self._limit = process, process.slot, limit
        self._is_on_new_connection = is_on_new_connection
        self._words = process.board.header.words
        self._late = LateCounter(self._slot, process.settings.drain_delay, trusted)
        #: Of what is rare.
        self._lock = threading.Lock()
        #: Closures, since they run on every request.
        self.started, self.finished, self.stop = self._counting()
        if not has_gil():
            counts = threading.Lock()
            self.started, self.finished = _under(counts, self.started), _under(counts, self.finished)

    def _counting(self) -> tuple[Started, Finished, Callable[[], None]]:
        words, limit = self._words, self._limit
        in_hand_at, answered_at = self._slot.base + Slot.in_flight.index, self._slot.base + Slot.requests.index
        phase, stopping, set_request = Header.phase.index, STOPPING, waitgroup.current_request.set
        # Kept here too, as this process is the only writer: a shared word costs as much to read as to write.
        in_hand = answered = 0
        one = 1

        def started(worker: object, request: Any) -> None:
            """Count a request in."""
            nonlocal in_hand
            in_hand += 1
            words[in_hand_at] = in_hand
            set_request(request)
            if words[phase] in stopping:
                self._started_late(request)

        def finished(worker: object, request: Any, environ: object, response: Response | None) -> None:
            """Count a request out, and ask to be replaced at `max_requests`."""
            nonlocal in_hand, answered
            in_hand -= one
            words[in_hand_at] = in_hand
            answered += one
            words[answered_at] = answered
            if answered >= limit:
                self._reached_limit()
            if response is not None:
                # Where the app has raised before it had a status there is none, or no such attribute, and gunicorn
                # answers 500.
                try:
                    status = response.status_code
                except AttributeError:
                    status = None
                if status is None or status >= 500:
                    self.failed(request)

        def stop() -> None:
            """Leave what is in hand in the count: it is cut off, and not finished."""
            nonlocal one
            one = 0

        return started, finished, stop

    def _started_late(self, request: Any) -> None:
        # Probes are sent to the end, by those that act on them.
        if not self._is_probe(request):
            by = clock.now_ns() - self._process.board.header.stop_since
            self._late.count(request, by, is_new=self._is_on_new_connection(request))

    def _reached_limit(self) -> None:
        if not self._slot.recycle_requested:
            self._slot.recycle_requested = 1
            log.emit("worker.recycled", pid=os.getpid(), requests=self._slot.requests)

    def failed(self, request: Any) -> None:
        """Count a reply with a status of 500 or more; that of a probe is its proper answer."""
        if not self._is_probe(request):
            with self._lock:
                self._slot.server_errors += 1

    def _is_probe(self, request: Any) -> bool:
        # At the end: an app may be mounted somewhere.
        path: str = request.path
        return path.endswith(tuple(table(self._process.settings, checks.kinds())))


def has_gil() -> bool:
    """Tell whether one thread at a time runs Python code."""
    is_enabled: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    return is_enabled()


def _under(lock: threading.Lock, hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def locked(*arguments: object) -> None:
        with lock:
            hook(*arguments)

    return locked
