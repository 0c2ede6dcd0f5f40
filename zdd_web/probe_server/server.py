"""The event loop of the probe port's process: which connections it accepts and closes, and when it ends itself."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from zdd_web import log
from zdd_web.board import LAYOUT, Board
from zdd_web.errors import ZddError
from zdd_web.health import Reply
from zdd_web.lifecycle import LEAVING, Phase
from zdd_web.probe_server.answers import Answers, Asked, Verdicts
from zdd_web.probe_server.connection import Connection
from zdd_web.probe_server.scrapes import load_library
from zdd_web.probe_server.turns import Rank, Turns
from zdd_web.settings import Settings
from zdd_web.system import clock, log_files, pauses, proc

#: Connections at once; beyond, the one that has been silent for longest is closed.
CONNECTIONS = 512
#: Descriptors that are not connections.
SPARE_DESCRIPTORS = 32
#: How many are accepted before those that are here are heard again.
AT_ONCE = 16
#: For how long a connection is new, seconds.
NEW_SECONDS = 0.5
BUFFER_BYTES = 16_384
#: How often the header of the board is read seconds.
TURN = 0.1
#: How often the verdicts are looked at seconds.
LOOK = 1.0
#: How long a kept connection has for one more request when no more are accepted, seconds.
LINGER = 2.0
#: For how long after the gate was opened it is expected that no worker serves yet, seconds.
GATE_SECONDS = 1.0
#: For how long the predecessor's process may take to accept no more, seconds.
YIELD_SECONDS = 1.0

FAILED = Reply(500, "Internal Server Error", (("Content-Length", "0"),), b"")


class Server:
    """The process's whole state; `run()` returns when it is to end."""

    def __init__(
        self,
        board: Board,
        listener: socket.socket,
        settings: Settings,
        master: int,
        reopen_logs: Callable[[], None],
        predecessors: Board | None = None,
    ) -> None:
        self._header, self._listener, self._master, self._reopen_logs = board.header, listener, master, reopen_logs
        self._answers, self._verdicts = Answers(board, settings, predecessors), Verdicts()
        #: None without one, and once this process has begun to accept in its place.
        self._predecessor = predecessors.header if predecessors is not None else None
        self._may_accept_since = 0.0
        #: Oldest reply first; one that was never answered counts from its beginning.
        self._connections: dict[Connection, None] = {}
        self._limit = max(1, min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS))
        self._beginning: set[asyncio.Task[Any]] = set()
        self._waiting: Turns[Connection] = Turns()
        self._round_is_due = False
        self._accepting = self._named = False
        self._closes_from = 0.0
        self._goes_from = 0.0
        self._looked_at = 0.0
        self._complained_at = 0.0
        self.buffer = memoryview(bytearray(BUFFER_BYTES))

    def run(self) -> None:
        """Serve until this process is replaced, or its master is gone, and no connection is left."""
        load_library()
        self._listener.setblocking(False)
        loop = self._loop = asyncio.SelectorEventLoop()
        loop.set_exception_handler(self._complain)
        # The kernel's word for "your master is gone" (PDEATHSIG); from systemd, which signals all, it changes nothing.
        loop.add_signal_handler(signal.SIGTERM, self._turn)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)
        if log_files.were_renamed():
            # The signal came before this process had its handler.
            loop.call_soon(self._reopen_logs)
        loop.call_soon(self._turns)
        try:
            loop.run_forever()
        finally:
            loop.close()

    # -- what the master says

    def _turns(self) -> None:
        # Clients of a predecessor's process that accepts no more wait for this one to begin.
        self._loop.call_later(TURN if self._predecessor is None else TURN / 10, self._turns)
        self._turn()

    def _turn(self) -> None:
        now = time.monotonic()
        pauses.turn()
        self._sync_with_board(now)
        if self._goes_from:
            # Where no other process holds it the port is closed at once.
            self._listener.close()
        self._close_expired(now)
        idle = not self._connections and not self._beginning
        if self._goes_from and (idle or now - self._goes_from > LINGER + TURN):
            self._loop.stop()
        elif self._accepting and now - self._looked_at >= LOOK:
            self._looked_at = now
            self._log_verdict_changes()

    def _log_verdict_changes(self) -> None:
        header = self._header
        # Workers pass the gate one by one.
        passing = header.phase == Phase.SERVING and clock.since(header.ready_at) < GATE_SECONDS
        if self._accepting and not passing:
            self._verdicts.see(self._answers.look())

    def _sync_with_board(self, now: float) -> None:
        named = self._header.probe_pid == os.getpid()
        self._named = self._named or named
        self._answers.orphaned = os.getppid() != self._master
        if not self._goes_from and (self._answers.orphaned or self._named != named):
            self._goes_from = now
        may_accept = named and bool(self._header.probe_accepts) and not self._goes_from
        self._accept_or_not(may_accept and not self._predecessor_accepts(now))

    def _predecessor_accepts(self, now: float) -> bool:
        # Its master has yet to see that this process may. A client of both in turn would see counters go backwards:
        # each tells its own counts, and the old one's reply may be kept from a second ago.
        before = self._predecessor
        self._may_accept_since = self._may_accept_since or now
        if (
            before is not None
            and self._header.probe_shared
            and before.layout == LAYOUT
            and before.probe_accepts
            and now - self._may_accept_since < YIELD_SECONDS
            and proc.alive(before.master_pid, before.master_start)
        ):
            return True
        self._predecessor = None
        return False

    def _accept_or_not(self, accept: bool) -> None:
        if accept and not self._accepting:
            self._closes_from = 0.0
            self._loop.add_reader(self._listener, self._accept)
        elif self._accepting and not accept:
            self._closes_from = time.monotonic()
            self._loop.remove_reader(self._listener)
        self._accepting = accept

    def _close_expired(self, now: float) -> None:
        silent = self._closes_from and now - self._closes_from > LINGER
        for connection in [each for each in self._connections if now > each.deadline or (silent and not each.closing)]:
            connection.close()

    # -- clients

    def _accept(self) -> None:
        self._sync_with_board(time.monotonic())
        if not self._accepting:
            return
        for _ in range(AT_ONCE):
            try:
                client = self._listener.accept()[0]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # No descriptor left, on this machine perhaps: one more is free now, and the next turn tries again.
                self._make_room()
                self._accept_or_not(False)
                return
            while len(self._connections) + len(self._beginning) >= self._limit and self._make_room():
                pass
            client.setblocking(False)
            task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: Connection(self), client))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    def _make_room(self) -> bool:
        # A connection that was answered before is likely a prober's: those that never asked go first, but for new
        # ones, whose request is on its way.
        before = time.monotonic() - NEW_SECONDS
        foreign_listeners = (each for each in self._connections if not each.known and each.made_at < before)
        longest = next(foreign_listeners, next(iter(self._connections), None))
        if longest is None:
            return False
        self.lost(longest)
        longest.abort()
        return True

    def is_liveness(self, head: bytes | bytearray) -> bool:
        """Tell whether a request that begins like this asks for liveness."""
        return self._answers.is_liveness(head)

    def wait(self, connection: Connection, rank: Rank) -> None:
        """Have a connection answer one request when it is its turn."""
        self._waiting.add(connection, rank)
        self._have_a_round()

    def _have_a_round(self) -> None:
        if not self._round_is_due:
            self._round_is_due = True
            # Behind what the sockets have by then.
            self._loop.call_soon(self._round)

    def _round(self) -> None:
        self._round_is_due = False
        try:
            for connection in self._waiting.round():
                connection.take_turn()
        finally:
            if self._waiting:
                self._have_a_round()

    def reply(self, asked: Asked) -> Reply:
        """Answer a request, from what the board says now."""
        # The master may be gone since the last turn.
        self._sync_with_board(time.monotonic())
        try:
            reply = self._answers.reply(asked)
            if reply.status == HTTPStatus.SERVICE_UNAVAILABLE:
                # It may have seen the end of its master, whose workers leave: this process, the first of its children,
                # hears of it before any of them.
                self._sync_with_board(time.monotonic())
                reply = self._answers.reply(asked)
            # Each answer that was sent stands in the log, however soon it changes again.
            self._log_verdict_changes()
        except Exception as error:
            self._complain(self._loop, {"exception": error})
            return FAILED
        return reply

    def keeps(self) -> bool:
        """Tell whether connections may be kept after a reply."""
        return self._accepting and Phase(self._header.phase) not in LEAVING

    def made(self, connection: Connection) -> None:
        """Take note of a new connection."""
        self._connections[connection] = None

    def served(self, connection: Connection) -> None:
        """Take note of a reply: of all connections this one is now the last to be closed."""
        connection.known = True
        if self._connections.pop(connection, self) is None:
            self._connections[connection] = None

    def lost(self, connection: Connection) -> None:
        """Take note of a connection's end."""
        self._connections.pop(connection, None)

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A client that is gone is not an error, and a client that causes errors must not fill the log.
        error = context.get("exception")
        if isinstance(error, OSError) or time.monotonic() - self._complained_at < LOOK:
            return
        self._complained_at = time.monotonic()
        error = error or ZddError(str(context.get("message")))
        log.emit("internal.error", logging.ERROR, where="probe port", exc_info=error)
