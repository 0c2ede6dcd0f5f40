"""gevent: the loop turns in the hub, where nothing may block; threads are greenlets."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import gevent
from gevent import getcurrent
from gevent.server import StreamServer
from gevent.socket import socket as GeventSocket  # noqa: N812 - a class

from zdd_web import waitgroup
from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter import gevent as gunicorns
from zdd_web.gunicorn.adapter.kept_gevent import GeventConnections
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.kept_connections import TURN
from zdd_web.gunicorn.workers.leaving import Leaving
from zdd_web.gunicorn.workers.worker_adapter import LINGER, WorkerAdapter, on_board
from zdd_web.listeners.reuseport.queues import Queues

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.kept_gevent import GeventConnection
    from zdd_web.gunicorn.adapter.protocols import Greenlet, Handler, SocketName
    from zdd_web.gunicorn.workers.kept_connections import ConnectionStore

#: When requests that have arrived on idle connections are read, the others are looked at again, seconds.
LOOK_AGAIN = 0.02


class GeventAdapter(WorkerAdapter):
    """gunicorn.workers.ggevent.GeventWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        # The class's own exits when the master is gone (test_gevent_exits_when_its_master_is_gone), with what is in
        # hand; the kernel sends SIGTERM.
        self.beat = on_board(self.worker.plain_notify, runtime.slot)
        self._store = GeventConnections(runtime.worker.raw, runtime.kept)
        self._servers = self._store.servers
        self._main: Greenlet | None = None

    def enter(self) -> None:
        """See `WorkerAdapter`."""
        super().enter()
        worker, servers = self.worker, self._servers
        names: dict[object, SocketName] = {}

        class Server(StreamServer):  # type: ignore[misc]
            def __init__(self, listener: object, *arguments: object, **options: object) -> None:
                super().__init__(listener, *arguments, **options)
                servers.append(self)
                names[listener] = self.address

            def do_read(self) -> object:
                if not isinstance(self.socket, Queues):
                    return super().do_read()
                try:
                    client, address = self.socket.accept()
                except BlockingIOError:
                    return None
                return GeventSocket(fileno=client.detach()), address

            def close(self) -> None:
                # close() forgets the handler, which a connection in its TLS handshake still needs.
                handle = self.__dict__.get("handle")
                super().close()
                if handle is not None:
                    self.handle = handle

        gunicorns.serve_by(Server)
        worker.wrap("patch", self._patching)
        self._store.enter(names.__getitem__)
        gunicorns.note_data(self._note_data)
        worker.wrap("handle_exit", self._in_a_greenlet)
        worker.wrap("handle_quit", self._in_a_greenlet)

    def _patching(self, patch: Callable[[], None]) -> Callable[[], None]:
        def patch_but_queues() -> None:
            # It makes gevent's sockets of the listeners: test_gevent_makes_its_own_sockets_of_the_listeners.
            worker = self.worker
            queues = [each for each in worker.sockets if isinstance(each, Queues)]
            worker.set_sockets([each for each in worker.sockets if each not in queues])
            patch()
            worker.set_sockets([*worker.sockets, *queues])

        return patch_but_queues

    def _note_data(self, data: bytes) -> None:
        if not data.isspace():
            self._store.note_reading()

    def _in_a_greenlet(self, handler: Handler) -> Handler:
        # A handler runs in the middle of anything, an accept for example, and in the hub, where a hook must not block.
        def handle(sig: int, frame: FrameType | None) -> None:
            if self.runtime.slot.state == WorkerState.BOOTING:
                handler(sig, frame)
            else:
                gevent.spawn(handler, sig, frame)

        return handle

    def before_load(self) -> None:
        """See `WorkerAdapter`: threads have become greenlets meanwhile, and a lock from before would stop them all."""
        self._main = getcurrent()
        waitgroup.renew_locks()

    def wake(self) -> None:
        """See `WorkerAdapter`."""
        gevent.spawn(self.worker.notify)

    def later(self, seconds: float, function: Callable[..., object], *arguments: object) -> None:
        """See `WorkerAdapter`: a thread would be waited for until it has started."""
        gevent.spawn_later(seconds, function, *arguments)

    def call_stop_hooks(self) -> None:
        """See `WorkerAdapter`: one that blocks is not to keep this greenlet from its turns."""
        gevent.spawn(waitgroup.run_stop_hooks)

    def end_loop(self) -> None:
        """See `WorkerAdapter`: accept no more now; the loop looks once a second: test_gevent_looks_once_a_second."""
        self._stop_accepting()
        self.runtime.accepts_no_more()
        self.worker.end_loop()
        # gunicorn waits for as long as `keepalive` for the next request.
        self.later(LINGER, self._close_idle)

    def in_a_child_of_the_app(self) -> None:
        """See `WorkerAdapter`: the greenlets are there too, and the child's hub would accept connections."""
        # Not `alive`: the main greenlet would end the child in the middle of its work.
        for server in self._servers:
            server.stop_accepting()
        self._store.watch(is_on=False)

    def cut(self) -> None:
        """See `WorkerAdapter`: gunicorn kills the greenlets, whose `post_request` counts them out."""
        if self.runtime.slot.in_flight:
            self.has_cut = True
            self.runtime.requests.stop()

    def frames(self) -> Mapping[int, FrameType]:
        """See `WorkerAdapter`: threads are greenlets, and their `ident` is the greenlet's address."""
        greenlets = (each for each in gc.get_objects() if isinstance(each, gevent.Greenlet))
        return {id(each): each.gr_frame for each in greenlets if each.gr_frame is not None}

    def _close_idle(self) -> None:
        if not self._store.in_loop(self._store.close_all_idle):
            # Requests have arrived, and are about to be read.
            self.later(LOOK_AGAIN, self._close_idle)

    def connection_store(self) -> ConnectionStore[GeventConnection] | None:
        """See `WorkerAdapter`."""
        return self._store

    def leaving(self) -> Leaving | None:
        """See `WorkerAdapter`."""
        found = self.runtime.kept.leaving(self._stop_accepting, None)
        if found is not None:
            gevent.spawn(self._turn_often)
        return found

    def run(self, run: Callable[[], None]) -> None:
        """See `WorkerAdapter`: beside the loop, whose turns are a second apart."""
        turns = gevent.spawn(self._follow_exchange)
        try:
            run()
        finally:
            turns.kill(block=False)

    def _follow_exchange(self) -> None:
        kept = self.runtime.kept
        while os.getpid() == self.runtime.pid:
            self._store.in_loop(kept.turn)
            gevent.sleep(kept.pause() or self.interval)

    def _turn_often(self) -> None:
        # The loop's own turns are a second apart (test_gevent_looks_once_a_second).
        while self.runtime.is_finishing:
            gevent.sleep(TURN)
            self.worker.notify()

    def _stop_accepting(self) -> None:
        for server in self._servers:
            server.close()

    def end_now(self, status: int) -> NoReturn:
        """See `WorkerAdapter`: raised in the main greenlet; elsewhere gunicorn swallows it."""
        assert self._main is not None
        self._main.throw(SystemExit(status))
        raise AssertionError("the main greenlet came back")
