"""Kept connections of asyncio's worker classes, as they are closed, handed over and received.

A transport closes its own descriptor; the connection goes on by the copy that is on its way. Between the send and the
close nothing is read: both happen in one callback of the loop, and what the loop has seen to be readable is forgotten
with the transport. Neither may shut the connection down, as gunicorn's `_close_transport()` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from zdd_web.gunicorn.adapter.kept_interface import Keeper
from zdd_web.system.connection_passing import Handed, waiting_bytes

if TYPE_CHECKING:
    from collections.abc import Collection

    from zdd_web.gunicorn.adapter.protocols import AsgiProtocol, AsyncioProtocol, UvicornProtocol


R = TypeVar("R")
#: The class of a connection's protocol.
C = TypeVar("C", bound="AsyncioProtocol")

#: How often a worker counts its connections to know whether there is room for more, seconds.
COUNTS_EVERY = 0.25


class AsyncioConnections(Generic[C]):
    """See `ConnectionStore` (workers/kept_connections.py); what the two classes have in common.

    `connections()` returns the protocols of the worker's connections, `websockets()` those that are websockets.
    """

    def __init__(
        self,
        kept: Keeper,
        connections: Callable[[], Iterable[C]],
        websockets: Callable[[], Collection[object]],
        limit: int | None = None,
    ) -> None:
        self._kept, self._connections, self._websockets, self._limit = kept, connections, websockets, limit
        self.can_travel = True
        self.loop: asyncio.AbstractEventLoop | None = None
        self.factory: Callable[[], C] | None = None
        self._connecting: set[asyncio.Task[None]] = set()
        #: How many were in hand when they were last counted, and have been received since; and when that was.
        self._counted, self._counted_at = 0, -COUNTS_EVERY

    # -- what differs

    def is_idle(self, protocol: C) -> bool:
        """Tell whether a connection is between two requests."""
        raise NotImplementedError

    def timer(self, protocol: C) -> asyncio.TimerHandle | None:
        """Return the timer that ends an idle connection; None where it has none."""
        raise NotImplementedError

    def requests(self, protocol: C) -> int:
        """Return how many requests a connection has had."""
        raise NotImplementedError

    def before_made(self, protocol: C, requests: int) -> None:
        """Prepare the protocol of a connection that was received."""

    def set_timer(self, protocol: C, left: float) -> None:
        """Have an idle connection end in `left` seconds."""
        raise NotImplementedError

    def let_go(self, protocol: C) -> None:
        """Have a protocol end without a word to the client; its transport is about to be closed."""

    # -- ConnectionStore

    def in_loop(self, function: Callable[[], R]) -> R:
        """See `ConnectionStore`: all of this is called in the loop."""
        return function()

    def idle(self) -> list[C]:
        """See `ConnectionStore`."""
        idle = [each for each in self._connections() if self._is_quiet(each) and self.is_idle(each)]
        return sorted(idle, key=self._left)

    def closable(self) -> list[C]:
        """See `ConnectionStore`."""
        return self.idle()

    def _is_quiet(self, protocol: C) -> bool:
        transport = protocol.transport
        if transport is None or transport.is_closing() or transport.get_extra_info("sslcontext") is not None:
            return False
        return not transport.get_write_buffer_size() and transport.get_protocol() is protocol

    def _left(self, protocol: C) -> float:
        timer = self.timer(protocol)
        assert self.loop is not None
        return 1e6 if timer is None else max(0.0, timer.when() - self.loop.time())

    def describe(self, protocol: C) -> tuple[int, Handed]:
        """See `ConnectionStore`."""
        assert protocol.transport is not None
        fd = protocol.transport.get_extra_info("socket").fileno()
        # The next process asks the socket for the address that it was accepted at.
        return fd, Handed(self._left(protocol), self.requests(protocol), "")

    def forget(self, protocol: C) -> None:
        """See `ConnectionStore`."""
        transport = protocol.transport
        assert transport is not None
        self.let_go(protocol)
        transport.abort()

    def close_idle(self, protocol: C) -> bool:
        """See `ConnectionStore`."""
        transport = protocol.transport
        if transport is None or not self._is_quiet(protocol) or not self.is_idle(protocol):
            return False
        fd = transport.get_extra_info("socket").fileno()
        if waiting_bytes(fd):
            return False
        # Right after the look: the transport closes its descriptor a turn of the loop later, when all others that are
        # to be closed have been looked at.
        _shut(fd)
        self._kept.count_closed()
        self.forget(protocol)
        return True

    def keep(self, connection: socket.socket, handed: Handed) -> None:
        """See `ConnectionStore`."""
        assert self.loop is not None
        self._counted += 1
        connection.setblocking(False)
        task = self.loop.create_task(self._connect(connection, handed))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket, handed: Handed) -> None:
        assert self.loop is not None and self.factory is not None
        make = self.factory

        def factory() -> C:
            protocol = make()
            self.before_made(protocol, handed.requests)
            return protocol

        try:
            _, protocol = await self.loop.connect_accepted_socket(factory, connection)
        except OSError:
            # It was reset on its way.
            connection.close()
            return
        if handed.requests:
            # When the protocol has begun to wait, with a timer of its own.
            await asyncio.sleep(0)
            if self._is_quiet(protocol) and self.is_idle(protocol):
                self.set_timer(protocol, handed.left)

    def room(self) -> int:
        """See `ConnectionStore`."""
        if self.factory is None or self.loop is None:
            return 0
        if self._limit is None:
            return 1 << 16
        # Asked in each turn in which connections arrive, and often besides: to count thousands each time would be most
        # of what the loop does.
        now = self.loop.time()
        if now - self._counted_at >= COUNTS_EVERY:
            self._counted, self._counted_at = self.in_hand(), now
        return self._limit - self._counted

    def in_hand(self) -> int:
        """See `ConnectionStore`."""
        transports = (each.transport for each in self._connections())
        # None while it is being made, and in its TLS handshake.
        here = sum(transport is None or not transport.is_closing() for transport in transports)
        return here + len(self._connecting)

    def must_end(self) -> bool:
        """See `ConnectionStore`."""
        return bool(self._websockets())

    def watch(self, *, is_on: bool) -> None:
        """See `ConnectionStore`."""
        if self.loop is None or self.loop.is_closed():
            return
        if is_on:
            self.loop.add_reader(self._kept.take_fd, self._kept.take_some)
        else:
            self.loop.remove_reader(self._kept.take_fd)


def _shut(fd: int) -> None:
    """Tell the client that no more is sent. By a copy: the sockets that transports show cannot do it in every loop."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
        copy.shutdown(socket.SHUT_WR)


