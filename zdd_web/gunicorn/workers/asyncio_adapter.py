"""asyncio: gunicorn's own `asgi` worker, and uvicorn's.

Both run a loop of their own that sends heartbeats and looks whether it is to end. The gate is between the app's
lifespan start-up and the first listener, and a worker leaves *within* its loop: it stops accepting, finishes requests
and background work while the loop still sends heartbeats, and only then ends the loop, with nothing left to cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter import asgi, heads
from zdd_web.gunicorn.adapter.exits import WORKER_BOOT_ERROR
from zdd_web.gunicorn.adapter.kept_asyncio import AsgiConnections, AsyncioConnections, UvicornConnections
from zdd_web.gunicorn.adapter.uvicorn import UvicornServer
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.asgi_app import CountingApp
from zdd_web.gunicorn.workers.asyncio_drain import AsyncioDrain
from zdd_web.gunicorn.workers.base import WorkerAdapter
from zdd_web.gunicorn.workers.leaving import Leaving
from zdd_web.gunicorn.workers.queue_server import QueuesServer
from zdd_web.gunicorn.workers.warmup import warm_up_asgi
from zdd_web.listeners.reuseport.queues import Queues
from zdd_web.system import clock

if TYPE_CHECKING:
    from zdd_web.gunicorn.workers.exchange import ConnectionStore

#: How often a worker that is on its way out looks how far it has come, seconds.
TURN = 0.1

#: For how long requests that have arrived on idle connections are read before the loop ends, and how often, seconds.
LAST_LOOKS, LOOK_AGAIN = 0.5, 0.02

#: How long a client may take to answer to the end of its websocket or HTTP/2 connection, seconds; as in gunicorn.
CLOSE_WITHIN = 5.0


class AsyncioAdapter(WorkerAdapter):
    """What both classes have in common."""

    #: uvicorn calls no hook; with a `post_request` gunicorn serves a connection's requests more slowly
    #: (test_asgi_has_a_shortcut_without_post_request); neither counts a request of which the app has sent the reply and
    #: goes on. See `CountingApp`.
    counts_by_hook = False

    #: Whether a reply is to say `Connection: close` itself.
    says_close = True

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.servers: list[asyncio.Server | QueuesServer] = []
        #: When each was accepted, monotonic nanoseconds.
        self.connections: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._peers_before_the_stop: set[Any] | None = None
        self.app: CountingApp | None = None
        self.accepting = True
        self.store = self.make_store()
        self._at_gate = False
        self._timer: asyncio.TimerHandle | None = None
        self._shut_down: Callable[[int, Any], None] = self._obey

    def make_store(self) -> AsyncioConnections:
        """Make what knows the kept connections of this class."""
        raise NotImplementedError

    def connection_store(self) -> ConnectionStore | None:
        """See `WorkerAdapter`."""
        cfg = self.worker.cfg
        # A PROXY line is read once, and its content is in this process; so is TLS.
        plain = not cfg.is_ssl and cfg.proxy_protocol in ("off", False)
        self.store.can_travel = bool(plain and cfg.keepalive and getattr(cfg, "protocol", "http") == "http")
        return self.store

    def _websockets(self) -> Any:
        return self.app.websockets if self.app is not None else ()

    # -- boot

    def enter(self) -> None:
        """See `WorkerAdapter`."""
        super().enter()
        # Not the loop's handlers: they wait for the loop, which does not run while the app is imported.
        self.worker.handle_signals_in_python()
        self._shut_down = self.worker.replace("handle_exit", self._handle_exit)

    def count(self, app: Callable[..., Any]) -> CountingApp:
        """Put what counts between the server and the app."""
        header, generation = self.runtime.settings.generation_header, self.runtime.board.header.generation
        named = ((header.lower().encode(), str(generation).encode()),) if header else ()
        self.app = CountingApp(app, self, named, says_close=self.says_close)
        return self.app

    def run(self, run: Callable[[], None]) -> None:
        """See `WorkerAdapter`."""
        try:
            run()
        except SystemExit as error:
            if error.code and self.runtime.slot.state == WorkerState.BOOTING:
                self._could_not_boot()
            raise
        if self.runtime.slot.state == WorkerState.BOOTING:
            # So gunicorn up to 26 says that the start-up failed of an app that must have one.
            self._could_not_boot()
            raise SystemExit(WORKER_BOOT_ERROR)

    def _could_not_boot(self) -> None:
        with contextlib.suppress(RuntimeError), self.runtime.boot_step():
            self._raise_startup_error("see the log")

    def _raise_startup_error(self, why: str | None) -> None:
        why = (self.app and self.app.startup_error) or why
        if why:
            raise RuntimeError(f"lifespan start-up failed: {why}")

    def enter_loop(self) -> None:
        """Called in the loop, first of all."""
        self.loop = self.store.loop = loop = asyncio.get_running_loop()
        create_server = loop.create_server
        ours = [listener for each in self.worker.sockets for listener in (each, getattr(each, "sock", each))]

        async def create(factory: Any, *arguments: Any, sock: Any = None, **options: Any) -> Any:
            if not any(sock is each for each in ours):
                return await create_server(factory, *arguments, sock=sock, **options)
            await self._pass_gate()

            def connection() -> Any:
                protocol = factory()
                self.connections[protocol] = clock.now_ns()
                return protocol

            server: asyncio.Server | QueuesServer
            if isinstance(sock, Queues) or isinstance(loop, asyncio.BaseEventLoop):
                sock.setblocking(False)
                server = QueuesServer(loop, connection, sock, **options)
            else:
                # uvloop has no turn between an accept and its transport.
                server = await create_server(connection, *arguments, sock=sock, **options)
                # It has called listen() on the socket that all share.
                sock.listen(self.worker.cfg.backlog)
            self.servers.append(server)
            if not self.accepting:
                server.close()
            self.store.factory = connection
            self.runtime.kept.turn()
            return server

        shutdown_executor = loop.shutdown_default_executor

        async def shutdown(*arguments: Any) -> None:
            # asyncio waits for `asyncio.to_thread()` without a limit (from 3.12 on for five minutes). What is not over
            # by the deadline is left, and logged when the loop is closed.
            while self.runtime.after_loop.threads_left(pools_only=True):
                left = clock.remaining(self.runtime.after_loop.threads_deadline())
                if left == 0:
                    return
                await asyncio.sleep(TURN if left is None else min(TURN, left))
            await shutdown_executor(*arguments)

        loop.shutdown_default_executor = shutdown  # type: ignore[method-assign]
        loop.create_server = create  # type: ignore[method-assign, assignment]
        self._turn()

    async def _pass_gate(self) -> None:
        """Called before each listener; the first one waits."""
        if self._at_gate:
            return
        self._at_gate = True
        runtime = self.runtime
        assert self.loop is not None and self.app is not None
        try:
            with runtime.boot_step() as step:
                # gunicorn up to 26 serves such an app.
                self._raise_startup_error(None)
                await warm_up_asgi(self.app.app, runtime.settings.warmup, step)
                # The loop goes on beating.
                await asyncio.to_thread(runtime.pass_checks, lambda: None, self.loop)
        except Exception:
            # gunicorn would log it as a listener that cannot be opened, and exit with 0:
            # test_asgi_takes_an_error_before_the_listener_for_its_own.
            raise SystemExit(WORKER_BOOT_ERROR) from None
        gate = runtime.arrive_at_gate()
        opened = asyncio.Event()
        self.loop.add_reader(gate, opened.set)
        try:
            await opened.wait()
        finally:
            self.loop.remove_reader(gate)
        runtime.pass_gate()
        # The next heartbeat is due a whole interval from here: the predecessor waits for it.
        self._turn()

    # -- the way out

    def _handle_exit(self, sig: int, frame: Any) -> None:
        if self.loop is None or self.runtime.slot.state == WorkerState.BOOTING:
            self._shut_down(sig, frame)
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._obey_term)

    def _obey_term(self) -> None:
        self._shut_down(signal.SIGTERM, None)
        self._turn()

    def _turn(self) -> None:
        """Beat, also where the class's own loop does not: at the gate, and when it ends."""
        assert self.loop is not None
        if self._timer is not None:
            self._timer.cancel()
        try:
            self.runtime.notify()
            self.runtime.kept.turn()
        finally:
            pause = self.runtime.kept.pause()
            usual = TURN if self.runtime.is_finishing else self.interval
            self._timer = self.loop.call_later(usual if pause is None else min(usual, pause), self._turn)

    def stop_accepting(self) -> None:
        """Close the listeners of this process."""
        self.accepting = False
        for server in self.servers:
            server.close()

    def wake(self) -> None:
        """See `WorkerAdapter`."""
        assert self.loop is not None
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._turn)

    def leaving(self) -> Leaving | None:
        """See `WorkerAdapter`."""
        return self.runtime.kept.leaving(functools.partial(AsyncioAdapter.stop_accepting, self), AsyncioDrain(self))

    def in_a_child_of_the_app(self) -> None:
        """See `WorkerAdapter`: asyncio's loop does not run there."""

    def is_on_new_connection(self, request: Any) -> bool:
        """See `WorkerAdapter`: a scope does not tell; connections open before the stop are known by their peers."""
        if self._peers_before_the_stop is None:
            since = self.runtime.board.header.stop_since
            before = [each for each, at in list(self.connections.items()) if at < since and each.transport is not None]
            self._peers_before_the_stop = {_peer(each.transport.get_extra_info("peername")) for each in before}
        # uvicorn has put a forwarded address into the scope.
        transport = getattr(getattr(request.receive, "__self__", None), "transport", None)
        peer = transport.get_extra_info("peername") if transport is not None else request.peer_addr
        return _peer(peer) not in self._peers_before_the_stop

    def is_reading_a_head(self) -> bool:
        """Tell whether a part of a request's head has arrived on a connection; such a connection is not idle."""
        # Not any(): each of them is kept from its own timeout.
        return bool([each for each in list(self.connections) if self.reads_a_head(each)])

    def reads_a_head(self, connection: Any) -> bool:
        """Tell it of one connection."""
        raise NotImplementedError

    def end_now(self, status: int) -> NoReturn:
        """See `WorkerAdapter`: uvicorn takes SystemExit for an error of the app that runs."""
        try:
            self.runtime.run_exit_hook()
        finally:
            os._exit(status)


