"""gunicorn.workers.gthread: how it closes connections, and how long it waits for those that send nothing."""

from __future__ import annotations

import collections
import contextlib
import selectors
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

from gunicorn import util
from gunicorn.workers import gthread

from zdd_web.gunicorn.adapter.closing_connections import QUIET, ClosingConnections
from zdd_web.gunicorn.adapter.patches import replace, write
from zdd_web.gunicorn.adapter.silent_connections import PATIENCE, await_first_byte
from zdd_web.system import clock
from zdd_web.system.connection_passing import waiting_bytes

if TYPE_CHECKING:
    from collections import deque
    from concurrent.futures import Future

    from zdd_web.gunicorn.adapter.protocols import CallQueue, GthreadConnection, GthreadWorker, Worker
    from zdd_web.process import Process

_Connection: type[Any] = gthread.TConn

#: The longest that a loop which is to end waits for its sockets, seconds.
TURN = 1.0

#: For how long a thread waits for a connection's first byte, seconds: longer than the gap between a handshake and a
#: request that is sent right after it.
FIRST_BYTE_WITHIN = 0.001

#: How many calls of its threads a loop runs before it is woken once more.
CALLS_AT_ONCE = 50


def is_one(worker: object) -> TypeGuard[GthreadWorker]:
    """Tell whether a worker is of this class, or of one made from it."""
    return isinstance(worker, gthread.ThreadWorker)


def adapt(worker: object, process: Process, hands_over: Callable[[], bool]) -> None:
    """Change what a gthread worker does with its connections; leaves other workers as they are.

    `hands_over()` tells whether connections go on in another worker, and do not end with this one.
    """
    if is_one(worker):
        end_by_signal_alone(worker)
        wake_once(worker)
        close_beside_the_loop(worker, process)
        give_up_silent_connections(worker, process, hands_over)


def wake_once(worker: object) -> None:
    """Have a worker's loop woken once for all calls that its threads leave to it until it turns; never once closed.

    gunicorn writes to a pipe for each (test_queue_of_calls_writes_for_each_call). Under load that is three writes of
    four too many, and nearly a hundredth of a trivial view's CPU time: a third of what this package costs it.

    The pipe's number stays known to a queue that is closed (test_queue_of_calls_keeps_the_numbers_of_its_pipe), and may
    be another file's when it is woken once more.
    """
    queue: CallQueue | None = getattr(worker, "method_queue", None)
    if queue is None:
        return
    close, wake = queue.close, queue.defer
    calls: deque[tuple[Callable[..., object], tuple[object, ...]]] = collections.deque()
    is_woken = False

    def defer(callback: Callable[..., object], *args: object) -> None:
        # A signal handler may come in between, and does the same: at worst the loop is woken twice.
        nonlocal is_woken
        calls.append((callback, args))
        # Now and then in any case: an app may raise an error in a thread of its own, between these two lines too.
        if not is_woken or len(calls) % CALLS_AT_ONCE == 0:
            is_woken = True
            wake(run_calls)

    def run_calls() -> None:
        nonlocal is_woken
        try:
            # Not until none is left: the loop's sockets are to have their turn.
            for _ in range(CALLS_AT_ONCE):
                if not calls:
                    break
                callback, args = calls.popleft()
                callback(*args)
        finally:
            # Before the look: a call that comes after it wakes the loop again.
            is_woken = False
            if calls:
                is_woken = True
                wake(run_calls)

    def close_for_good() -> None:
        replace(queue, "defer", lambda *_: None)
        close()

    replace(queue, "defer", defer)
    replace(queue, "close", close_for_good)


def close_beside_the_loop(worker: GthreadWorker, process: Process) -> None:
    """Have a connection whose last reply was sent closed beside the worker's loop.

    A lame duck's replies are all the last ones, and 26 and later wait in that loop for each client to close
    (test_gthread_counts_a_connection_out_before_it_closes_it).
    """
    closing = ClosingConnections()
    if hasattr(util, "close_graceful"):
        _replace_graceful_close(closing)
    else:
        _close_gracefully_after_requests(closing, worker)
    run, murder_keepalived = worker.run, worker.murder_keepalived

    def murder_and_turn(**force: bool) -> None:
        # Once a turn in 23; kept_gthread.py calls it less often.
        closing.turn()
        murder_keepalived(**force)

    def run_then_finish() -> None:
        beat = worker.notify
        worker.poller.register(closing, selectors.EVENT_READ, lambda _: closing.turn())
        run()
        closing.finish(beat, lambda: clock.remaining(process.deadline_ns))

    replace(worker, "murder_keepalived", murder_and_turn)
    replace(worker, "run", run_then_finish)


