"""The only place that knows which gunicorn this is.

Everything here is a difference between releases, or a name inside gunicorn that is not public. Line references are to
27.0.1. What a release lacks is asked of the object, not of the version number, wherever the object can tell.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import gunicorn
from gunicorn import arbiter, sock, systemd
from gunicorn.config import make_settings
from gunicorn.http.wsgi import Response
from gunicorn.workers import gthread
from gunicorn.workers.gthread import ThreadWorker
from gunicorn.workers.sync import SyncWorker

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.adapter import signal_queue
from zdd_web.system import pauses

OLDEST, BEYOND = (23,), (28,)

#: What to write for `worker_class`.
WORKER_CLASSES = ("sync", "gthread", "gevent", "asgi", "uvicorn_worker.UvicornWorker")

#: Module and class, and the family it belongs to: by name, since a look must not import what is not installed.
FAMILIES = {
    ("gunicorn.workers.sync", "SyncWorker"): "blocking",
    ("gunicorn.workers.gthread", "ThreadWorker"): "blocking",
    ("gunicorn.workers.ggevent", "GeventWorker"): "gevent",
    ("gunicorn.workers.gasgi", "ASGIWorker"): "asgi",
    ("uvicorn_worker._workers", "UvicornWorker"): "uvicorn",
}

INSTEAD = {
    ("gunicorn.workers.ggevent", "GeventPyWSGIWorker"): "it answers past gunicorn; use gevent",
    ("uvicorn.workers", "UvicornWorker"): "install uvicorn-worker and use uvicorn_worker.UvicornWorker",
}


def check_version(version: str = gunicorn.__version__) -> None:
    """Raise `SettingsError` for a gunicorn whose insides this package was not measured against."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not OLDEST <= numbers < BEYOND:
        raise SettingsError(
            f"gunicorn {version} is not supported: install gunicorn>={OLDEST[0]},<{BEYOND[0]}, "
            f"or remove install() from the configuration file to run without zdd_web"
        )


def check_worker_class(cfg: Any) -> None:
    """Raise `SettingsError` for a worker class whose drain and gate this package does not know."""
    family(cfg.worker_class, cfg.worker_class_str)


def family(worker_class: type, written: str = "") -> str:
    """Return the family of a worker class, its own or that of a class it is made from. Raises `SettingsError`."""
    remedy = f"use one of {', '.join(WORKER_CLASSES)}"
    for base in worker_class.__mro__:
        name = base.__module__, base.__qualname__
        if name in FAMILIES:
            return FAMILIES[name]
        if name in INSTEAD:
            remedy = INSTEAD[name]
            break
    raise SettingsError(f"worker_class = {written!r} is not supported: {remedy}")


def normalise_hook(name: str, value: Any) -> Callable[..., Any]:
    """Return a hook of the user as gunicorn would call it.

    A dotted string is imported and the number of arguments checked, by gunicorn itself, with gunicorn's own errors.
    """
    setting = make_settings()[name]
    setting.set(value)
    hook: Callable[..., Any] = setting.get()
    return hook


def set_wait(server: Any, interval: Callable[[], float]) -> None:
    """Make the main loop wake after `interval()` seconds where it would sleep for a whole one.

    24 waits on a queue in `wait_for_signals(timeout)`; 23 sleeps in `sleep()` on a pipe.
    """
    signal_queue.replace(server)
    if hasattr(server, "wait_for_signals"):
        wait = server.wait_for_signals
        server.wait_for_signals = lambda timeout=1.0: wait(timeout=min(timeout, interval()))
        return

    def sleep() -> None:
        reader = server.PIPE[0]
        if select.select([reader], [], [], interval())[0]:
            try:
                while os.read(reader, 1):
                    pass
            except BlockingIOError:
                pass

    server.sleep = sleep


def check_certificates(cfg: Any) -> None:
    """Raise `SettingsError` for TLS files that are not there: found out by the first client otherwise.

    gunicorn looks in `create_sockets()` (sock.py:199), which upgrades and the other listener modes do without.
    """
    for name in ("certfile", "keyfile"):
        path = getattr(cfg, name)
        if path and not os.path.exists(path):
            raise SettingsError(f"{name} = {path!r}: there is no such file: restore it, or name the one to use")


