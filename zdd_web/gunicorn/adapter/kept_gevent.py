"""gunicorn.workers.ggevent: its kept connections, as they are closed, handed over and received.

A greenlet serves a connection from its first request to its last, and sits in `recv()` between them. A connection
leaves when that greenlet is woken by the end of its own wait, with a descriptor of the connection on its way already.
Between the two nothing may read: both happen in one callback of the hub.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import gevent
from gevent import getcurrent
from gevent.event import AsyncResult
from gunicorn import http

from zdd_web.gunicorn.adapter.kept_interface import Keeper, can_travel
from zdd_web.gunicorn.adapter.patches import replace
from zdd_web.system.connection_passing import Handed, waiting_bytes

if TYPE_CHECKING:
    import socket

    from zdd_web.gunicorn.adapter.protocols import (
        GeventServer,
        Greenlet,
        Method,
        Parser,
        SocketName,
        Watcher,
        Worker,
    )


R = TypeVar("R")

_http: ModuleType = http


class GeventConnection:
    """One connection, in its greenlet."""

    def __init__(self, client: socket.socket, server: SocketName, handed: Handed | None) -> None:
        self.client, self.server = client, server
        #: Requests that other processes have answered.
        self.before = handed.requests if handed is not None else 0
        self.left = handed.left if handed is not None else None
        #: How often a request was waited for, and the wait that is going on.
        self.waits = 0
        self.idle: Idle | None = None
        self.parser: Parser | None = None
        self.is_http2 = False

    @property
    def is_idle(self) -> bool:
        """Whether it is between two requests: no byte of the next one was read, and none of the last one is unread."""
        if self.idle is None or self.idle.is_reading or self.parser is None or self.is_http2:
            return False
        # The parser counts a request when it begins to read it, after the rest of the one before.
        return bool(self.parser.req_count == self.before + self.waits)


class Idle(gevent.Timeout):  # type: ignore[misc]
    """The wait for a request on a connection, which can be ended before its time, unless the request has begun."""

    def __init__(self, keepalive: float, connection: GeventConnection | None) -> None:
        left, self._connection = keepalive, connection
        if connection is not None and connection.left is not None:
            left, connection.left = connection.left, None
        super().__init__(left, False)
        self.ends_at = time.monotonic() + left
        self._greenlet: Greenlet | None = None
        #: A part of the request's head has arrived.
        self.is_reading = False

    def __enter__(self) -> Idle:
        self._greenlet, connection = getcurrent(), self._connection
        if connection is not None:
            connection.waits += 1
            connection.idle = self
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> object:
        if self._connection is not None:
            self._connection.idle = None
        return super().__exit__(*error)

    def end(self) -> None:
        """Run in the hub, where nothing can come in between."""
        connection = self._connection
        if connection is not None and connection.idle is self and not self.is_reading and self._greenlet is not None:
            self._greenlet.throw(self)


class GeventConnections:
    """See `ConnectionStore` (workers/kept_connections.py)."""

    def __init__(self, worker: Worker, kept: Keeper) -> None:
        self._worker, self._kept = worker, kept
        #: gevent's servers, one for each listener; filled by the worker's loop.
        self.servers: list[GeventServer] = []
        self._connections: dict[object, GeventConnection] = {}
        self._received: dict[int, tuple[socket.socket, Handed]] = {}
        self._watcher: Watcher | None = None

    @property
    def can_travel(self) -> bool:
        """Whether connections of this worker can be served by another."""
        return can_travel(self._worker.cfg) and hasattr(_http, "get_parser")

    def enter(self, name_of: Callable[[object], SocketName]) -> None:
        """Take note of each connection, parser and wait; `name_of` returns a listener's name."""
        worker = self._worker
        handle, get_parser = worker.handle, getattr(_http, "get_parser", None)

        def handle_and_note(listener: object, client: socket.socket, addr: SocketName) -> None:
            greenlet = getcurrent()
            _, handed = self._received.pop(id(client), (None, None))
            server = handed.server if handed is not None else name_of(listener)
            self._connections[greenlet] = GeventConnection(client, server, handed)
            try:
                # It asks the listener for its name in a greenlet of its own
                # (test_gevent_asks_for_the_name_of_a_listener), where that may be closed.
                handle(_Named(server), client, addr)
            finally:
                del self._connections[greenlet]

        def get_parser_and_note(*arguments: object, **options: object) -> Parser:
            assert get_parser is not None
            parser: Parser = get_parser(*arguments, **options)
            connection = self._connections.get(getcurrent())
            if connection is not None:
                connection.is_http2 = connection.parser is not None or bool(options.get("http2_connection"))
                connection.parser = parser
                if connection.before:
                    parser.req_count = connection.before
                if hasattr(parser, "finish_body"):
                    parser.finish_body = _noting_the_rest(parser, parser.finish_body, connection)
            return parser

        replace(worker, "handle", handle_and_note)
        if get_parser is not None:
            replace(_http, "get_parser", get_parser_and_note)
        replace(worker, "timeout_ctx", lambda: Idle(worker.cfg.keepalive, self._connections.get(getcurrent())))

    def note_reading(self) -> None:
        """Note that a part of a head has arrived on the connection of this greenlet."""
        connection = self._connections.get(getcurrent())
        if connection is not None and connection.idle is not None:
            connection.idle.is_reading = True

    def close_all_idle(self) -> bool:
        """Close what is idle, with a last look at each; tell whether none is left. Called in the hub."""
        waiting = [each for each in self._connections.values() if each.idle is not None and not each.idle.is_reading]
        were_closed = [self.close_idle(each) for each in waiting]
        return all(were_closed)

    # -- ConnectionStore

    def in_loop(self, function: Callable[[], R]) -> R:
        """See `ConnectionStore`: in the hub, from which no greenlet can run in between."""
        hub = gevent.get_hub()
        if getcurrent() is hub:
            return function()
        result = AsyncResult()

        def run() -> None:
            try:
                result.set(function())
            except Exception as error:
                result.set_exception(error)

        hub.loop.run_callback(run)
        found: R = result.get()
        return found

    def idle(self) -> list[GeventConnection]:
        """See `ConnectionStore`."""
        idle = [each for each in self._connections.values() if each.is_idle]
        return sorted(idle, key=lambda each: each.idle.ends_at if each.idle is not None else 0.0)

    def closable(self) -> list[GeventConnection]:
        """See `ConnectionStore`."""
        return self.idle()

    def describe(self, connection: GeventConnection) -> tuple[int, Handed]:
        """See `ConnectionStore`."""
        left = max(0.0, connection.idle.ends_at - time.monotonic()) if connection.idle is not None else 0.0
        return connection.client.fileno(), Handed(left, connection.before + connection.waits - 1, connection.server)

    def forget(self, connection: GeventConnection) -> None:
        """See `ConnectionStore`: its greenlet closes it as at the end of `keepalive`."""
        if connection.idle is not None:
            connection.idle.end()

    def close_idle(self, connection: GeventConnection) -> bool:
        """See `ConnectionStore`."""
        if connection.idle is None or connection.idle.is_reading or waiting_bytes(connection.client):
            return False
        self._kept.count_closed()
        connection.idle.end()
        return True

    def keep(self, connection: socket.socket, handed: Handed) -> None:
        """See `ConnectionStore`: a greenlet of its own waits for the next request."""
        try:
            address = connection.getpeername()
        except OSError:
            # It was reset on its way.
            connection.close()
            return
        client = gevent.socket.socket(fileno=connection.detach())
        self._received[id(client)] = client, handed
        # Not by the server: one that is closed has forgotten its handler, and a worker that leaves takes back what no
        # other has taken.
        self.servers[0].pool.spawn(self._worker.handle, None, client, address)

    def room(self) -> int:
        """See `ConnectionStore`."""
        return self.servers[0].pool.free_count() if self.servers else 0

    def in_hand(self) -> int:
        """See `ConnectionStore`."""
        return sum(server.pool.size - server.pool.free_count() for server in self.servers)

    def must_end(self) -> bool:
        """See `ConnectionStore`: HTTP/2 says GOAWAY when the loop is to end."""
        return any(each.is_http2 for each in self._connections.values())

    def watch(self, *, is_on: bool) -> None:
        """See `ConnectionStore`."""
        if is_on:
            self._watcher = gevent.get_hub().loop.io(self._kept.take_fd, 1)
            self._watcher.start(self._kept.take_some)
        elif self._watcher is not None:
            with contextlib.suppress(Exception):
                self._watcher.stop()
                self._watcher.close()
            self._watcher = None


def _noting_the_rest(parser: Parser, finish: Method, connection: GeventConnection) -> Method:
    def finish_and_note(*arguments: object, **options: object) -> object:
        """What is left when the body before is discarded, and only that, belongs to the next request."""
        is_finished = finish(*arguments, **options)
        if connection.idle is not None:
            connection.idle.is_reading = bool(parser.unreader.buf.getvalue())
        return is_finished

    return finish_and_note


class _Named:
    """A listener of which only the name is left."""

    def __init__(self, name: SocketName) -> None:
        self._name = name

    def getsockname(self) -> SocketName:
        return self._name