def _replace_graceful_close(closing: ClosingConnections) -> None:
    def close(conn: GthreadConnection, graceful: bool = False) -> None:
        if graceful:
            closing.add(conn.sock)
        else:
            util.close(conn.sock)

    # Not only close_graceful(): close() makes the socket blocking first, which fails for one that handle_request() has
    # closed (test_gthread_closes_a_connection_whose_reply_has_failed_in_its_thread), and the connection is then counted
    # out twice (test_gthread_counts_a_connection_out_before_it_closes_it).
    replace(_Connection, "close", close)
    replace(util, "close_graceful", lambda sock, *_, **__: closing.add(sock))


def _close_gracefully_after_requests(closing: ClosingConnections, worker: GthreadWorker) -> None:
    # 25 and earlier close these as they close connections that have been idle for too long: at once.
    finishing = threading.local()
    finish_request = worker.finish_request

    def finish(*arguments: object) -> None:
        # In 23 in a thread of the pool.
        finishing.now = True
        try:
            finish_request(*arguments)
        finally:
            finishing.now = False

    def close(conn: GthreadConnection) -> None:
        if getattr(finishing, "now", False):
            closing.add(conn.sock)
        else:
            util.close(conn.sock)

    replace(worker, "finish_request", finish)
    replace(_Connection, "close", close)


def give_up_silent_connections(worker: GthreadWorker, process: Process, hands_over: Callable[[], bool]) -> None:
    """Have connections that have sent nothing yet wait in a worker's loop, and not for long once the worker leaves.

    From 25 on each holds a thread for five seconds (test_gthread_defers_a_silent_connection_after_a_while), and is then
    kept for as long as `keepalive`; only those that have had a request are cut short when the worker is to end
    (test_gthread_caps_only_kept_connections_when_it_ends). 23 gives them no thread, and up to its end no limit.

    Clients that keep a pool of connections open the next at once when one is closed, and ask later. When a lame duck
    closes hundreds, or a generation that hands none over, they would hold all threads of the worker that they come to.
    """
    if not hasattr(worker, "murder_pending"):
        return
    wait_for_data, murder_pending = _Connection.wait_for_data, worker.murder_pending
    wait_and_dispatch, is_leaving = worker.wait_for_and_dispatch_events, process.is_leaving
    finish_request = worker.finish_request
    ends_at: float | None = None

    def wait_for_data_unless_leaving(conn: GthreadConnection, timeout: float) -> bool:
        if conn.data_ready or conn.sock.fileno() < 0:
            return bool(wait_for_data(conn, timeout))
        # A worker that leaves cuts short all that wait in its loop, young or old.
        within = timeout if process.going else FIRST_BYTE_WITHIN
        write(conn, "data_ready", await_first_byte(conn.sock, is_leaving, timeout=within, patience=patience))
        return bool(conn.data_ready)

    def patience() -> float:
        return PATIENCE if process.going else 0.0

    def murder_pending_of_a_leaving_worker() -> None:
        nonlocal ends_at
        if not worker.pending_conns:
            return
        # A connection that is handed over keeps its time.
        if process.going and not hands_over():
            now = time.monotonic()
            ends_at = ends_at or now + QUIET
            for conn in worker.pending_conns:
                write(conn, "timeout", min(conn.timeout, ends_at))
        _close_silent(worker)
        murder_pending()

    def finish_or_defer(conn: GthreadConnection, done: Future[object]) -> None:
        if conn.initialized or done.cancelled() or done.exception() or done.result() is not gthread._DEFER:
            finish_request(conn, done)
            return
        # As a worker ends, gunicorn would drop it: test_gthread_drops_what_is_deferred_as_it_ends.
        write(conn, "timeout", time.monotonic() + (silent_at_most(worker) if worker.alive else QUIET))
        try:
            conn.sock.setblocking(False)
            on_readable = partial(worker.on_pending_socket_readable, conn)
            worker.poller.register(conn.sock, selectors.EVENT_READ, on_readable)
        except Exception:
            # As gunicorn does: an error with one connection must not end the loop.
            write(worker, "nr_conns", worker.nr_conns - 1)
            conn.close()
            return
        worker.pending_conns.append(conn)

    replace(_Connection, "wait_for_data", wait_for_data_unless_leaving)
    replace(worker, "murder_pending", murder_pending_of_a_leaving_worker)
    replace(worker, "finish_request", finish_or_defer)
    if WindDown.needed_by(worker):

        def wait_a_turn(timeout: float) -> None:
            # A loop that is to end sleeps until its time is over or something arrives, without a heartbeat.
            if timeout > TURN:
                worker.notify()
            wait_and_dispatch(min(timeout, TURN))

        replace(worker, "wait_for_and_dispatch_events", wait_a_turn)


