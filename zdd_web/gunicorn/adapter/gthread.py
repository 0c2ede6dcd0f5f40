"""gunicorn.workers.gthread: how it closes connections."""

from __future__ import annotations

import selectors
import threading
from typing import TYPE_CHECKING, Any

from gunicorn import util
from gunicorn.workers import gthread

from zdd_web import clock
from zdd_web.gunicorn.adapter.closing import ClosingConnections

if TYPE_CHECKING:
    from zdd_web.process import Process

_util: Any = util
_Connection: Any = gthread.TConn


def adapt(worker: Any, process: Process) -> None:
    """Change what a gthread worker does with its connections; leaves other workers as they are."""
    if isinstance(worker, gthread.ThreadWorker):
        close_beside_the_loop(worker, process)


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
