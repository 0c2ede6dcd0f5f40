"""gunicorn.workers.gthread: its kept connections, as they are closed, handed over and received. 24 and later."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gunicorn import http
from gunicorn.workers import gthread

from zdd_web.gunicorn.adapter.gthread import forget, is_one, silent_at_most
from zdd_web.gunicorn.adapter.kept_interface import Keeper, can_travel
from zdd_web.gunicorn.adapter.patches import replace, write
from zdd_web.system.connection_passing import Handed, waiting_bytes

if TYPE_CHECKING:
    import socket

    from zdd_web.gunicorn.adapter.protocols import GthreadConnection, GthreadWorker, Method


R = TypeVar("R")

_TConn: Method = gthread.TConn

#: How often a busy loop looks at what changes seldom, seconds.
LOOKS_EVERY = 0.01


def store_for(worker: object, kept: Keeper) -> GthreadConnections | None:
    """Return the store of a gthread worker; None for other workers, and before 24."""
    if not is_one(worker) or not hasattr(worker, "keepalived_conns"):
        return None
    return GthreadConnections(worker, kept)


class GthreadConnections:
    """See `ConnectionStore` (workers/kept_connections.py)."""

    def __init__(self, worker: GthreadWorker, kept: Keeper) -> None:
        self._worker, self._kept = worker, kept
        #: A PROXY line is read before the first request alone.
        self.can_travel = can_travel(worker.cfg, after_proxy=True)
        self._http2 = 0
        run, wait = worker.run, worker.wait_for_and_dispatch_events
        is_parent_alive = worker.is_parent_alive

        def run_and_watch() -> None:
            kept.turn()
            run()

        def wait_a_turn(timeout: float) -> None:
            if kept.limits_wait:
                pause = kept.pause()
                timeout = timeout if pause is None else min(timeout, pause)
            wait(timeout)

        replace(worker, "run", run_and_watch)
        replace(worker, "wait_for_and_dispatch_events", wait_a_turn)
        # It would break the loop off (test_gthread_ends_when_its_master_is_gone), while connections are handed over or
        # are to be taken back too. The kernel sends SIGTERM, and the worker ends its loop itself.
        replace(
            worker,
            "is_parent_alive",
            lambda: os.getppid() == worker.ppid or kept.limits_wait or kept.hands_over() or is_parent_alive(),
        )
        replace(worker, "murder_keepalived", self._closing_one_by_one())
        if hasattr(worker, "handle_http2"):
            replace(worker, "handle_http2", self._counting_http2(worker.handle_http2))

    def _counting_http2(self, handle: Callable[[GthreadConnection], object]) -> Callable[[GthreadConnection], object]:
        def handle_and_count(conn: GthreadConnection) -> object:
            # In a thread of the pool; it is read as "any".
            self._http2 += 1
            try:
                return handle(conn)
            finally:
                self._http2 -= 1

        return handle_and_count

    def _closing_one_by_one(self) -> Callable[..., None]:
        """Return what closes connections that have been idle for too long, with a last look at each.

        gunicorn looks once for all of them (test_gthread_closes_idle_connections_each_turn), and then starts requests
        and closes others, for milliseconds. A request that arrives in between is reset unread, and no client may repeat
        a POST.

        A closure: it is called once a turn in every release, whatever has woken the loop, thousands of times a second.
        What it has to do beside that is done seldom.
        """
        connections, monotonic, due = self._worker.keepalived_conns, time.monotonic, 0.0
        murder_keepalived = self._worker.murder_keepalived

        def close_one_by_one(force: bool = False) -> None:
            nonlocal due
            now = monotonic()
            if now >= due or force:
                due = now + LOOKS_EVERY
                self._kept.turn()
                self._close_expired(now, force=force)
                # Nothing is left for gunicorn's own; what it was replaced by before has its turn (gthread.py).
                murder_keepalived(force=True) if force else murder_keepalived()
            elif connections and connections[0].timeout <= now:
                self._close_expired(now, force=False)

        return close_one_by_one

    def _close_expired(self, now: float, *, force: bool) -> None:
        kept = self._worker.keepalived_conns
        while kept and (force or kept[0].timeout <= now):
            self._close(kept[0], look=not force)

    def _close(self, conn: GthreadConnection, *, look: bool) -> bool:
        worker = self._worker
        if look and waiting_bytes(conn.sock):
            # As its loop would do in its next turn.
            worker.on_client_socket_readable(conn, conn.sock)
            return False
        forget(self._worker, conn, worker.keepalived_conns)
        self._kept.count_closed()
        conn.close()
        return True

    # -- ConnectionStore

    def in_loop(self, function: Callable[[], R]) -> R:
        """See `ConnectionStore`: all of this is called between two turns of the loop."""
        return function()

    def idle(self) -> list[GthreadConnection]:
        """See `ConnectionStore`."""
        return [*self.closable(), *getattr(self._worker, "pending_conns", ())]

    def closable(self) -> list[GthreadConnection]:
        """See `ConnectionStore`: not those that have sent nothing, which were opened as others were closed."""
        parsers = [(conn, conn.parser) for conn in self._worker.keepalived_conns]
        return [conn for conn, parser in parsers if parser is not None and not parser.unreader.buf.getvalue()]

    def describe(self, conn: GthreadConnection) -> tuple[int, Handed]:
        """See `ConnectionStore`."""
        requests = conn.parser.req_count if conn.parser is not None else 0
        left = max(0.0, conn.timeout - time.monotonic())
        return conn.sock.fileno(), Handed(left, requests, conn.server)

    def forget(self, conn: GthreadConnection) -> None:
        """See `ConnectionStore`."""
        worker = self._worker
        forget(self._worker, conn, worker.keepalived_conns if conn in worker.keepalived_conns else worker.pending_conns)
        conn.sock.close()

    def close_idle(self, conn: GthreadConnection) -> bool:
        """See `ConnectionStore`."""
        return conn in self._worker.keepalived_conns and self._close(conn, look=True)

    def keep(self, connection: socket.socket, handed: Handed) -> None:
        """See `ConnectionStore`: it goes to the poller, and not to a thread, which would wait for its request."""
        worker = self._worker
        try:
            client = connection.getpeername()
        except OSError:
            # It was reset on its way.
            connection.close()
            return
        conn: GthreadConnection = _TConn(worker.cfg, connection, client, handed.server)
        # Its request is here when the loop sees it: no thread is to wait for it once more.
        conn.data_ready = True
        among, on_readable = worker.keepalived_conns, worker.on_client_socket_readable
        at_most = float(worker.cfg.keepalive)
        if handed.requests or not hasattr(worker, "pending_conns"):
            # What the first request alone may bring, such as a PROXY line, is over.
            conn.parser = parser = http.get_parser(worker.cfg, connection, client)
            parser.req_count = handed.requests
            conn.initialized = True
        else:
            among, on_readable = worker.pending_conns, worker.on_pending_socket_readable
            at_most = silent_at_most(worker)
        # No longer than one of this worker's own, which are appended: where the first one lasts longer than others,
        # none of them is closed. The predecessor may have had a longer `keepalive`, or a class without such a limit.
        conn.timeout = time.monotonic() + min(handed.left, at_most)
        write(worker, "nr_conns", worker.nr_conns + 1)
        # The one that ends first stands first: no other is looked at.
        among.insert(bisect_right(among, conn.timeout, key=lambda each: each.timeout), conn)
        worker.poller.register(connection, selectors.EVENT_READ, partial(on_readable, conn))

    def room(self) -> int:
        """See `ConnectionStore`: with as many gunicorn accepts no more, or closes after each reply."""
        worker = self._worker
        kept = worker.max_keepalived - len(worker.keepalived_conns)
        return int(min(worker.worker_connections - worker.nr_conns, kept))

    def in_hand(self) -> int:
        """See `ConnectionStore`."""
        return int(self._worker.nr_conns)

    def must_end(self) -> bool:
        """See `ConnectionStore`: HTTP/2 says GOAWAY when the loop is to end."""
        return self._http2 > 0

    def watch(self, *, is_on: bool) -> None:
        """See `ConnectionStore`."""
        if is_on:
            self._worker.poller.register(self._kept.take_fd, selectors.EVENT_READ, lambda _: self._kept.take_some())
        else:
            with contextlib.suppress(KeyError, ValueError):
                self._worker.poller.unregister(self._kept.take_fd)