def _peer(address: Any) -> Any:
    # The scope of an IPv6 client has two of the address's four parts. Unix sockets have no name, or "".
    return tuple(address[:2]) if address and not isinstance(address, (str, bytes)) else None


class AsgiAdapter(AsyncioAdapter):
    """gunicorn.workers.gasgi.ASGIWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        self._drained = asyncio.Event()
        self.says_close = not asgi.adapt_protocol(runtime.kept.are_to_close)

    def make_store(self) -> AsyncioConnections:
        """See `AsyncioAdapter`."""
        limit = self.worker.cfg.worker_connections
        return AsgiConnections(self.runtime.kept, lambda: list(self.connections), self._websockets, limit)

    def stand_at_gate(self) -> None:
        """See `WorkerAdapter`; the gate itself comes after lifespan start-up."""
        self.worker.set_asgi(self.count(self.worker.asgi))
        asgi.replace_loop(self.worker, self._serving, self._shutting_down)

    def _serving(self, serve: asgi.Coroutine) -> asgi.Coroutine:
        async def then_serve() -> None:
            self.enter_loop()
            await serve()

        return then_serve

    def _shutting_down(self, shutdown: asgi.Coroutine) -> asgi.Coroutine:
        async def shutdown_when_drained() -> None:
            # gunicorn comes here by itself when the master is gone: test_asgi_shuts_down_when_its_master_is_gone.
            self._obey_term()
            await self._drained.wait()
            await self._close_connections()
            asgi.forget_connections(self.worker)
            await shutdown()

        return shutdown_when_drained

    def reads_a_head(self, connection: Any) -> bool:
        """See `AsyncioAdapter`."""
        return heads.gunicorn_reads_a_head(connection)

    def stop_accepting(self) -> None:
        """See `AsyncioAdapter`."""
        super().stop_accepting()
        # Connections close after their next reply, HTTP/2 sends GOAWAY; see `_shutting_down()`.
        self.worker.end_loop()

    def end_loop(self) -> None:
        """See `WorkerAdapter`."""
        self._drained.set()

    async def _close_connections(self) -> None:
        if self.has_cut:
            return
        assert self.loop is not None and self.app is not None
        for send in self.app.websockets:
            # 1012: service restart.
            self.app.closing.add(self.loop.create_task(send({"type": "websocket.close", "code": 1012})))
        transports, idle = [], []
        for connection in list(self.connections):
            if connection.transport is not None:
                transports.append(connection.transport)
                # gunicorn waits for as long as `keepalive`. What has a reader is HTTP/2 and takes its leave by itself.
                if self.store.can_travel and self.store.is_idle(connection):
                    idle.append(connection)
                elif not (connection.reader or connection._websocket):
                    connection.transport.close()
        since = time.monotonic()
        while not clock.passed(self.runtime.process.deadline_ns):
            for connection in idle:
                # One whose next request has arrived is answered first.
                self.store.close_idle(connection)
            unsent = any(transport.get_write_buffer_size() for transport in transports)
            is_open = not all(transport.is_closing() for transport in transports)
            if not unsent and not (is_open and time.monotonic() - since < CLOSE_WITHIN):
                break
            await asyncio.sleep(TURN)


class UvicornAdapter(AsyncioAdapter):
    """uvicorn_worker.UvicornWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        self._uvicorn = UvicornServer(runtime.worker)

    def make_store(self) -> AsyncioConnections:
        """See `AsyncioAdapter`."""
        return UvicornConnections(self.runtime.kept, lambda: list(self.connections), self._websockets)

    def stand_at_gate(self) -> None:
        """See `WorkerAdapter`; the gate itself comes after lifespan start-up."""
        self.worker.set_wsgi(self.count(self.worker.wsgi))
        self.worker.replace("_serve", self._serve)

    async def _serve(self) -> None:
        self._uvicorn.make(self.worker.wsgi)
        self.enter_loop()
        if not await self._uvicorn.serve(self.worker):
            raise SystemExit(WORKER_BOOT_ERROR)

    def reads_a_head(self, connection: Any) -> bool:
        """See `AsyncioAdapter`."""
        return heads.uvicorn_reads_a_head(connection)

    def end_loop(self) -> None:
        """See `WorkerAdapter`."""
        left = clock.remaining(self.runtime.process.deadline_ns)
        self._uvicorn.end_within(None if left is None else 0 if self.has_cut else max(1, math.ceil(left)))
        self._close_idle(clock.after_ns(LAST_LOOKS))

    def _close_idle(self, until: int) -> None:
        # uvicorn would look at none of them before it closes them all.
        assert self.loop is not None
        left = [each for each in self.store.idle() if not self.store.close_idle(each)]
        if left and not self.has_cut and not clock.passed(until):
            self.loop.call_later(LOOK_AGAIN, self._close_idle, until)
        else:
            self._uvicorn.end()
