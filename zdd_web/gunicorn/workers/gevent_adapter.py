"""gevent: the loop turns in the hub, where nothing may block; threads are greenlets."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import gevent
from gevent import getcurrent
from gevent.server import StreamServer
from gevent.socket import socket as GeventSocket  # noqa: N812 - a class
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import ggevent
from gunicorn.workers.base import Worker

from zdd_web import waitgroup
from zdd_web.board import WorkerState
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.base import LINGER, WorkerAdapter, on_board
from zdd_web.listeners.reuseport.queues import Queues


class GeventAdapter(WorkerAdapter):
    """gunicorn.workers.ggevent.GeventWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        # The class's own exits when the master is gone (ggevent.py:53), with what is in hand; the kernel sends SIGTERM.
        self.beat = on_board(functools.partial(Worker.notify, self.worker), runtime.slot)
        self._servers: list[Any] = []
        self._idle: dict[Any, _Idle] = {}
        self._main: Any = None

    def enter(self) -> None:
        """See `WorkerAdapter`."""
        super().enter()
        worker, servers = self.worker, self._servers
        names: dict[Any, _Named] = {}

        class Server(StreamServer):  # type: ignore[misc]
            def __init__(self, listener: Any, *arguments: Any, **options: Any) -> None:
                super().__init__(listener, *arguments, **options)
                servers.append(self)
                names[listener] = _Named(self.address)

            def do_read(self) -> Any:
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

        ggevent.StreamServer = Server  # type: ignore[attr-defined]
        worker.patch = self._patch
        handle = worker.handle
        # It asks the listener for its name in a greenlet of its own (base_async.py:75), where that may be closed.
        worker.handle = lambda listener, client, addr: handle(names[listener], client, addr)
        worker.timeout_ctx = lambda: _Idle(worker.cfg.keepalive, self._idle)
        self._note_heads()
        worker.handle_exit = self._in_a_greenlet(worker.handle_exit)
        worker.handle_quit = self._in_a_greenlet(worker.handle_quit)

    def _patch(self) -> None:
        # It makes gevent's sockets of the listeners (ggevent.py:40).
        worker = self.worker
        queues = [each for each in worker.sockets if isinstance(each, Queues)]
        worker.sockets = [each for each in worker.sockets if each not in queues]
        type(worker).patch(worker)
        worker.sockets += queues

    def _note_heads(self) -> None:
        unreader: Any = SocketUnreader
        read = unreader.chunk

        def read_and_note(self_: Any, *arguments: Any) -> Any:
            data = read(self_, *arguments)
            idle = self._idle.get(getcurrent())
            if idle is not None and not data.isspace():
                idle.is_reading = True
            return data

        unreader.chunk = read_and_note

    def _in_a_greenlet(self, handler: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        # A handler runs in the middle of anything, an accept for example, and in the hub, where a hook must not block.
        def handle(sig: int, frame: Any) -> None:
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
        """See `WorkerAdapter`: accept no more at once; the loop takes a second until it looks (ggevent.py:85)."""
        for server in self._servers:
            server.close()
        self.runtime.accepts_no_more()
        self.worker.alive = False
        # gunicorn waits for as long as `keepalive` for the next request.
        self.later(LINGER, self._close_idle)

    def in_a_child_of_the_app(self) -> None:
        """See `WorkerAdapter`: the greenlets are there too, and the child's hub would accept connections."""
        # Not `alive`: the main greenlet would end the child in the middle of its work.
        for server in self._servers:
            server.stop_accepting()

    def cut(self) -> None:
        """See `WorkerAdapter`: gunicorn kills the greenlets (ggevent.py:107), whose `post_request` counts them out."""
        if self.runtime.slot.in_flight:
            self.has_cut = True
            self.runtime.requests.stop()

    def frames(self) -> Mapping[int, FrameType]:
        """See `WorkerAdapter`: threads are greenlets, and their `ident` is the greenlet's address."""
        greenlets = (each for each in gc.get_objects() if isinstance(each, gevent.Greenlet))
        return {id(each): each.gr_frame for each in greenlets if each.gr_frame is not None}

    def _close_idle(self) -> None:
        for idle in list(self._idle.values()):
            gevent.get_hub().loop.run_callback(idle.end)

    def end_now(self, status: int) -> NoReturn:
        """See `WorkerAdapter`: raised in the main greenlet; elsewhere gunicorn swallows it (base_async.py:127)."""
        self._main.throw(SystemExit(status))
        raise AssertionError("the main greenlet came back")


class _Named:
    """A listener of which only the name is left."""

    def __init__(self, name: Any) -> None:
        self._name = name

    def getsockname(self) -> Any:
        return self._name


class _Idle(gevent.Timeout):  # type: ignore[misc]
    """The wait for a request on a connection, which can be ended before its time, unless the request has begun."""

    def __init__(self, seconds: float, waiting: dict[Any, _Idle]) -> None:
        super().__init__(seconds, False)
        self._waiting = waiting
        self._greenlet: Any = None
        #: A part of the request's head has arrived.
        self.is_reading = False

    def __enter__(self) -> _Idle:
        self._greenlet = getcurrent()
        self._waiting[self._greenlet] = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        self._waiting.pop(self._greenlet, None)
        return super().__exit__(*error)

    def end(self) -> None:
        """Run in the hub, where nothing can come in between."""
        if self._waiting.get(self._greenlet) is self and not self.is_reading:
            self._greenlet.throw(self)
