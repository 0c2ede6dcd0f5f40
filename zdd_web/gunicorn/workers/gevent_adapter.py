"""gevent: the loop turns in the hub, where nothing may block; threads are greenlets."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import gevent
from gevent import getcurrent
from gevent.server import StreamServer
from gevent.socket import socket as GeventSocket  # noqa: N812 - a class

from zdd_web import waitgroup
from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter import gevent as gunicorns
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.base import LINGER, WorkerAdapter, on_board
from zdd_web.listeners.reuseport.queues import Queues


class GeventAdapter(WorkerAdapter):
    """gunicorn.workers.ggevent.GeventWorker."""

    def __init__(self, runtime: AdaptedWorker) -> None:
        super().__init__(runtime)
        # The class's own exits when the master is gone (test_gevent_exits_when_its_master_is_gone), with what is in
        # hand; the kernel sends SIGTERM.
        self.beat = on_board(self.worker.plain_notify, runtime.slot)
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

        gunicorns.serve_by(Server)
        worker.wrap("patch", self._patching)
        # It asks the listener for its name in a greenlet of its own (test_gevent_asks_for_the_name_of_a_listener),
        # where that may be closed.
        worker.wrap("handle", lambda handle: lambda listener, client, addr: handle(names[listener], client, addr))
        worker.replace("timeout_ctx", lambda: _Idle(worker.cfg.keepalive, self._idle))
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
        idle = self._idle.get(getcurrent())
        if idle is not None and not data.isspace():
            idle.is_reading = True

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
        """See `WorkerAdapter`: accept no more now; the loop looks once a second: test_gevent_looks_once_a_second."""
        for server in self._servers:
            server.close()
        self.runtime.accepts_no_more()
        self.worker.end_loop()
        # gunicorn waits for as long as `keepalive` for the next request.
        self.later(LINGER, self._close_idle)

    def in_a_child_of_the_app(self) -> None:
        """See `WorkerAdapter`: the greenlets are there too, and the child's hub would accept connections."""
        # Not `alive`: the main greenlet would end the child in the middle of its work.
        for server in self._servers:
            server.stop_accepting()

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
        for idle in list(self._idle.values()):
            gevent.get_hub().loop.run_callback(idle.end)

    def end_now(self, status: int) -> NoReturn:
        """See `WorkerAdapter`: raised in the main greenlet; elsewhere gunicorn swallows it."""
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
