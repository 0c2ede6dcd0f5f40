"""One of gunicorn's workers, in its own process, as zdd_web's runtime uses it.

`WorkerFacade` is all that the runtime knows of it, as `ArbiterFacade` is in the master. What only one worker class has
is in a module of its name: sync.py, gthread.py, gevent.py, asgi.py, uvicorn.py.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gunicorn.http.wsgi import Response as Reply
from gunicorn.workers.base import Worker

from zdd_web.gunicorn.adapter import gthread, sync, versions
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.patches import replace, write

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import App, Handler, Logger, Method, Response, SocketName
    from zdd_web.gunicorn.adapter.protocols import Worker as RawWorker
    from zdd_web.process import Process

#: The methods of a worker that the runtime may take the place of; see patches.py.
Replaceable = Literal[
    "handle_exit",
    "handle_quit",
    "handle_abort",
    "handle_usr1",
    "handle_winch",
    "load_wsgi",
    "run",
    "notify",
    "init_signals",
    "patch",
    "handle",
    "timeout_ctx",
    "_serve",
    "_shutdown",
]

#: The handlers that gunicorn installs in a worker, by the names it looks them up by; see tests/contract:
#: test_worker_installs_these_handlers.
HANDLERS: tuple[Replaceable, ...] = ("handle_exit", "handle_quit", "handle_abort", "handle_usr1", "handle_winch")


class WorkerFacade:
    """The worker of this process. `raw` is gunicorn's object, for the user's hooks alone."""

    def __init__(self, raw: RawWorker) -> None:
        self.raw = raw

    # -- what it knows

    @property
    def cfg(self) -> Config:
        """The configuration that it was forked with."""
        return self.raw.cfg

    @property
    def log(self) -> Logger:
        """gunicorn's logger, of the user's `logger_class`."""
        return self.raw.log

    @property
    def ppid(self) -> int:
        """The pid of the master that has forked it."""
        return self.raw.ppid

    @property
    def timeout(self) -> float:
        """How long its loop waits at most, seconds: half of gunicorn's `timeout`."""
        return self.raw.timeout

    @property
    def family(self) -> str:
        """The family of its class; see versions.py."""
        return versions.family(type(self.raw))

    # -- what is put in its place

    def replace(self, name: Replaceable, new: Method) -> Method:
        """Have gunicorn call `new`; return what it would have called."""
        before: Method = replace(self.raw, name, new)
        return before

    def wrap(self, name: Replaceable, made: Callable[[Method], Method]) -> None:
        """Put `made(method)` in the place of a method."""
        replace(self.raw, name, made(getattr(self.raw, name)))

    def adapt(self, process: Process, hands_over: Callable[[], bool]) -> None:
        """Change what its class does with connections, so that a stop and an upgrade lose none.

        A reply of a worker that leaves closes its connection, unless the worker `hands_over()` what it has.
        """
        _close_connections_when(process.is_leaving, hands_over)
        self._remember_names()
        gthread.adapt(self.raw, process, hands_over)
        sync.adapt(self.raw, process)

    def handle_signals_in_python(self) -> None:
        """Have signals handled as in a sync worker: an event loop's handlers wait while the app is imported."""
        init_signals: Method = Worker.init_signals
        self.replace("init_signals", functools.partial(init_signals, self.raw))

    def take_max_requests(self) -> int:
        """Return after how many requests it wants to be replaced, and keep gunicorn from doing it on its own.

        gunicorn ends such a worker's loop from inside a request, before there is another to take its place.
        """
        limit = self.raw.max_requests
        write(self.raw, "max_requests", sys.maxsize)
        return limit

    def _remember_names(self) -> None:
        # A request asks for a listener's name after it was counted in (test_sync_asks_for_the_name_of_a_listener), and
        # a signal in between may close the listener.
        for listener in self.sockets:
            replace(listener, "getsockname", functools.partial(_same, listener.getsockname()))

    # -- its heartbeat

    @property
    def notify(self) -> Callable[[], None]:
        """What sends its heartbeat at present."""
        return self.raw.notify

    @property
    def plain_notify(self) -> Callable[[], None]:
        """What sends its heartbeat, without what its class adds: one may exit when the master is gone."""
        notify: Method = Worker.notify
        return functools.partial(notify, self.raw)

    @property
    def beats_always(self) -> bool:
        """Whether its heartbeat does not wait for its requests: gthread's loop hands them to threads."""
        return gthread.is_one(self.raw)

    def beat_often(self, interval: float, connected: Callable[[bool], None]) -> None:
        """See `sync.beat_often()`."""
        sync.beat_often(self.raw, interval, connected)

    def lasting_heartbeat(self) -> Callable[[], None]:
        """Return its heartbeat as it is after the loop, when gunicorn has closed the file of it.

        See tests/contract: test_heartbeat_is_closed_before_worker_exit.
        """
        fd = os.dup(self.raw.tmp.fileno())  # stays open until the process ends

        def beat() -> None:
            now = time.monotonic()
            os.utime(fd, (now, now))

        return beat

    # -- its signals

    @property
    def handle_exit(self) -> Handler:
        """What handles SIGTERM at present."""
        return self.raw.handle_exit

    @property
    def handle_usr1(self) -> Handler:
        """What handles SIGUSR1 at present."""
        return self.raw.handle_usr1

    # -- its listeners and its loop

    @property
    def sockets(self) -> Sequence[Any]:
        """What it accepts from."""
        return self.raw.sockets

    def set_sockets(self, sockets: Sequence[Any]) -> None:
        """Have it accept from others."""
        write(self.raw, "sockets", list(sockets))

    @property
    def alive(self) -> bool:
        """Whether its loop is to go on."""
        return bool(self.raw.alive)

    def end_loop(self) -> None:
        """Have its loop end when it next looks."""
        write(self.raw, "alive", False)

    def wake(self) -> None:
        """Make its loop turn now instead of at its next timeout; callable from a signal handler."""
        queue = getattr(self.raw, "method_queue", None)
        if queue is not None:
            queue.defer(lambda: None)
        elif self.raw.PIPE:
            try:
                os.write(self.raw.PIPE[1], b".")
            except BlockingIOError:
                pass

    def set_graceful_timeout(self, seconds: float) -> None:
        """Give its loop that long; gunicorn's own setter takes whole seconds only, which may be too long."""
        self.cfg.settings["graceful_timeout"].value = seconds

    def wind_down(self) -> gthread.WindDown | None:
        """Return how it stops accepting before its loop is ended; None where gunicorn ends a loop as it should."""
        return gthread.WindDown(self.raw) if gthread.WindDown.needed_by(self.raw) else None

    def tell_when_not_accepting(self, tell: Callable[[], None]) -> bool:
        """See `gthread.tell_when_not_accepting()`."""
        return gthread.tell_when_not_accepting(self.raw, tell)

    def accept_nothing(self) -> None:
        """See `sync.accept_nothing()`."""
        sync.accept_nothing(self.raw)

    def pool_threads(self) -> set[threading.Thread]:
        """Return the threads on which a gthread worker answers requests."""
        return set(getattr(getattr(self.raw, "tpool", None), "_threads", ()))

    # -- the app

    @property
    def wsgi(self) -> App:
        """The app, loaded: a WSGI app, or what uvicorn runs."""
        return self.raw.wsgi

    def set_wsgi(self, app: App) -> None:
        """Put another in the place of the app."""
        write(self.raw, "wsgi", app)

    @property
    def asgi(self) -> App:
        """The app, loaded, in gunicorn's own asgi worker."""
        return self.raw.asgi

    def set_asgi(self, app: App) -> None:
        """Put another in the place of the app, in gunicorn's own asgi worker."""
        write(self.raw, "asgi", app)


def _same(name: SocketName) -> SocketName:
    return name


def _close_connections_when(is_leaving: Callable[[], bool], hands_over: Callable[[], bool]) -> None:
    """Have a reply carry `Connection: close` where that holds when its headers are written, in this process.

    That is where `is_leaving()`, which is cheap, and asked for each reply, and not `hands_over()`.

    Not decided when the request begins: the reply may come a minute later. And once for each reply: a later look
    (tests/contract: test_gthread_asks_the_reply_whether_to_close) must find what the headers have announced.
    """
    default_headers: Method = Reply.default_headers

    def headers(response: Response) -> object:
        if is_leaving() and not response.must_close and not hands_over():
            response.force_close()
        return default_headers(response)

    replace(Reply, "default_headers", headers)
