"""The master's orders, which a worker reads from the board at each turn of its loop.

The order is `retire` in the slot. SIGTERM only makes a worker look sooner, so the worker of an app that has replaced
the SIGTERM handler, or ignores the signal, leaves no later than any other.

Without a signal only `retire` counts, and not the phase: the master writes `retire` to every slot once it has entered
a phase in which workers leave *and* has closed the listeners' doors. A worker that followed the phase at each turn
would look for waiting connections before that. A SIGTERM is different (`exit_states.has_order`): in such a phase it is
an order by itself. The master sends it after both steps; one that anything else has sent in between makes its receiver
leave some milliseconds early, which is better than a second of doubt about a stop that is certain.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from zdd_web import log
from zdd_web.board import Order, Slot

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.worker import WorkerFacade

#: How often a worker that signals do not reach looks for orders while its loop does not turn, seconds.
LOOK = 1.0

#: The loop of a worker under load turns thousands of times a second; its heartbeat, and a look at what seldom changes,
#: is due so often, nanoseconds.
BEAT_EVERY = 10_000_000

REMEDY = "use zdd_web.on_stop(function) instead; the worker leaves all the same when its master says so"


class Once:
    """Something that only one process of a generation is to do; made by the master, before it forks."""

    def __init__(self) -> None:
        self._fd = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if hasattr(os, "eventfd") else -1

    def take(self) -> bool:
        """Take it; tell whether no process had taken it before."""
        if self._fd < 0:
            return True
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        return True


class Ordered(Protocol):
    """The shutdown of a worker, as far as orders go."""

    worker: WorkerFacade
    slot: Slot
    pid: int

    @property
    def loop_is_over(self) -> bool:
        """Whether the worker's loop has ended."""

    def follow_orders(self) -> None:
        """Follow the order on the board; called in the worker's loop, at each turn while there is an order."""

    def watch_deadline(self) -> None:
        """Have what is in hand named at the deadline; called in any thread."""

    def wake(self) -> None:
        """Make the loop take a turn now; called in any thread."""


class Orders:
    """The orders to one worker; `once` is the right to report a replaced handler."""

    def __init__(self, shutdown: Ordered, once: Once) -> None:
        self._shutdown, self._once = shutdown, once
        self._handler = shutdown.worker.handle_exit
        self._reported = False

    def are_to_leave(self) -> bool:
        """Tell whether this worker is to leave: its slot orders it to, or its master is gone."""
        return bool(self._shutdown.slot.retire) or os.getppid() != self._shutdown.worker.ppid

    def turn(self, beat: Callable[[], None]) -> Callable[[], None]:
        """Return the heartbeat of a worker that serves, which follows orders. A closure: it runs in each turn.

        A handler that the app has replaced is noticed in a turn that beats, so at most one wait of the loop later.
        """
        slot, ppid = self._shutdown.slot, self._shutdown.worker.ppid
        words, retire = slot.words, slot.order.base + Order.retire.index
        handler, getsignal, getppid, term = self._handler, signal.getsignal, os.getppid, signal.SIGTERM
        now_ns, due = time.monotonic_ns, 0  # clock.now_ns(), without a call more

        def turn() -> None:
            nonlocal due
            if words[retire]:
                beat()
                self._shutdown.follow_orders()
                return
            now = now_ns()
            if now < due:
                return
            due = now + BEAT_EVERY
            beat()
            if getppid() != ppid:
                self._shutdown.follow_orders()
            elif getsignal(term) is not handler and not self._reported:
                self._report(getsignal(term))

        return turn

    def _report(self, handler: object) -> None:
        self._reported = True
        # A worker in the middle of a request takes no turn, and no signal wakes it.
        with contextlib.suppress(RuntimeError):  # no thread to be had
            threading.Thread(target=self._look, name="zdd_web-orders", daemon=True).start()
        if self._once.take():
            log.emit("handler.replaced", logging.WARNING, pid=os.getpid(), signal="TERM", handler=describe(handler),
                     remedy=REMEDY)  # fmt: skip

    def _look(self) -> None:
        # A greenlet is copied into the processes that the app forks.
        while os.getpid() == self._shutdown.pid and not self._shutdown.loop_is_over:
            if self.are_to_leave():
                self._shutdown.wake()
                self._shutdown.watch_deadline()
            time.sleep(LOOK)


def describe(handler: object) -> str:
    """Return what to call a signal handler in the log.

    >>> describe(signal.SIG_IGN), describe(describe)
    ('SIG_IGN', 'zdd_web.gunicorn.workers.orders.describe')
    """
    if isinstance(handler, signal.Handlers):
        return handler.name
    if handler is None:
        return "one that was not installed by Python"
    where = getattr(handler, "__module__", None) or type(handler).__module__
    return f"{where}.{getattr(handler, '__qualname__', type(handler).__qualname__)}"
