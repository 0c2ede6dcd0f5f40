"""Kept connections in a worker: those that travel, and those that must be closed.

Theory of operation
-------------------
A worker that leaves while the service goes on sends each connection that is idle between two requests into the exchange
(sockets/exchange.py), a few in each turn of its loop, those first that have been idle longest. Until a connection is
sent it is served as ever: replies do not close it. A worker that serves looks into the exchange as it looks at its
listeners, and has what it takes wait for its next request, without a thread.

    hands over      upgrade (after the commit window), takeover, SIGHUP, `max_requests` and every other replacement,
                    SIGTTOU; a successor that was given up, to the generation that serves on
    does not        a stop of the service; a successor that does not take connections; TLS, HTTP/2, websockets, and
                    what has a part of a request read: their state is in this process

The exchange has no addressee, and its sender cannot know whether another process will read it. So a worker that leaves
waits until it is empty. What no process has taken for `PATIENCE` seconds it takes back, and closes as it would
without an exchange: with `Connection: close`, or, idle, after a last look.

What touches gunicorn's internals is a `ConnectionStore` (adapter/kept_*.py), one for each family of worker classes.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from zdd_web import log
from zdd_web.lifecycle import STOPPING, Phase
from zdd_web.system import clock, connection_passing
from zdd_web.system.connection_passing import Handed, MessageError

if TYPE_CHECKING:
    import socket

    from zdd_web.board import Board, Slot
    from zdd_web.gunicorn.adapter.worker import WorkerFacade
    from zdd_web.gunicorn.sockets.exchange import Exchange
    from zdd_web.gunicorn.workers.leaving import Leaving
    from zdd_web.process import Process
    from zdd_web.settings import Settings

R = TypeVar("R")
#: What a store has for one connection.
C = TypeVar("C")

#: How long connections may lie in the exchange without any of them being taken, seconds.
PATIENCE = 3.0

#: Sent in one turn of the loop: what arrives meanwhile on others is served before the next ones leave.
GIVEN_AT_ONCE = 64

#: No more is sent while so many bytes lie in the exchange, some sixty messages: what is asked on a connection that lies
#: there waits until the connection is taken.
MOST_WAITING = 4096

#: How long a connection that was taken is kept at least, seconds: a request may have been sent while it travelled, to a
#: worker that would have read it at once.
LEFT_AT_LEAST = 1.0

#: Taken in one turn: other workers are to have their share.
TAKEN_AT_ONCE = 8

#: A worker without a descriptor left does not look into the exchange for so long, seconds, and then until its loop's
#: next turn: what waits there would wake it again and again.
REST = 0.1

#: The loop of a worker that hands over turns at least so often, seconds.
TURN = 0.02

#: The loop of a worker that closes idle connections in a lame duck turns at least so often, seconds.
LAME_DUCK_TURN = 0.1


class ConnectionStore(Protocol[C]):
    """The connections of one worker, as gunicorn's class keeps them. Called in the worker's loop, between two turns."""

    @property
    def can_travel(self) -> bool:
        """Whether another process can serve them."""

    def in_loop(self, function: Callable[[], R]) -> R:
        """Call a function where nothing is read from a connection before it returns."""

    def idle(self) -> list[C]:
        """Return those that are between two requests, or have sent nothing yet; longest idle first."""

    def closable(self) -> list[C]:
        """Return those of `idle()` that are to leave over a lame duck."""

    def describe(self, connection: C) -> tuple[int, Handed]:
        """Return the descriptor of one of them, and what its next process must know."""

    def forget(self, connection: C) -> None:
        """Close this process's descriptor of one of them, and nothing else: it goes on elsewhere."""

    def close_idle(self, connection: C) -> bool:
        """Close one of them, unless its next request has arrived; tell whether it was closed."""

    def keep(self, connection: socket.socket, handed: Handed) -> None:
        """Have one that was received wait for its next request. Takes the socket over."""

    def room(self) -> int:
        """Return how many more may be received."""

    def in_hand(self) -> int:
        """Return how many connections there are, in whatever state."""

    def must_end(self) -> bool:
        """Tell whether connections are left that end only when the loop does."""

    def watch(self, *, is_on: bool) -> None:
        """Have the loop call `KeptConnections.take_some()` when the exchange can be read, or no more."""


class Worker(Protocol):
    """The worker that keeps them; `WorkerRuntime` is one."""

    worker: WorkerFacade
    board: Board
    slot: Slot
    process: Process
    pid: int

    @property
    def settings(self) -> Settings:
        """Those in force."""


