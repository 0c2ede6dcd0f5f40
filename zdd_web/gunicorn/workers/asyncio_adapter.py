"""What gunicorn's own `asgi` worker and uvicorn's have in common; see asgi_adapter.py and uvicorn_adapter.py.

Both run a loop of their own that sends heartbeats and looks whether it is to end. The gate is between the app's
lifespan start-up and the first listener, and a worker leaves *within* its loop: it stops accepting, finishes requests
and background work while the loop still sends heartbeats, and only then ends the loop, with nothing left to cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter.exits import WORKER_BOOT_ERROR
from zdd_web.gunicorn.adapter.kept_asyncio import AsyncioConnections
from zdd_web.gunicorn.adapter.kept_interface import can_travel
from zdd_web.gunicorn.workers.accepting_server import AcceptingServer
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.asgi_request_counter import CountingApp
from zdd_web.gunicorn.workers.asyncio_drain import AsyncioDrain
from zdd_web.gunicorn.workers.leaving import Leaving
from zdd_web.gunicorn.workers.warmup import warm_up_asgi
from zdd_web.gunicorn.workers.worker_adapter import WorkerAdapter
from zdd_web.listeners.reuseport.queues import Queues
from zdd_web.system import clock

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import FrameType

    from zdd_web.gunicorn.adapter.protocols import App, AsyncioProtocol, Handler, SocketName
    from zdd_web.gunicorn.workers.kept_connections import ConnectionStore

#: The class of a connection's protocol.
C = TypeVar("C", bound="AsyncioProtocol")

#: How often a worker that is on its way out looks how far it has come, seconds.
TURN = 0.1


class AsyncioAdapter(WorkerAdapter, Generic[C]):
    """The adapter of either, but for what differs between them."""

    #: uvicorn calls no hook; with a `post_request` gunicorn serves a connection's requests more slowly
    #: (test_asgi_has_a_shortcut_without_post_request); neither counts a request of which the app has sent the reply and
    #: goes on. See `CountingApp`.
    counts_by_hook = False

    #: Whether a reply is to say `Connection: close` itself.
    says_close = True

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.servers: list[asyncio.Server | AcceptingServer] = []
        #: When each was accepted, monotonic nanoseconds.
        self.connections: weakref.WeakKeyDictionary[C, int] = weakref.WeakKeyDictionary()
        self._peers_before_the_stop: set[object] | None = None
        self.app: CountingApp | None = None
        self.accepting = True
        self.store = self.make_store()
        self._at_gate = False
        self._timer: asyncio.TimerHandle | None = None
        self._shut_down: Handler = self._obey

    def make_store(self) -> AsyncioConnections[C]:
        """Make what knows the kept connections of this class."""
        raise NotImplementedError

    def connection_store(self) -> ConnectionStore[C] | None:
        """See `WorkerAdapter`."""
        self.store.can_travel = can_travel(self.worker.cfg)
        return self.store

    def _websockets(self) -> Collection[object]:
        return self.app.websockets if self.app is not None else ()

    # -- boot

    def enter(self) -> None:
        """See `WorkerAdapter`."""
        super().enter()
        # Not the loop's handlers: they wait for the loop, which does not run while the app is imported.
        self.worker.handle_signals_in_python()
        self._shut_down = self.worker.replace("handle_exit", self._handle_exit)

    def count(self, app: App) -> CountingApp:
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

        async def create(
            factory: Callable[[], C], *arguments: Any, sock: Any = None, **options: Any
        ) -> asyncio.Server | AcceptingServer:
            if not any(sock is each for each in ours):
                return await create_server(factory, *arguments, sock=sock, **options)
            await self._pass_gate()

            def connection() -> C:
                protocol = factory()
                self.connections[protocol] = clock.now_ns()
                return protocol

            server: asyncio.Server | AcceptingServer
            if isinstance(sock, Queues) or isinstance(loop, asyncio.BaseEventLoop):
                sock.setblocking(False)
                server = AcceptingServer(loop, connection, sock, **options)
            else:
                # uvloop has no turn between an accept and its transport.
                server = await create_server(connection, *arguments, sock=sock, **options)
                # It has called listen() on the socket that all share.
                sock.listen(self.worker.cfg.backlog)
            self.servers.append(server)
            if not self.accepting:
                server.close()
            self.store.factory = connection
            # Not when the next turn comes, a second later: in a reload the other workers may all have left by then.
            self.runtime.kept.watch_exchange()
            return server

        shutdown_executor = loop.shutdown_default_executor

        async def shutdown(*arguments: float | None) -> None:
            # asyncio waits for `asyncio.to_thread()` without a limit (from 3.12 on for five minutes). What is not over
            # by the deadline is left, and logged when the loop is closed.
            while self.runtime.end.threads_left(pools_only=True):
                left = clock.remaining(self.runtime.end.threads_deadline())
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

    def _handle_exit(self, sig: int, frame: FrameType | None) -> None:
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
            before = [each.transport for each, at in list(self.connections.items()) if at < since]
            self._peers_before_the_stop = {
                _peer(each.get_extra_info("peername")) for each in before if each is not None
            }
        # uvicorn has put a forwarded address into the scope.
        transport = getattr(getattr(request.receive, "__self__", None), "transport", None)
        peer = transport.get_extra_info("peername") if transport is not None else request.peer_addr
        return _peer(peer) not in self._peers_before_the_stop

    def is_reading_a_head(self) -> bool:
        """Tell whether a part of a request's head has arrived on a connection; such a connection is not idle."""
        # Not any(): each of them is kept from its own timeout.
        return bool([each for each in list(self.connections) if self.reads_a_head(each)])

    def reads_a_head(self, connection: C) -> bool:
        """Tell it of one connection."""
        raise NotImplementedError

    def end_now(self, status: int) -> NoReturn:
        """See `WorkerAdapter`: uvicorn takes SystemExit for an error of the app that runs."""
        try:
            self.runtime.run_exit_hook()
        finally:
            os._exit(status)


def _peer(address: SocketName) -> object:
    # The scope of an IPv6 client has two of the address's four parts. Unix sockets have no name, or "".
    return tuple(address[:2]) if address and not isinstance(address, (str, bytes)) else None
