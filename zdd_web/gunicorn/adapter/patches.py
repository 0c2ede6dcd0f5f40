"""Every attribute of gunicorn's objects that this package replaces or writes: the whole of it, as one table.

Nothing outside this module assigns to an attribute of the arbiter, of a worker, or of one of gunicorn's classes and
modules: `replace()` and `write()` do, and refuse a name that has no row here. `check()` compares the rows with the
gunicorn that is installed, before the arbiter runs: a release that has renamed a method, or calls it with other
arguments, ends the start with one line instead of the service at some later moment.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.adapter.versions import BEYOND, INSTALLED, OLDEST, numbers

Version: TypeAlias = tuple[int, ...]


class Patch(NamedTuple):
    """One attribute: `owner` is the module or class of gunicorn that has it, `why` is what it is replaced for.

    `takes` are the signatures with which the replacement can stand in, as `inspect.signature()` prints them; empty for
    a value, which is written and not called. `since` and `until` are the first gunicorn that has the attribute, and the
    first that has it no more.
    """

    owner: str
    name: str
    why: str
    takes: tuple[str, ...] = ()
    since: Version = OLDEST
    until: Version = BEYOND

    @property
    def label(self) -> str:
        """`Arbiter.stop`, or `gunicorn.util.close_graceful`."""
        last = self.owner.rpartition(".")[2]
        return f"{last if last[:1].isupper() else self.owner}.{self.name}"

    @property
    def module(self) -> str:
        """The module in which the owner is, or which it is."""
        head, _, last = self.owner.rpartition(".")
        return head if last[:1].isupper() else self.owner

    def exists_in(self, version: str) -> bool:
        """Tell whether this gunicorn is expected to have the attribute."""
        return self.since <= numbers(version) < self.until


def _methods(
    owner: str, takes: str | tuple[str, ...], why: str, *names: str, since: Version = OLDEST, until: Version = BEYOND
) -> list[Patch]:
    accepted = (takes,) if isinstance(takes, str) else takes
    return [Patch(owner, name, why, accepted, since, until) for name in names]


def _values(owner: str, why: str, *names: str, since: Version = OLDEST, until: Version = BEYOND) -> list[Patch]:
    return [Patch(owner, name, why, (), since, until) for name in names]


_ARBITER, _WORKER = "gunicorn.arbiter.Arbiter", "gunicorn.workers.base.Worker"
_SYNC, _GTHREAD = "gunicorn.workers.sync.SyncWorker", "gunicorn.workers.gthread.ThreadWorker"
_GEVENT, _ASGI = "gunicorn.workers.ggevent.GeventWorker", "gunicorn.workers.gasgi.ASGIWorker"
_CONNECTION, _PROTOCOL = "gunicorn.workers.gthread.TConn", "gunicorn.asgi.protocol.ASGIProtocol"
_QUEUE, _SOCKET = "gunicorn.workers.gthread.PollableMethodQueue", "gunicorn.sock.BaseSocket"
_APPLICATION, _UVICORN = "gunicorn.app.base.Application", "uvicorn_worker._workers.UvicornWorker"

#: All of them. A row is the place to look first when a new gunicorn is out.
PATCHES: tuple[Patch, ...] = (
    # -- the master's loop
    *_methods(_ARBITER, "(self)", "called once a turn: the master's tick", "maybe_promote_master"),
    *_methods(_ARBITER, "(self)", "spawns, retires, drains and ends by the roster's plan", "manage_workers"),
    *_methods(_ARBITER, "(self)", "the probe process is not gunicorn's to reap", "reap_workers"),
    *_methods(_ARBITER, "(self, graceful=True)", "closes listeners in our order", "stop"),
    *_methods(_ARBITER, "(self, reason=None, exit_status=0)", "ends in time beside threads of the app", "halt"),
    *_methods(
        _ARBITER, "(self)", "what each signal means to a generation",
        "handle_term", "handle_int", "handle_quit", "handle_hup", "handle_usr1", "handle_usr2", "handle_winch",
        "handle_ttin", "handle_ttou",
    ),
    *_methods(_ARBITER, "(self, timeout=1.0)", "turns faster while something is under way", "wait_for_signals",
              since=(24,)),
    *_methods(_ARBITER, "(self)", "turns faster while something is under way", "sleep", until=(24,)),
    *_methods(_ARBITER, "(self)", "one master at a time has the control socket", "_start_control_server",
              since=(25, 1)),
    *_values(_ARBITER, "a queue whose timeout always ends", "SIG_QUEUE"),
    *_values(_ARBITER, "these exit statuses of a worker do not end the service", "WORKER_BOOT_ERROR", "APP_LOAD_ERROR"),
    *_values(_ARBITER, "the pid file is replaced in one step, and names the active master", "pidfile"),
    *_values(_ARBITER, "the listeners are made, adopted and closed by zdd_web", "LISTENERS", "systemd"),
    *_values(_ARBITER, "stop() unlinks no socket file that another master uses", "reexec_pid", "master_pid"),
    *_values(_ARBITER, "no more workers than the board has slots", "num_workers"),
    *_values(_ARBITER, "log lines also go to the predecessor's operator", "log"),
    *_values("gunicorn.arbiter", "waitpid() is the only place where a child's exit status is known", "os"),
    *_values("gunicorn.arbiter", "READY=1 is sent when workers serve", "systemd"),
    # -- the app, in the master
    *_methods(_APPLICATION, "(self)", "--check-config examines our settings too", "run", "load"),
    *_methods(_APPLICATION, "(self)", "says that preload_app is importing", "wsgi"),
    *_values(_APPLICATION, "the proof of a reload, and the way back from one", "cfg", "callable"),
    # -- every worker
    *_methods(_WORKER, "(self, sig, frame)", "a worker leaves in the order that loses nothing",
              "handle_exit", "handle_quit", "handle_abort", "handle_usr1"),
    *_methods(_WORKER, "(self, sig, fname)", "not in processes that the app forks", "handle_winch"),
    *_methods(_WORKER, "(self)", "the boot is reported step by step", "load_wsgi"),
    *_methods(_WORKER, "(self)", "background work and threads are waited for after the loop", "run"),
    *_methods(_WORKER, "(self)", "beats on the board, and follows the master's orders", "notify"),
    *_methods(_WORKER, "(self)", "signals are handled while the app is imported", "init_signals"),
    *_values(_WORKER, "ends the loop", "alive"),
    *_values(_WORKER, "a worker is replaced before it ends", "max_requests"),
    *_values(_WORKER, "the gate and the counters stand in front of the app", "wsgi"),
    *_values(_WORKER, "each worker has its own queue in reuseport mode", "sockets"),
    *_values(_WORKER, "a sync worker that waits beats each second", "timeout"),
    *_methods("gunicorn.workers.workertmp.WorkerTmp", "(self)", "time in which the master was paused does not count",
              "last_update"),
    *_values(_SOCKET, "a request asks for the name of a listener that may be closed", "getsockname"),
    *_values(_SOCKET, "a socket that is bound and does not listen yet", "sock", "log", "conf", "cfg_addr"),
    *_methods("gunicorn.http.wsgi.Response", "(self)", "a leaving worker's replies close their connections",
              "default_headers"),
    *_methods("gunicorn.util", "(sock, timeout=2.0, max_drain=65536)", "closing does not hold up the loop",
              "close_graceful", since=(26,)),
    # -- sync
    *_methods(_SYNC, "(self, listener)", "a worker that leaves finds no connection on closed listeners", "accept"),
    *_methods(_SYNC, "(self, timeout)", "connections that are being closed are looked after", "wait"),
    *_methods(_SYNC, "(self, listener, client, addr)", "a silent connection does not hold up a stop", "handle"),
    # -- gthread
    *_methods(_GTHREAD, "(self, enabled)", "tells when nothing more is accepted", "set_accept_enabled", since=(24,)),
    *_methods(_GTHREAD, "(self)", "finishes what it has when its master is gone", "is_parent_alive"),
    *_methods(_GTHREAD, ("(self)", "(self, force=False)"), "reads before it closes", "murder_keepalived"),
    *_methods(_GTHREAD, "(self)", "a silent connection does not hold up a stop", "murder_pending", since=(25, 3)),
    *_methods(_GTHREAD, "(self, timeout)", "beats while it waits for the last replies", "wait_for_and_dispatch_events",
              since=(24,)),
    *_methods(_GTHREAD, ("(self, fs)", "(self, conn, fs)"), "closing sends the whole reply", "finish_request"),
    *_methods(_CONNECTION, ("(self)", "(self, graceful=False)"), "closing sends the whole reply", "close"),
    *_methods(_CONNECTION, "(self, timeout)", "a silent connection does not hold up a stop", "wait_for_data",
              since=(25, 3)),
    *_values(_CONNECTION, "a silent connection does not hold up a stop", "data_ready", "timeout"),
    *_methods(_GTHREAD, "(self, conn)", "HTTP/2 connections end with the loop", "handle_http2", since=(25, 3)),
    *_values(_GTHREAD, "kept connections come and go by the exchange", "nr_conns", since=(24,)),
    *_methods(_QUEUE, "(self)", "its descriptor's number may be another file's later", "close", since=(24,)),
    *_methods(_QUEUE, "(self, callback, *args)", "wakes its loop once for many calls, and never once closed", "defer",
              since=(24,)),
    # -- gevent
    *_methods(_GEVENT, "(self)", "queues of reuseport mode are not gevent's sockets", "patch"),
    *_methods(_GEVENT, "(self, listener, client, addr)", "the listener's name outlives the listener", "handle"),
    *_methods(_GEVENT, "(self)", "idle connections are closed in a worker that leaves", "timeout_ctx"),
    *_values("gunicorn.workers.ggevent", "accepts from queues, and closes in our order", "StreamServer"),
    *_methods("gunicorn.http.unreader.SocketUnreader", ("(self)", "(self, size_hint=None)"),
              "a head that has begun is a request in hand", "chunk"),
    *_values("gunicorn.http", "kept connections come and go by the exchange", "get_parser", since=(24,)),
    # -- asgi and uvicorn. No `since`: before 25.3 the protocol cannot be asked, and such a start ends.
    *_methods(_ASGI, "(self)", "the gate comes after lifespan start-up, and draining before the end",
              "_serve", "_shutdown", since=(24,)),
    *_values(_ASGI, "the counters stand in front of the app", "asgi", since=(24,)),
    *_values(_ASGI, "25 does not count out connections that it closes itself", "nr_conns", since=(24,)),
    *_methods(_PROTOCOL, "(self, request, response_requires_close)", "a leaving worker's replies close", "_will_close",
              since=(27,)),
    *_methods(_PROTOCOL, "(self, data)", "a head that has begun is a request in hand", "_feed_callback_parser",
              since=(26,)),
    *_methods(_PROTOCOL, "(self, data)", "a head that has begun is a request in hand", "data_received", since=(24,)),
    *_methods(_PROTOCOL, "(self)", "a head that has begun is a request in hand",
              "_on_headers_complete", "_on_message_complete"),
    *_methods(_PROTOCOL, "(self)", "what has arrived before the end of keepalive is answered", "_keepalive_timeout"),
    *_methods(_UVICORN, "(self)", "the gate comes after lifespan start-up", "_serve"),
)  # fmt: skip

_OWNERS: dict[str, set[str]] = defaultdict(set)
for _each in PATCHES:
    _OWNERS[_each.name].add(_each.owner)


#: Classes and names that were looked up before: some are written once for each connection.
_found: set[tuple[type, str]] = set()


def _refuse_unlisted(target: object, name: str) -> None:
    cls = target if isinstance(target, type) else type(target)
    if (cls, name) in _found:
        return
    known = _OWNERS.get(name)
    if isinstance(target, ModuleType):
        owners = [target.__name__]
    else:
        owners = [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]
    # What is not gunicorn's at all stands in for it, in a test for example.
    ours = not any(owner.partition(".")[0] in ("gunicorn", "uvicorn_worker") for owner in owners)
    if not known or not (ours or known.intersection(owners)):
        raise LookupError(f"{owners[0]}.{name} has no row in zdd_web.gunicorn.adapter.patches.PATCHES: add one")
    if not isinstance(target, ModuleType):
        _found.add((cls, name))


def replace(target: object, name: str, new: Callable[..., object] | type) -> Any:
    """Put `new` in the place of a method, class or function; return what was there. Raises `LookupError` without a row.

    On an instance it hides the class's own, which `restore()` brings back.
    """
    _refuse_unlisted(target, name)
    before = getattr(target, name, None)
    setattr(target, name, new)
    return before


def write(target: object, name: str, value: object) -> None:
    """Write a value. Raises `LookupError` without a row."""
    _refuse_unlisted(target, name)
    setattr(target, name, value)


def restore(target: object, name: str) -> None:
    """Remove from an instance what `replace()` or `write()` have put before the class's own."""
    _refuse_unlisted(target, name)
    vars(target).pop(name, None)