class KeptConnections:
    """What a worker does with its connections beside answering requests."""

    def __init__(self, runtime: Worker, exchange: Exchange) -> None:
        self._runtime, self._exchange = runtime, exchange
        self._header, self._slot = runtime.board.header, runtime.slot
        self.store: ConnectionStore[Any] | None = None
        self._watches = False
        self._looks_at = 0.0
        self._rests_until = 0.0
        self._gave_up = False
        #: Handing over has begun, and waits for the exchange rather than for a request.
        self.is_busy = False
        #: See `Keeper`; it has begun to hand over, or to close what is idle, and does not go back.
        self.limits_wait = False
        #: How many bytes of messages lay there at the last look, and since when none of them was seen to be taken.
        self._lay, self._lay_since = 0, 0.0
        #: How many connections were idle when the lame duck was first seen.
        self._at_lame_duck: int | None = None

    # -- whether

    def hands_over(self) -> bool:
        """Tell whether another worker is to serve the connections of this one, which leaves."""
        if self._exchange.give is None or self._gave_up or not self._travels():
            return False
        header = self._header
        if header.deadline or header.stop_since:
            return False
        phase = Phase(header.phase)
        if self._is_orphaned():
            # The master was killed, and its successor goes on; or the generation was given up in its commit window, and
            # the one before it serves on. The board is as the master has left it.
            before = header.predecessor_pid if header.ready_at else 0
            return (self._goes_to_successor() and _is_alive(header.successor_takes)) or _is_alive(before)
        if phase is Phase.RETIRING:
            return self._goes_to_successor()
        leaves = bool(self._slot.retire) or self._runtime.process.going
        return phase is Phase.SERVING and leaves and not header.keeps_none

    def _goes_to_successor(self) -> bool:
        # One that stops takes none, and this generation's own stop may still be on its way.
        header = self._header
        return bool(header.successor_takes) and header.successor_phase not in (*STOPPING, Phase.STOPPED)

    def _is_orphaned(self) -> bool:
        return os.getppid() != self._runtime.worker.ppid

    def are_to_close(self) -> bool:
        """Tell whether replies are to close their connection."""
        return self._runtime.process.is_leaving() and not self.hands_over()

    def _takes(self) -> bool:
        if self._exchange.take is None or self._runtime.process.going or not self._travels():
            return False
        phase = Phase(self._header.phase)
        # At a stop the exchange is emptied like an accept queue.
        return phase in STOPPING or (phase is Phase.SERVING and not self._slot.retire)

    def _travels(self) -> bool:
        # A process that the app has forked has this object too.
        return self.store is not None and self.store.can_travel and os.getpid() == self._runtime.pid

    # -- a worker that serves

    def turn(self) -> None:
        """Look whether the exchange is to be watched, and close what is idle in a lame duck; often, or once a turn."""
        now = time.monotonic()
        if now < self._looks_at or self.store is None or os.getpid() != self._runtime.pid:
            return
        # A loop may turn thousands of times a second.
        self._looks_at = now + TURN
        self.watch_exchange()
        if self._header.phase == Phase.LAME_DUCK and not self._gave_up:
            self.store.in_loop(self._close_over_the_lame_duck)

    def watch_exchange(self) -> None:
        """Have the loop watch the exchange, or not: one that is full takes none until it has room."""
        assert self.store is not None
        wants = self._takes() and self.store.room() > 0 and time.monotonic() >= self._rests_until
        if wants is not self._watches:
            self._watches = wants
            self.store.watch(is_on=wants)

    @property
    def take_fd(self) -> int:
        """The descriptor to watch."""
        assert self._exchange.take is not None
        return self._exchange.take.fileno()

    def take_some(self, most: int = TAKEN_AT_ONCE) -> int:
        """Take connections from the exchange; return how many. The loop's call when it can be read."""
        taken = self._take(most) if self._takes() else 0
        if not taken:
            # Another worker was faster, or this one may not take any, or cannot.
            self.watch_exchange()
        return taken

    def _take(self, most: int) -> int:
        assert self.store is not None and self._exchange.take is not None
        taken = 0
        # Bounded by what is read, valid or not: another worker that sends garbage must not hold up this loop.
        for _ in range(min(most, self.store.room())):
            try:
                found = connection_passing.receive(self._exchange.take)
            except MessageError as error:
                log.emit("internal.error", logging.ERROR, where="exchange", error=str(error))
                continue
            except OSError as error:
                if error.errno in connection_passing.EXHAUSTED:
                    self._rests_until = time.monotonic() + REST
                break
            if found is None:
                break
            connection, handed = found
            handed = handed._replace(left=max(handed.left, LEFT_AT_LEAST))
            self._slot.received += 1
            taken += 1
            try:
                self.store.keep(connection, handed)
            except Exception:
                # An exception in the loop would end the worker, and all that it serves.
                log.emit("internal.error", logging.ERROR, where="exchange", exc_info=True)
        return taken

    def is_exchange_empty(self) -> bool:
        """Tell whether nothing is left in the exchange for a worker that empties its queues at a stop."""
        if self.store is None or self._exchange.take is None or not self.store.can_travel or self.store.room() <= 0:
            return True
        return not connection_passing.waiting_bytes(self._exchange.take)

    # -- a worker that leaves

    def leaving(self, stop_accepting: Callable[[], None], without: Leaving | None) -> Leaving | None:
        """Return what is to be done before the loop is ended; `without` is the same for a worker that hands over none.

        `without` takes over where handing over has come to its end.
        """
        if not self.hands_over():
            return without
        self.is_busy = self.limits_wait = True
        return HandingOver(self, stop_accepting, without)

    @property
    def is_too_late(self) -> bool:
        """Whether what is in hand is to be cut off."""
        return clock.passed(self._runtime.process.deadline_ns)

    def give_some(self) -> bool:
        """Send what is idle into the exchange, `GIVEN_AT_ONCE` at most; tell whether none that is idle is left."""
        assert self.store is not None and self._exchange.give is not None
        try:
            idle = self.store.idle()
            for connection in idle[:GIVEN_AT_ONCE]:
                if self._look_at_what_lies() >= MOST_WAITING:
                    return False
                fd, handed = self.store.describe(connection)
                if not connection_passing.send(self._exchange.give, fd, handed):
                    return False
                self._slot.handed_over += 1
                self.store.forget(connection)
        except Exception:
            # What is left is served, and closed, here.
            log.emit("internal.error", logging.ERROR, where="exchange", exc_info=True)
            self._gave_up = True
            return False
        return len(idle) <= GIVEN_AT_ONCE

    def is_taken(self) -> bool:
        """Tell whether the exchange is empty; gives handing over up when nothing of it is taken for too long."""
        if not self._look_at_what_lies():
            return True
        if time.monotonic() - self._lay_since >= PATIENCE:
            self.take_back()
        return False

    def _look_at_what_lies(self) -> int:
        # Before each message that is sent, too: what was taken may be filled up to the same byte. That there are more
        # bytes than before does not show that any worker takes them.
        lies = connection_passing.waiting_bytes(self._exchange.take)
        if lies < self._lay or not self._lay:
            self._lay_since = time.monotonic()
        self._lay = lies
        return lies

    def take_back(self) -> None:
        """Take what waits in the exchange, and give handing over up."""
        self._gave_up = True
        took, seconds = self._take(1 << 16), time.monotonic() - self._lay_since
        log.emit("connections.taken_back", logging.WARNING, pid=os.getpid(), connections=took, seconds=seconds)

    def take_back_if_alone(self) -> None:
        """Do so where no other process is going to: the master is gone, and so is the one that was to serve on."""
        if self._is_orphaned() and not self._gave_up and self._look_at_what_lies():
            self.take_back()

    def pause(self) -> float | None:
        """Return for how long the loop may wait at most, seconds; None for as long as it likes."""
        if self.is_busy and self.hands_over():
            return TURN
        return LAME_DUCK_TURN if self._at_lame_duck else None

    # -- what must be closed

    def count_closed(self) -> None:
        """Count a connection that is closed idle, if that is because this worker, or the service, ends."""
        if self._runtime.process.is_leaving():
            self._slot.closed_idle += 1

    def _close_over_the_lame_duck(self) -> None:
        """Have idle connections leave over the whole lame duck: their clients come anew while the service answers."""
        delay, store = self._runtime.settings.drain_delay, self.store
        if not delay or store is None:
            return
        idle = store.closable()
        if self._at_lame_duck is None:
            self._at_lame_duck = len(idle)
            self.limits_wait = True
        share = 1 - clock.since(self._header.stop_since) / delay
        stay = max(0, math.ceil(self._at_lame_duck * share))
        for connection in idle[: max(0, len(idle) - stay)]:
            store.close_idle(connection)


class HandingOver:
    """A worker between the order to leave and the end of its loop: it serves what it has and sends off what is idle."""

    def __init__(self, kept: KeptConnections, stop_accepting: Callable[[], None], without: Leaving | None) -> None:
        self._kept, self._stop_accepting, self._without = kept, stop_accepting, without
        self._accepts = True
        self._is_over = False

    def over(self) -> bool:
        """See `Leaving`."""
        kept, store = self._kept, self._kept.store
        assert store is not None
        if self._accepts:
            self._accepts = False
            self._stop_accepting()
        if not self._is_over and kept.hands_over():
            # Both, always: an exchange that stays full is given up too.
            has_given, is_taken = store.in_loop(kept.give_some), store.in_loop(kept.is_taken)
            kept.is_busy = not (has_given and is_taken)
            if has_given and is_taken and (not store.in_hand() or store.must_end()):
                self._is_over = True
            elif kept.hands_over() and not kept.is_too_late:
                return False
        elif not self._is_over:
            store.in_loop(kept.take_back_if_alone)
        return self._without.over() if self._without is not None else True


def _is_alive(pid: int) -> bool:
    try:
        if pid:
            os.kill(pid, 0)
        return bool(pid)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