class AsgiConnections(AsyncioConnections["AsgiProtocol"]):
    """Those of gunicorn's `asgi` worker; 25 and later."""

    def is_idle(self, protocol: AsgiProtocol) -> bool:
        """See `AsyncioConnections`."""
        ready = protocol._request_ready
        # None in HTTP/2, and set from the end of a head to the end of its reply.
        waits = ready is not None and not ready.is_set() and protocol.reader is None and not protocol._closed
        if not waits or protocol.head_begun or protocol._current_request is not None or protocol._websocket is not None:
            return False
        # An app that goes on after its reply is told when its connection is gone.
        return not (getattr(protocol, "_finishing_calls", None) or protocol._reading_paused)

    def timer(self, protocol: AsgiProtocol) -> asyncio.TimerHandle | None:
        """See `AsyncioConnections`."""
        return protocol._keepalive_handle

    def requests(self, protocol: AsgiProtocol) -> int:
        """See `AsyncioConnections`: the one that is waited for is counted already."""
        return max(0, int(protocol.req_count) - 1)

    def before_made(self, protocol: AsgiProtocol, requests: int) -> None:
        """See `AsyncioConnections`."""
        protocol.req_count = requests

    def set_timer(self, protocol: AsgiProtocol, left: float) -> None:
        """See `AsyncioConnections`."""
        assert self.loop is not None
        protocol._cancel_keepalive_timer()
        protocol._keepalive_handle = self.loop.call_later(left, protocol._keepalive_timeout)

    def let_go(self, protocol: AsgiProtocol) -> None:
        """See `AsyncioConnections`: `_closed` keeps it from shutting the connection down."""
        protocol._closed = True
        protocol._cancel_keepalive_timer()
        # The task that waits for a request ends.
        assert protocol._request_ready is not None
        protocol._request_ready.set()

    def must_end(self) -> bool:
        """See `ConnectionStore`: HTTP/2 says GOAWAY when the loop is to end."""
        return super().must_end() or any(each.reader is not None for each in self._connections())


class UvicornConnections(AsyncioConnections["UvicornProtocol"]):
    """Those of uvicorn's two HTTP protocols."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: Connections that have had a request in another process.
        self._had_one: weakref.WeakSet[UvicornProtocol] = weakref.WeakSet()

    def is_idle(self, protocol: UvicornProtocol) -> bool:
        """See `AsyncioConnections`."""
        cycle = getattr(protocol, "cycle", None)
        if not hasattr(protocol, "timeout_keep_alive_task") or (cycle is not None and not cycle.response_complete):
            return False
        if getattr(protocol, "pipeline", None) or protocol.flow is None or protocol.flow.read_paused:
            return False
        h11 = getattr(protocol, "conn", None)
        if h11 is not None:
            begun = bool(h11.trailing_data[0])
            return bool(h11.their_state.__name__ == h11.our_state.__name__ == "IDLE" and not begun)
        # httptools: a request makes a scope with its first byte, which may have come together with the request before;
        # any byte ends the timer, and an app may reply before it has the whole body.
        if cycle is None:
            return protocol.scope is None
        is_between = protocol.timeout_keep_alive_task is not None and protocol.scope is cycle.scope
        return is_between and not cycle.more_body

    def timer(self, protocol: UvicornProtocol) -> asyncio.TimerHandle | None:
        """See `AsyncioConnections`."""
        return protocol.timeout_keep_alive_task

    def requests(self, protocol: UvicornProtocol) -> int:
        """See `AsyncioConnections`: it only matters whether there was one."""
        return 0 if protocol.cycle is None and protocol not in self._had_one else 1

    def before_made(self, protocol: UvicornProtocol, requests: int) -> None:
        """See `AsyncioConnections`."""
        if requests:
            self._had_one.add(protocol)

    def set_timer(self, protocol: UvicornProtocol, left: float) -> None:
        """See `AsyncioConnections`."""
        assert self.loop is not None
        protocol._unset_keepalive_if_required()
        protocol.timeout_keep_alive_task = self.loop.call_later(left, protocol.timeout_keep_alive_handler)

    def let_go(self, protocol: UvicornProtocol) -> None:
        """See `AsyncioConnections`."""
        protocol._unset_keepalive_if_required()