def silent_at_most(worker: GthreadWorker) -> float:
    """Return how long a connection may send nothing at first, seconds: gunicorn's time in a thread and in the loop."""
    return float(gthread.DEFAULT_WORKER_DATA_TIMEOUT + worker.cfg.keepalive)


def _close_silent(worker: GthreadWorker) -> None:
    """Begin to serve, or close, connections whose time to send a first byte is over, with a look at each before it.

    After one look for all of them gunicorn would close hundreds, for milliseconds in which requests arrive.
    """
    now = time.monotonic()
    while worker.pending_conns and worker.pending_conns[0].timeout <= now:
        conn = worker.pending_conns[0]
        if waiting_bytes(conn.sock):
            # As its loop would do in its next turn.
            worker.on_pending_socket_readable(conn, conn.sock)
            continue
        forget(worker, conn, worker.pending_conns)
        conn.close()


def forget(worker: GthreadWorker, conn: GthreadConnection, among: deque[GthreadConnection]) -> None:
    """Take a connection out of a worker's loop and its count; its socket stays open."""
    among.remove(conn)
    with contextlib.suppress(OSError, KeyError, ValueError):
        # By hand: a connection that is handed over lives on elsewhere, and epoll would go on reporting it.
        worker.poller.unregister(conn.sock)
    write(worker, "nr_conns", worker.nr_conns - 1)


class WindDown:
    """How a gthread worker before 27.0.1 stops without dropping connections; asked once a turn of its loop.

    Those close what they hold the moment they are told to stop: kept connections whose next request is on its way,
    up to 23 even accepted ones that were not read yet. So the worker is not told at first: it stops accepting, its
    replies close their connections, and only when none is left, or those that are left have been idle for as long as
    27.0.1 lingers, the loop is ended.
    """

    LINGER = 2.0

    def __init__(self, worker: GthreadWorker) -> None:
        self._worker = worker
        self._since: float | None = None

    @classmethod
    def needed_by(cls, worker: object) -> TypeGuard[GthreadWorker]:
        """Tell whether a worker keeps connections and does not linger by itself."""
        return is_one(worker) and not hasattr(gthread, "STOP_KEEPALIVE_LINGER")

    def over(self) -> bool:
        """Stop accepting at the first call; tell whether the loop may be ended."""
        if self._since is None:
            self._since = time.monotonic()
            stop_accepting(self._worker)
        return self._worker.nr_conns == 0 or time.monotonic() - self._since >= self.LINGER


def stop_accepting(worker: Worker) -> None:
    """Have a gthread worker accept nothing more, although its loop goes on."""
    if hasattr(worker, "set_accept_enabled"):
        worker.set_accept_enabled(False)
        # The loop would enable it again at its next turn: test_gthread_enables_accepting_each_turn.
        replace(worker, "set_accept_enabled", lambda enabled: None)
        return
    for listener in worker.sockets:
        worker.poller.unregister(listener)


def end_by_signal_alone(worker: object) -> None:
    """Keep a gthread worker before 27.0.1 from breaking its loop off when its master is gone.

    It would drop what it holds: test_gthread_ends_when_its_master_is_gone. The kernel sends it SIGTERM then, and it
    winds down.
    """
    if WindDown.needed_by(worker):
        replace(worker, "is_parent_alive", lambda: True)


def tell_when_not_accepting(worker: Worker, tell: Callable[[], None]) -> bool:
    """Have `tell()` called when a gthread worker that was told to stop accepts no more.

    See tests/contract: test_gthread_stops_accepting_after_its_loop.

    False for a worker that has no such moment. Its loop may still be about to accept what it was woken for before.
    """
    if not hasattr(worker, "set_accept_enabled"):
        return False
    set_accept_enabled: Callable[[bool], None] = worker.set_accept_enabled

    def then_tell(enabled: bool) -> None:
        set_accept_enabled(enabled)
        if not enabled and not worker.alive:
            tell()

    replace(worker, "set_accept_enabled", then_tell)
    return True
