"""gunicorn.workers.gthread: how it closes connections, and how long it waits for those that send nothing."""

from __future__ import annotations

import selectors
import threading
import time
from typing import TYPE_CHECKING, Any

from gunicorn import util
from gunicorn.workers import gthread

from zdd_web.gunicorn.adapter.closing import QUIET, ClosingConnections
from zdd_web.gunicorn.adapter.silent import await_first_byte
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.process import Process

_util: Any = util
_Connection: Any = gthread.TConn

#: The longest that a loop which is to end waits for its sockets, seconds.
TURN = 1.0


def adapt(worker: Any, process: Process) -> None:
    """Change what a gthread worker does with its connections; leaves other workers as they are."""
    if isinstance(worker, gthread.ThreadWorker):
        defer_nothing_once_closed(worker)
        close_beside_the_loop(worker, process)
        give_up_silent_connections(worker, process)


def defer_nothing_once_closed(worker: Any) -> None:
    """Have a queue that is closed take no more calls.

    Its pipe's number stays known to it (gthread.py:195), and may be another file's when it is woken once more.
    """
    queue = getattr(worker, "method_queue", None)
    if queue is None:
        return
    close = queue.close

    def close_for_good() -> None:
        queue.defer = lambda *_: None
        close()

    queue.close = close_for_good


def close_beside_the_loop(worker: Any, process: Process) -> None:
    """Have a connection whose last reply was sent closed beside the worker's loop.

    A lame duck's replies are all the last ones, and 26 and later wait in that loop for each client to close
    (gthread.py:563).
    """
    closing = ClosingConnections()
    if hasattr(util, "close_graceful"):
        _replace_graceful_close(closing)
    else:
        _close_gracefully_after_requests(closing, worker)
    run, murder_keepalived = worker.run, worker.murder_keepalived

    def murder_and_turn(**force: bool) -> None:
        # Once a turn in every release, whatever has woken the loop.
        closing.turn()
        murder_keepalived(**force)

    def run_then_finish() -> None:
        beat = worker.notify
        worker.poller.register(closing, selectors.EVENT_READ, lambda _: closing.turn())
        run()
        closing.finish(beat, lambda: clock.remaining(process.deadline_ns))

    worker.murder_keepalived, worker.run = murder_and_turn, run_then_finish


def _replace_graceful_close(closing: ClosingConnections) -> None:
    def close(conn: Any, graceful: bool = False) -> None:
        if graceful:
            closing.add(conn.sock)
        else:
            util.close(conn.sock)

    # Not only close_graceful(): close() makes the socket blocking first, which fails for one that handle_request() has
    # closed (gthread.py:797), and the connection is then counted out twice (gthread.py:565).
    _Connection.close = close
    _util.close_graceful = lambda sock, *_, **__: closing.add(sock)


def _close_gracefully_after_requests(closing: ClosingConnections, worker: Any) -> None:
    # 25 and earlier close these as they close connections that have been idle for too long: at once.
    finishing = threading.local()
    finish_request = worker.finish_request

    def finish(*arguments: Any) -> None:
        # In 23 in a thread of the pool.
        finishing.now = True
        try:
            finish_request(*arguments)
        finally:
            finishing.now = False

    def close(conn: Any) -> None:
        if getattr(finishing, "now", False):
            closing.add(conn.sock)
        else:
            util.close(conn.sock)

    worker.finish_request, _Connection.close = finish, close


def give_up_silent_connections(worker: Any, process: Process) -> None:
    """Have a leaving worker not wait for connections that have sent nothing, neither in a thread nor in its loop.

    From 25 on a new connection holds a thread for five seconds (gthread.py:584), and is then kept for as long as
    `keepalive`; only those that have had a request are cut short when the worker is to end (gthread.py:467). 23 gives
    them no thread, and up to its end no limit.
    """
    if not hasattr(worker, "murder_pending"):
        return
    wait_for_data, murder_pending = _Connection.wait_for_data, worker.murder_pending
    wait_and_dispatch = worker.wait_for_and_dispatch_events
    ends_at: float | None = None

    def wait_for_data_unless_leaving(conn: Any, timeout: float) -> bool:
        if conn.data_ready or conn.sock.fileno() < 0:
            return bool(wait_for_data(conn, timeout))
        conn.data_ready = await_first_byte(conn.sock, process.is_leaving, timeout=timeout)
        return bool(conn.data_ready)

    def murder_pending_of_a_leaving_worker() -> None:
        nonlocal ends_at
        if process.going and worker.pending_conns:
            now = time.monotonic()
            ends_at = ends_at or now + QUIET
            for conn in worker.pending_conns:
                conn.timeout = min(conn.timeout, ends_at)
            if ends_at <= now:
                # What has arrived is read before its connection is closed.
                wait_and_dispatch(0)
        murder_pending()

    def wait_a_turn(timeout: float) -> None:
        # Up to 26 a loop that is to end sleeps until its time is over or something arrives, without a heartbeat.
        if timeout > TURN:
            worker.notify()
        wait_and_dispatch(min(timeout, TURN))

    _Connection.wait_for_data = wait_for_data_unless_leaving
    worker.murder_pending, worker.wait_for_and_dispatch_events = murder_pending_of_a_leaving_worker, wait_a_turn
