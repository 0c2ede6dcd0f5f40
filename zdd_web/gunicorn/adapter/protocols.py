"""The objects of gunicorn and of its worker classes, as far as this package reads them: for type checkers alone.

gunicorn has no types of its own. What is here exists in every supported release, unless a class says otherwise; what
only some have is looked for with `hasattr()`. Writing needs a row in patches.py. No module imports this one at run
time.
"""

from __future__ import annotations

import asyncio
import io
import selectors
import socket
from collections import deque
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from zdd_web.gunicorn.adapter.config import Config

if TYPE_CHECKING:
    import uvicorn

#: What Python calls at a signal.
Handler: TypeAlias = Callable[[int, FrameType | None], None]

#: A WSGI or an ASGI app.
App: TypeAlias = Callable[..., Any]

#: A method that is called with whatever gunicorn calls it with, and whose result is passed on.
Method: TypeAlias = Callable[..., Any]

#: An address as `getsockname()` returns it.
SocketName: TypeAlias = Any


class Logger(Protocol):
    """gunicorn's logger, or one of the user's that has its methods."""

    def critical(self, msg: str, *args: object) -> None: ...

    def error(self, msg: str, *args: object) -> None: ...

    def warning(self, msg: str, *args: object) -> None: ...

    def info(self, msg: str, *args: object) -> None: ...

    def debug(self, msg: str, *args: object) -> None: ...

    def reopen_files(self) -> None: ...


class Listener(Protocol):
    """`gunicorn.sock.BaseSocket`; `sock` is None once it is closed."""

    FAMILY: socket.AddressFamily
    sock: socket.socket

    def bind(self, sock: socket.socket) -> None: ...

    def getsockname(self) -> SocketName: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class SignalQueue(Protocol):
    """What stands in for gunicorn's `queue.SimpleQueue` (signal_queue.py)."""

    def has(self, item: int) -> bool: ...

    def empty(self) -> bool: ...

    def get_nowait(self) -> int: ...


class Arbiter(Protocol):
    """`gunicorn.arbiter.Arbiter`, once it has read its configuration."""

    cfg: Config
    log: Logger
    app: Application
    pid: int
    SIGNALS: Sequence[int]
    WORKERS: Mapping[int, object]
    num_workers: int
    worker_age: int
    master_pid: int
    reexec_pid: int
    proc_name: str
    #: Up to 23 a list, and its loop waits on a pipe.
    SIG_QUEUE: list[int] | SignalQueue
    PIPE: Sequence[int]
    #: From 25.1 on, as the next two.
    _control_server: object | None

    def _start_control_server(self) -> None: ...

    def _stop_control_server(self) -> None: ...

    def spawn_worker(self) -> None: ...

    def kill_worker(self, pid: int, sig: int) -> None: ...

    def kill_workers(self, sig: int) -> None: ...

    def reap_workers(self) -> None: ...

    def stop(self) -> None: ...

    def handle_term(self) -> None: ...

    def setup(self, app: Application) -> None: ...


class Application(Protocol):
    """`gunicorn.app.base.Application`."""

    cfg: Config

    def load(self) -> App: ...

    def wsgi(self) -> App: ...

    def reload(self) -> None: ...


class HeartbeatFile(Protocol):
    """`gunicorn.workers.workertmp.WorkerTmp`."""

    def fileno(self) -> int: ...

    def last_update(self) -> float: ...


class Worker(Protocol):
    """`gunicorn.workers.base.Worker`."""

    cfg: Config
    log: Logger
    pid: int
    ppid: int
    age: int
    timeout: float
    alive: bool
    max_requests: int
    sockets: Sequence[Any]
    wsgi: App
    tmp: HeartbeatFile
    PIPE: Sequence[int]
    #: gthread's alone.
    poller: selectors.BaseSelector
    #: The app, in gunicorn's `asgi` worker alone.
    asgi: App
    #: uvicorn's alone.
    config: uvicorn.Config

    def notify(self) -> None: ...

    def run(self) -> None: ...

    def handle_exit(self, sig: int, frame: FrameType | None) -> None: ...

    def handle_usr1(self, sig: int, frame: FrameType | None) -> None: ...

    def handle(self, listener: object, client: socket.socket, addr: SocketName) -> None:
        """Serve one connection, in sync and gevent."""


class SyncWorker(Worker, Protocol):
    """`gunicorn.workers.sync.SyncWorker`."""

    #: What it waits for, each with a `fileno()` and an `accept()`.
    wait_fds: MutableSequence[object]

    def wait(self, timeout: float) -> object: ...