def create_listener(server: Any, address: Any) -> Any:
    """Bind an address and listen, with gunicorn's own tries and errors: it ends the process when it cannot."""

    class Alone:
        address: Any

        def __getattr__(self, name: str) -> Any:
            return getattr(server.cfg, name)

    conf = Alone()
    conf.address = [address]
    (listener,) = sock.create_sockets(conf, server.log)
    listener.conf = server.cfg
    return listener


def adopt_listener(server: Any, fd: int, *, shared: bool = False) -> Any:
    """Wrap a descriptor in gunicorn's socket object (sock.py:180), which takes it over.

    Not by its own `create_sockets()`: that takes the number in `fd://` for a descriptor once more. One of several that
    share a port may be only bound, and stays so. Raises OSError.
    """
    with socket.socket(fileno=os.dup(fd)) as look:
        name = look.getsockname()
        is_bound_only = shared and not look.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    # An abstract Unix socket's is bytes.
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    kind = sock._sock_type(name)
    if is_bound_only:
        listener = _unmade(kind, server, name)
        listener.sock = socket.socket(fileno=fd)
        listener.sock.setblocking(False)
        return listener
    adopted = kind(name, server.cfg, server.log, fd=fd)
    # gunicorn makes it inheritable, by whatever the app starts too; a successor is given it by number.
    adopted.sock.set_inheritable(False)
    return adopted


def _unmade(kind: Any, server: Any, address: Any) -> Any:
    # gunicorn's constructor listens at once (sock.py:61): what is done here is the rest of it.
    listener = kind.__new__(kind)
    listener.log, listener.conf, listener.cfg_addr = server.log, server.cfg, address
    return listener


