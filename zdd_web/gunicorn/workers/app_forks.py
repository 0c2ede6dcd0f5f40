"""A process that the app forks is not a worker.

A view may fork: multiprocessing, a Pool, `os.fork()`, under gevent every subprocess. The child is a copy of its worker,
with the worker's signal handlers, its slot on the board and its listeners. Left alone, SIGTERM to the child would mark
the worker as leaving, and a listener in a child that stays would keep clients waiting in a queue that is not read.

So in each child of a worker, before any code of the app runs there:

    signals     the worker's handlers are replaced by the default actions; those of the app stay
    the board   what is written to the slot from here on goes to a private copy; the header can still be read
    listeners   the child's copies are closed, and those of the exchange
    greenlets   under gevent they are copied too: what accepts and beats is ended

While the app forks, signals with such a handler are blocked: one that reaches the child before its handlers are
replaced would find the worker's, which does nothing there, and be lost.

A child that was forked past Python (by an extension in C) runs none of this. There the handlers look at the pid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FrameType

from zdd_web.board import Slot
from zdd_web.gunicorn.adapter.worker import HANDLERS, WorkerFacade
from zdd_web.system import shared_memory

#: What a child of this worker is to do first; None in a process that is not a worker, such as the child itself.
_leave: Callable[[], None] | None = None
#: The signals that a thread which forks had blocked before.
_blocked = threading.local()


class OwnHandler:
    """A signal handler of this process, and not of those that it forks: in them the signal has its default action."""

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self._handler, self._pid = handler, os.getpid()

    def __call__(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() == self._pid:
            self._handler(sig, frame)
            return
        signal.signal(sig, signal.SIG_DFL)
        os.kill(os.getpid(), sig)


def ignore(*signals: signal.Signals) -> None:
    """Ignore signals in this process. Not by SIG_IGN, which children keep across an exec."""
    for sig in signals:
        signal.signal(sig, OwnHandler(lambda sig, frame: None))


def attach(worker: WorkerFacade, slot: Slot, listeners: Iterable[int], stop_accepting: Callable[[], None]) -> None:
    """Make the handlers of a worker act in its own process alone, and prepare its children; before `init_process()`.

    `listeners` are descriptors; `stop_accepting()` is called in a child, whose loop is a copy of the worker's.
    """
    global _leave
    for name in HANDLERS:
        worker.wrap(name, OwnHandler)
    inodes = {fd: os.fstat(fd).st_ino for fd in listeners}

    def leave() -> None:
        reset_handlers()
        size = slot.words.itemsize
        shared_memory.write_to_a_copy(slot.memory, slot.base * size, slot.WORDS * size)
        worker.replace("notify", lambda: None)
        close_copies(inodes)
        stop_accepting()

    _leave = leave


def _before() -> None:
    if _leave is not None:
        _blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, own_signals())


def _unblock() -> None:
    before, _blocked.before = getattr(_blocked, "before", None), None
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child() -> None:
    global _leave
    leave, _leave = _leave, None
    try:
        if leave is not None:
            leave()
    finally:
        _unblock()


def own_signals() -> list[int]:
    """Return the signals that have a handler of the worker's."""
    return [sig for sig in signal.valid_signals() if isinstance(signal.getsignal(sig), OwnHandler)]


def reset_handlers() -> None:
    """Give every signal that has a handler of the worker's its default action."""
    # Not Python's own handler for SIGINT: KeyboardInterrupt would unwind through the view into gunicorn's main loop,
    # which takes it for the order to stop the service (test_keyboard_interrupt_ends_the_loop).
    for sig in own_signals():
        signal.signal(sig, signal.SIG_DFL)
    # It wakes the worker's loop, and asyncio would take the child's signals for the worker's own.
    signal.set_wakeup_fd(-1)


def close_copies(inodes: Mapping[int, int]) -> None:
    """Close descriptors, as far as they still are what they were; their numbers stay taken.

    The objects that hold the numbers would otherwise close whatever file is given the same number next.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd, inode in inodes.items():
        with contextlib.suppress(OSError):  # closed by the worker, which is leaving
            if os.fstat(fd).st_ino == inode:
                os.dup2(null, fd, inheritable=False)
    os.close(null)


os.register_at_fork(before=_before, after_in_parent=_unblock, after_in_child=_in_child)
