"""gunicorn.workers.sync: how it closes connections, and how long it waits for those that send nothing."""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING, Any

from gunicorn import util
from gunicorn.workers.sync import SyncWorker

from zdd_web.gunicorn.adapter.closing import ClosingConnections
from zdd_web.gunicorn.adapter.silent import await_first_byte
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.process import Process

_util: Any = util


def adapt(worker: Any, process: Process) -> None:
    """Change what a sync worker does with its connections; leaves other workers as they are."""
    if isinstance(worker, SyncWorker):
        close_beside_requests(worker, process)
        give_up_silent_connections(worker, process)


class _AmongListeners(ClosingConnections):
    """What a sync worker waits for together with its listeners."""

    def accept(self) -> Any:
        """With several listeners gunicorn accepts from whatever is readable (sync.py:97)."""
        raise BlockingIOError(errno.EAGAIN, "not a listener")


def close_beside_requests(worker: Any, process: Process) -> None:
    """Have the worker go on with the next request while a client has not closed its connection yet.

    26 and later wait for that, up to two seconds after each reply (sync.py:166), at all times; earlier ones close at
    once, at all times.
    """
    if not hasattr(util, "close_graceful"):
        return
    closing = _AmongListeners()
    run, wait = worker.run, worker.wait

    def close(connection: Any, *_: Any, **__: Any) -> None:
        # A worker under load does not come to wait().
        closing.turn()
        closing.add(connection)

    def wait_and_turn(timeout: float) -> Any:
        until = closing.next_timeout()
        ready = wait(timeout if until is None else min(timeout, until))
        closing.turn()
        return ready

    def run_then_finish() -> None:
        beat = worker.notify
        worker.wait_fds.append(closing)
        run()
        closing.finish(beat, lambda: clock.remaining(process.deadline_ns))

    _util.close_graceful = close
    worker.wait, worker.run = wait_and_turn, run_then_finish


def give_up_silent_connections(worker: Any, process: Process) -> None:
    """Have a leaving worker not sit in recv() for a connection that has sent nothing.

    It cannot be interrupted there: after a signal's handler Python goes on with the call (PEP 475).
    """
    handle = worker.handle
    # Not ours, which may end the loop of a worker that empties its queue.
    beat = functools.partial(SyncWorker.notify, worker)

    def waits() -> None:
        # On the board alone: gunicorn's `timeout` ends a worker that waits for a silent client, as ever. An upgrade
        # must not wait for that before it believes that this worker lives.
        if process.slot is not None:
            process.slot.beat_at = clock.now_ns()

    def handle_if_not_silent(listener: Any, client: Any, address: Any) -> None:
        if await_first_byte(client, process.is_leaving, beat, waits=waits):
            handle(listener, client, address)
        else:
            worker.log.debug("Closing a connection that has sent nothing.")
            util.close(client)

    worker.handle = handle_if_not_silent
