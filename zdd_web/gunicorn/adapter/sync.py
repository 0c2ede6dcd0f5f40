"""gunicorn.workers.sync: how it closes connections, and how long it waits for those that send nothing."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeGuard

from gunicorn import util
from gunicorn.workers.sync import SyncWorker

from zdd_web.gunicorn.adapter.closing_connections import ClosingConnections
from zdd_web.gunicorn.adapter.patches import replace, write
from zdd_web.gunicorn.adapter.silent_connections import await_first_byte
from zdd_web.system import clock

if TYPE_CHECKING:
    import socket

    from zdd_web.gunicorn.adapter.protocols import Method, SocketName
    from zdd_web.gunicorn.adapter.protocols import SyncWorker as RawWorker
    from zdd_web.process import Process


def is_one(worker: object) -> TypeGuard[RawWorker]:
    """Tell whether a worker is of this class, or of one made from it."""
    return isinstance(worker, SyncWorker)


def adapt(worker: object, process: Process) -> None:
    """Change what a sync worker does with its connections; leaves other workers as they are."""
    if is_one(worker):
        close_beside_requests(worker, process)
        give_up_silent_connections(worker, process)


class _AmongListeners(ClosingConnections):
    """What a sync worker waits for together with its listeners."""

    def accept(self) -> NoReturn:
        """Find nothing: with several listeners gunicorn accepts from each one that is readable.

        See tests/contract: test_sync_accepts_from_each_readable_listener.
        """
        raise BlockingIOError(errno.EAGAIN, "not a listener")


def close_beside_requests(worker: RawWorker, process: Process) -> None:
    """Have the worker go on with the next request while a client has not closed its connection yet.

    26 and later wait for that, up to two seconds after each reply (test_sync_closes_gracefully_from_26_on), at all
    times; earlier ones close at once, at all times.
    """
    if not hasattr(util, "close_graceful"):
        return
    closing = _AmongListeners()
    run, wait = worker.run, worker.wait

    def close(connection: socket.socket, *_: object, **__: object) -> None:
        # A worker under load does not come to wait().
        closing.turn()
        closing.add(connection)

    def wait_and_turn(timeout: float) -> object:
        until = closing.next_timeout()
        ready = wait(timeout if until is None else min(timeout, until))
        closing.turn()
        return ready

    def run_then_finish() -> None:
        beat = worker.notify
        worker.wait_fds.append(closing)
        run()
        closing.finish(beat, lambda: clock.remaining(process.deadline_ns))

    replace(util, "close_graceful", close)
    replace(worker, "wait", wait_and_turn)
    replace(worker, "run", run_then_finish)


def give_up_silent_connections(worker: RawWorker, process: Process) -> None:
    """Have a leaving worker not sit in recv() for a connection that has sent nothing.

    It cannot be interrupted there: after a signal's handler Python goes on with the call (PEP 475).
    """
    handle = worker.handle
    # Not ours, which may end the loop of a worker that empties its queue.
    notify: Method = SyncWorker.notify
    beat = functools.partial(notify, worker)

    def waits() -> None:
        # On the board alone: gunicorn's `timeout` ends a worker that waits for a silent client, as ever. An upgrade
        # must not wait for that before it believes that this worker lives.
        if process.slot is not None:
            process.slot.beat_at = clock.now_ns()

    def handle_if_not_silent(listener: object, client: socket.socket, address: SocketName) -> None:
        if await_first_byte(client, process.is_leaving, beat, waits=waits):
            handle(listener, client, address)
        else:
            worker.log.debug("Closing a connection that has sent nothing.")
            util.close(client)

    replace(worker, "handle", handle_if_not_silent)


def beat_often(worker: object, interval: float, connected: Callable[[bool], None]) -> None:
    """Have a sync worker that waits send a heartbeat each `interval` seconds, as workers of all other classes do.

    Its own interval is half of `timeout` (test_sync_waits_for_half_of_the_timeout). It sends none while it has a
    connection in hand, also while it waits for the client's request: `connected()` is called when that begins and ends.
    """
    if not is_one(worker):
        return
    # With `timeout = 0` it is half a second.
    write(worker, "timeout", min(worker.timeout, interval))
    handle = worker.handle

    def handle_connected(listener: object, client: socket.socket, address: SocketName) -> None:
        connected(True)
        try:
            handle(listener, client, address)
        finally:
            connected(False)

    replace(worker, "handle", handle_connected)


def accept_nothing(worker: object) -> None:
    """Have a sync worker that was interrupted in a request find no connection on listeners that are closed meanwhile.

    With several of them it asks the next one before it looks whether its loop is to end:
    test_sync_accepts_from_each_readable_listener.
    """

    def nothing(listener: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "closed")

    replace(worker, "accept", nothing)