class Unreader(Protocol):
    """`gunicorn.http.unreader.Unreader`: what was read from a connection and not parsed."""

    buf: io.BytesIO


class Parser(Protocol):
    """`gunicorn.http.parser.Parser`; it counts a request when it begins to read it."""

    req_count: int
    unreader: Unreader


class GthreadConnection(Protocol):
    """`gunicorn.workers.gthread.TConn`; `timeout` is on the monotonic clock."""

    sock: socket.socket
    server: SocketName
    timeout: float
    data_ready: bool
    initialized: bool
    parser: Parser | None

    def close(self) -> None: ...


class CallQueue(Protocol):
    """`gunicorn.workers.gthread.PollableMethodQueue`."""

    def defer(self, callback: Callable[..., object], *args: object) -> None: ...

    def close(self) -> None: ...


class GthreadWorker(Worker, Protocol):
    """`gunicorn.workers.gthread.ThreadWorker`; from 24 on, all but `nr_conns` and the last three."""

    nr_conns: int
    worker_connections: int
    max_keepalived: int
    keepalived_conns: deque[GthreadConnection]
    #: From 25.3 on: those that have sent nothing yet.
    pending_conns: deque[GthreadConnection]
    set_accept_enabled: Callable[[bool], None]
    on_client_socket_readable: Callable[[GthreadConnection, socket.socket], None]
    on_pending_socket_readable: Callable[[GthreadConnection, socket.socket], None]
    wait_for_and_dispatch_events: Callable[[float], None]
    murder_pending: Callable[[], None]
    #: From 25.3 on.
    handle_http2: Callable[[GthreadConnection], object]
    #: Up to 23 called with `force`, up to 27 with other arguments.
    murder_keepalived: Callable[..., None]
    finish_request: Callable[..., None]

    def is_parent_alive(self) -> bool: ...


class GeventPool(Protocol):
    """`gevent.pool.Pool`."""

    size: int

    def spawn(self, function: Callable[..., object], *arguments: object) -> object: ...

    def free_count(self) -> int: ...


class GeventServer(Protocol):
    """`gevent.server.StreamServer`."""

    pool: GeventPool

    def stop_accepting(self) -> None: ...

    def close(self) -> None: ...


class Greenlet(Protocol):
    """`greenlet.greenlet`."""

    def throw(self, error: BaseException) -> None: ...


class Watcher(Protocol):
    """What gevent's loop has for a descriptor."""

    def start(self, callback: Callable[[], object]) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class AsyncioProtocol(asyncio.Protocol):
    """One connection of an asyncio worker class."""

    #: None while it is being made, and in its TLS handshake.
    transport: asyncio.Transport | None


class AsgiProtocol(AsyncioProtocol):
    """`gunicorn.asgi.protocol.ASGIProtocol`; 25 and later."""

    #: zdd_web's: a part of a request's head has arrived.
    head_begun: bool
    req_count: int
    #: None in HTTP/2, and set from the end of a head to the end of its reply.
    _request_ready: asyncio.Event | None
    #: HTTP/2's.
    reader: object | None
    _closed: bool
    _current_request: object | None
    _websocket: object | None
    _reading_paused: bool
    _keepalive_handle: asyncio.TimerHandle | None

    def _cancel_keepalive_timer(self) -> None: ...

    def _keepalive_timeout(self) -> None: ...


class UvicornCycle(Protocol):
    """uvicorn's `RequestResponseCycle`."""

    scope: Mapping[str, object]
    response_complete: bool
    more_body: bool


class UvicornFlow(Protocol):
    """uvicorn's `FlowControl`."""

    read_paused: bool


class UvicornProtocol(AsyncioProtocol):
    """What uvicorn's two HTTP protocols have in common."""

    cycle: UvicornCycle | None
    flow: UvicornFlow | None
    #: httptools' alone: a request has made it with its first byte.
    scope: Mapping[str, object] | None
    timeout_keep_alive_task: asyncio.TimerHandle | None

    def timeout_keep_alive_handler(self) -> None: ...

    def _unset_keepalive_if_required(self) -> None: ...


class Request(Protocol):
    """`gunicorn.http.message.Request`, as far as it is counted."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    peer_addr: SocketName
    req_number: int


class Response(Protocol):
    """`gunicorn.http.wsgi.Response`."""

    must_close: bool
    status_code: int | None

    def force_close(self) -> None: ...