#: What was found in order: a start checks twice, and signatures take milliseconds.
_passed: dict[Patch, object] = {}


def check(*modules: str, rows: Iterable[Patch] = PATCHES, version: str = INSTALLED) -> None:
    """Raise `SettingsError` for a gunicorn that has changed what we replace, in the modules that are loaded.

    `modules` are loaded for it. The others are those of worker classes that this service does not use.
    """
    for module in modules:
        importlib.import_module(module)
    for row in rows:
        if row.takes and row.exists_in(version) and row.module in sys.modules:
            _check(row, version)


def check_values(target: object, rows: Iterable[Patch] = PATCHES, version: str = INSTALLED) -> None:
    """Raise `SettingsError` if an object of gunicorn's lacks a value that is written to it.

    An arbiter has all of them when `on_starting` is called: most are set by its constructor, and not on the class.
    """
    owners = [f"{base.__module__}.{base.__qualname__}" for base in type(target).__mro__]
    for row in rows:
        if not row.takes and row.owner in owners and row.exists_in(version) and not hasattr(target, row.name):
            raise SettingsError(f"gunicorn {version} has no {row.label}, which zdd_web writes ({row.why}): {_remedy()}")


def _check(row: Patch, version: str) -> None:
    owner: Any = sys.modules[row.module]
    if row.owner != row.module:
        owner = getattr(owner, row.owner.rpartition(".")[2], None)
    found = getattr(owner, row.name, None)
    if found is not None and found is _passed.get(row):
        return
    if found is None:
        raise SettingsError(
            f"gunicorn {version} has no {row.label}{row.takes[0]}, which zdd_web replaces ({row.why}): {_remedy()}"
        )
    takes = signature_of(found)
    if takes is not None and takes not in row.takes:
        raise SettingsError(
            f"gunicorn {version} changed {row.label}{takes}: zdd_web replaces it as {' or '.join(row.takes)} "
            f"({row.why}): {_remedy()}"
        )
    _passed[row] = found


def _remedy() -> str:
    return f"install another release of gunicorn>={OLDEST[0]},<{BEYOND[0]}, or a newer zdd_web"


def signature_of(function: Callable[..., object]) -> str | None:
    """Return how a method is called, without annotations; None where that cannot be told.

    >>> def stop(self, graceful: bool = True) -> None: ...
    >>> signature_of(stop), signature_of(lambda *args, **kwargs: None)
    ('(self, graceful=True)', None)
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    kinds = {each.kind for each in signature.parameters.values()}
    if kinds and kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # A wrapper, of a tracing library for example: it passes on whatever it is given.
        return None
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