def bind_listener(server: Any, address: Any, *, shared: bool = False) -> Any:
    """Bind an address, which others may share, and do not listen yet. Raises OSError."""
    kind = sock._sock_type(address)
    listener = _unmade(kind, server, address)
    made = socket.socket(kind.FAMILY, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind.FAMILY != socket.AF_UNIX:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if isinstance(address, str) and address.startswith("\0"):
            # gunicorn before 27 would change the owner of a file that there is not.
            made.bind(address)
        else:
            listener.bind(made)
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    listener.sock = made
    return listener


def take_stock_inheritance() -> list[int]:
    """Take the descriptors that a gunicorn without zdd_web hands to its successor (arbiter.py:201)."""
    text = os.environ.pop("GUNICORN_FD", "")
    return [int(fd) for fd in text.split(",") if fd]


def has_stock_predecessor(server: Any) -> bool:
    """Tell whether the listeners are those of a gunicorn without zdd_web that was sent USR2, and serves on."""
    # A predecessor with zdd_web has taken GUNICORN_PID out.
    return bool(server.master_pid != 0 and server.master_pid == os.getppid())


def tell_exits(tell: Callable[[int, int], None]) -> None:
    """Have `tell(pid, status)` called for each child that gunicorn reaps, before it forgets the status.

    No hook is given it, and a look at the children before gunicorn's reaper runs misses whoever ends in between.
    """

    class Telling(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        @staticmethod
        def waitpid(pid: int, options: int) -> tuple[int, int]:
            found, status = os.waitpid(pid, options)
            if found:
                tell(found, status)
            return found, status

    vars(arbiter)["os"] = Telling("os")


def discount_pauses(worker: Any) -> None:
    """Have gunicorn's `murder_workers()` (arbiter.py:612) not count the time in which this master itself was paused.

    It compares the monotonic clock with what `last_update()` returns, in the master's own copy of the worker.
    """
    last_update = worker.tmp.last_update
    worker.tmp.last_update = lambda: time.monotonic() - pauses.since(int(last_update() * 1e9))


def silence_systemd() -> None:
    """Keep the arbiter from telling systemd READY=1 before a worker exists (arbiter.py:210)."""

    class Silent(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(systemd, name)

        @staticmethod
        def sd_notify(*said: Any, **options: Any) -> None:
            pass

    vars(arbiter)["systemd"] = Silent("gunicorn.systemd")


def suspend_control_server(server: Any) -> None:
    """Close gunicorn's control socket (25.1 and later).

    Two masters on one path do not go together: the newer steals it, the older deletes it when it ends.
    """
    if getattr(server, "_control_server", None) is not None:
        server._stop_control_server()


def hold_control_server(server: Any) -> None:
    """Keep a new generation from opening the control socket before it is in office."""
    if hasattr(server, "_start_control_server"):
        server._start_control_server = lambda: None


def resume_control_server(server: Any) -> None:
    """Open the control socket, now that this generation is in office."""
    server.__dict__.pop("_start_control_server", None)
    if hasattr(server, "_start_control_server") and getattr(server, "_control_server", None) is None:
        server._start_control_server()


def call_pre_exec(server: Any) -> tuple[dict[str, str], set[str]]:
    """Call the user's `pre_exec` as gunicorn does (arbiter.py:513): in the child that is about to exec.

    Returns the variables that it has set in `cfg.env_orig`, of which gunicorn makes the environment, and the names of
    those that it has removed.
    """
    environ = server.cfg.env_orig
    before = dict(environ)
    server.cfg.pre_exec(server)
    return {key: value for key, value in environ.items() if before.get(key) != value}, before.keys() - environ.keys()


def ignore_signals(server: Any) -> None:
    """Have a master that has ended its loop ignore the signals that gunicorn would queue for it."""
    for sig in server.SIGNALS:
        signal.signal(sig, signal.SIG_IGN)


def take_queued_signals(server: Any) -> list[int]:
    """Return the signals that the loop has not handled yet, and empty its queue: a list up to 23."""
    queue = server.SIG_QUEUE
    taken: list[int] = []
    if isinstance(queue, list):
        taken, queue[:] = list(queue), []
        return taken
    while not queue.empty():
        taken.append(queue.get_nowait())
    return taken


def wake(worker: Any) -> None:
    """Make a worker's loop come round now instead of at its next timeout."""
    queue = getattr(worker, "method_queue", None)
    if queue is not None:
        queue.defer(lambda: None)
    elif worker.PIPE:
        try:
            os.write(worker.PIPE[1], b".")
        except BlockingIOError:
            pass


def beats_always(worker: Any) -> bool:
    """Tell whether a worker's heartbeat does not wait for its requests: gthread's loop hands them to threads."""
    return isinstance(worker, ThreadWorker)


def beat_often(worker: Any, interval: float, connected: Callable[[bool], None]) -> None:
    """Have a sync worker that waits send a heartbeat each `interval` seconds, as workers of all other classes do.

    Its own interval is half of `timeout` (sync.py:114). It sends none while it has a connection in hand, also while it
    waits for the client's request: `connected()` is told when that begins and ends.
    """
    if not isinstance(worker, SyncWorker):
        return
    # With `timeout = 0` it is half a second.
    worker.timeout = min(worker.timeout, interval)
    handle: Callable[[Any, Any, Any], None] = worker.handle

    def handle_connected(listener: Any, client: Any, address: Any) -> None:
        connected(True)
        try:
            handle(listener, client, address)
        finally:
            connected(False)

    worker.handle = handle_connected  # type: ignore[method-assign]


def set_graceful_timeout(worker: Any, seconds: float) -> None:
    """Give a worker's loop that long; gunicorn's own setter takes whole seconds only, which may be too long."""
    worker.cfg.settings["graceful_timeout"].value = seconds


def remember_names(worker: Any) -> None:
    """Have a worker's listeners know their names by heart.

    A request asks for the name after it was counted in (sync.py:175), and a signal in between may close the listener.
    """
    for listener in worker.sockets:
        name = listener.getsockname()
        listener.getsockname = lambda name=name: name


def accept_nobody(worker: Any) -> None:
    """Have a sync worker that was interrupted in a request find nobody on the listeners that are closed meanwhile.

    With several of them it asks the next one before it looks whether it shall go on (sync.py:97).
    """

    def nobody(listener: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "closed")

    worker.accept = nobody


class WindDown:
    """How a gthread worker before 27.0.1 stops without dropping connections; asked once a turn of its loop.

    Those close what they hold the moment they are told to stop: kept connections whose next request is on its way,
    up to 23 even accepted ones that were not read yet. So the worker is not told at first: it stops accepting, its
    replies close their connections, and only when none is left, or those that are left have been idle for as long as
    27.0.1 lingers, the loop is ended.
    """

    LINGER = 2.0

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._since: float | None = None

    @classmethod
    def needed_by(cls, worker: Any) -> bool:
        """Tell whether a worker keeps connections and does not linger by itself."""
        return isinstance(worker, ThreadWorker) and not hasattr(gthread, "STOP_KEEPALIVE_LINGER")

    def over(self) -> bool:
        """Stop accepting at the first call; tell whether the loop may be ended."""
        if self._since is None:
            self._since = time.monotonic()
            stop_accepting(self._worker)
        return self._worker.nr_conns == 0 or time.monotonic() - self._since >= self.LINGER


def stop_accepting(worker: Any) -> None:
    """Have a gthread worker accept nothing more, although its loop goes on."""
    if hasattr(worker, "set_accept_enabled"):
        worker.set_accept_enabled(False)
        # The loop would enable it again at its next turn (gthread.py:422).
        worker.set_accept_enabled = lambda enabled: None
        return
    for listener in worker.sockets:
        worker.poller.unregister(listener)


def end_by_signal_alone(worker: Any) -> None:
    """Keep a gthread worker before 27.0.1 from breaking its loop off when its master is gone (gthread.py:427).

    It would drop what it holds. The kernel sends it SIGTERM then, and it winds down.
    """
    if WindDown.needed_by(worker):
        worker.is_parent_alive = lambda: True


def tell_when_not_accepting(worker: Any, tell: Callable[[], None]) -> bool:
    """Have `tell()` called when a gthread worker that was told to stop accepts no more (gthread.py:435).

    False for a worker that has no such moment. Its loop may still be about to accept what it was woken for before.
    """
    if not hasattr(worker, "set_accept_enabled"):
        return False
    set_accept_enabled = worker.set_accept_enabled

    def then_tell(enabled: bool) -> None:
        set_accept_enabled(enabled)
        if not enabled and not worker.alive:
            tell()

    worker.set_accept_enabled = then_tell
    return True


def pool_threads(worker: Any) -> set[threading.Thread]:
    """Return the threads on which a gthread worker answers requests."""
    return set(getattr(getattr(worker, "tpool", None), "_threads", ()))


def lasting_heartbeat(worker: Any) -> Callable[[], None]:
    """Return a worker's heartbeat as it is after the loop, when gunicorn has closed the file of it (arbiter.py:772)."""
    fd = os.dup(worker.tmp.fileno())  # stays open until the process ends

    def beat() -> None:
        now = time.monotonic()
        os.utime(fd, (now, now))

    return beat


def take_max_requests(worker: Any) -> int:
    """Return after how many requests a worker wants to be replaced, and keep gunicorn from doing it on its own.

    gunicorn ends such a worker's loop from inside a request, before there is another to take its place.
    """
    limit: int = worker.max_requests
    worker.max_requests = sys.maxsize
    return limit


def close_connections_when(leaving: Callable[[], bool]) -> None:
    """Have a reply carry `Connection: close` if `leaving()` is true when its headers are written, in this process.

    Not decided when the request begins: the reply may come a minute later. And once for each reply: a later look
    (gthread.py:786) must find what the headers have announced.
    """
    reply: Any = Response
    default_headers = reply.default_headers

    def headers(response: Any) -> Any:
        if not response.must_close and leaving():
            response.force_close()
        return default_headers(response)

    reply.default_headers = headers
