"""The queue in which gunicorn's master waits for signals, replaced by a queue whose timeout always ends.

gunicorn 24 and later wait in `queue.SimpleQueue.get(timeout=…)`. CPython computes the time that is left after each turn
of that function's loop, and takes a negative rest for "no timeout" (Modules/_queuemodule.c, 3.10 to 3.13): a process
that is descheduled or stopped for longer than `timeout` just after it has taken the queue's lock, or whose signal
handler takes longer than that, waits until the next signal. A master whose workers are ready then never learns it.
`Lock.acquire(timeout=…)` computes the rest as well, and checks its sign.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING

from zdd_web.gunicorn.adapter.patches import write

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Arbiter


class SignalQueue:
    """The methods of `SimpleQueue` that gunicorn's master and its signal handlers call.

    A handler may interrupt any of them: each step is atomic for the interpreter, and an item is there before its
    wake-up is.
    """

    def __init__(self) -> None:
        self._items: deque[int] = deque()
        self._nothing_new = threading.Lock()
        self._nothing_new.acquire()

    def put_nowait(self, item: int) -> None:
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # released already: the waiting process has not run yet
            self._nothing_new.release()

    def get(self, block: bool = True, timeout: float | None = None) -> int:
        """Wait up to `timeout` seconds for an item; raise `queue.Empty` if there is none.

        It may be raised early, after an item that `get_nowait()` has taken: the main loop turns once more.
        """
        if block and not self._items:
            self._nothing_new.acquire(timeout=-1 if timeout is None else timeout)
        return self.get_nowait()

    def get_nowait(self) -> int:
        try:
            return self._items.popleft()
        except IndexError:
            raise queue.Empty from None

    def has(self, item: int) -> bool:
        # A copy first: a handler may append while a deque is searched, which raises.
        return item in tuple(self._items)

    def empty(self) -> bool:
        return not self._items


def replace_queue(arbiter: Arbiter) -> None:
    """Give a master that waits in a `SimpleQueue` this queue, with the signals that have been queued already."""
    before = getattr(arbiter, "SIG_QUEUE", None)
    if before is None or isinstance(before, (list, SignalQueue)):
        return  # up to 23 it is a list, and the master waits on a pipe
    now = SignalQueue()
    write(arbiter, "SIG_QUEUE", now)
    # A handler that read the attribute before this assignment has put its signal already: handlers run in this thread.
    while not before.empty():
        now.put_nowait(before.get_nowait())


def waits(arbiter: Arbiter, sig: int) -> bool:
    """Tell whether the loop has yet to handle a signal."""
    waiting = arbiter.SIG_QUEUE
    if isinstance(waiting, list):
        return sig in waiting
    return isinstance(waiting, SignalQueue) and waiting.has(sig)


def take(arbiter: Arbiter) -> list[int]:
    """Return the signals that the loop has not handled yet, and empty its queue: a list up to 23."""
    waiting = arbiter.SIG_QUEUE
    taken: list[int] = []
    if isinstance(waiting, list):
        taken, waiting[:] = list(waiting), []
        return taken
    while not waiting.empty():
        taken.append(waiting.get_nowait())
    return taken
