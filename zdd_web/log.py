"""The log vocabulary: one line a transition, `key=value` after a fixed event word.

    generation=2 event=upgrade.ready pid=4711 workers=4 seconds=1.92

Tests wait on these lines and dashboards parse them: they are interface. Every event word is listed in `EVENTS`; an
unknown one raises, so that the list in the docs cannot fall behind.

In gunicorn's processes a line goes straight to the handlers of gunicorn's error log. Through the logger it could be
lost: an app's `dictConfig` without `disable_existing_loggers: False` disables every logger that exists by then, ours
and gunicorn's. A `logger_class` that is not derived from gunicorn's has no such handlers: there the lines go through
its methods. Elsewhere lines go to the logger `zdd_web`.

Values are data: control characters are escaped, URLs lose their credentials, and neither a value nor a line of a
traceback can be taken for a line of an event. A log that cannot be written (a closed pipe, a full disk) raises nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from zdd_web.system import escaping, log_files, masking

EVENTS = {
    "boot.started": "a master begins to boot its workers",
    "boot.slow": "a worker has been in one step of its boot for ten seconds; its stack follows",
    "boot.failed": "a worker could not load the app; error says why",
    "phase.serving": "the generation serves: its gate is open",
    "phase.lame_duck": "a stop began: readiness is 503 unless LAME_DUCK_READY, everything is still accepted",
    "phase.draining": "requests and background work in hand are finished, nothing new is begun",
    "phase.retiring": "the successor serves; this generation finishes what it has",
    "phase.stopped": "the generation is gone; seconds is how long it took to leave",
    "upgrade.started": "SIGUSR2: a successor was forked; or one that was started takes over",
    "upgrade.left_behind": "environment variables keep paths of the old release, which the new one does not have",
    "upgrade.ready": "all workers of the new generation stand at the gate",
    "upgrade.grows": "a new generation that was watched as a canary starts the rest of its workers",
    "upgrade.committed": "the successor has lived through the commit window and is active",
    "upgrade.failed": "the successor was ended; the old generation serves on",
    "upgrade.cancelled": "a stop, or a command that asked for it, ended an upgrade under way",
    "upgrade.given_up": "the running master has given up this one, which had begun to take over",
    "takeover.offered": "a new master that is started may take over by this socket",
    "takeover.found": "a master runs already, and hands this one its listeners",
    "takeover.rejected": "a process asked to take over that may not, or sent nothing that makes sense",
    "takeover.failed": "the socket for takeovers cannot be had; tried again",
    "successor.lost": "the successor ended while this generation retired, which serves again",
    "predecessor.lost": "the old master ended before it answered; the new generation serves",
    "listener.added": "the new configuration binds this too; it listens from when the new generation serves",
    "listener.dropped": "the new configuration does not bind this any more; it is drained once the upgrade is through",
    "listener.closed": "a listener that the successor does not want is empty and closed",
    "listener.lost": "a listener that the successor did not want cannot be bound again, now that the successor is gone",
    "listener.rebound": "the file of a Unix socket was gone, or led to another socket: the path is bound again",
    "listener.unreachable": "the file of a Unix socket that was passed to gunicorn is gone, or leads to another socket",
    "listener.queues": "the number of workers has changed, and with it the number of queues on a port",
    "listener.shared": "others listen on this port too; `unknown` of them are not of a zdd_web service (`ss -ltnp`)",
    "listener.steered": "others listen on this port too: new connections go to them, what waits here is finished",
    "keeper.started": "the retired master became a keeper: its pid stays, and signals go to the active master",
    "reload.started": "SIGHUP: a child process tries config and app",
    "reload.done": "the new config is in force; new workers take over as they get ready",
    "refused": "a signal was not obeyed; reason and remedy say why and what to do",
    "warmup.cold": "a WARMUP path was refused by the app: what it should have warmed is cold",
    "check.failed": "a check of the app has failed in a worker; error says how",
    "check.passed": "a check that had failed passes again",
    "worker.overdue": "a worker that was told to leave was still here after its deadline, and was killed",
    "handler.replaced": "the app has replaced the handler by which SIGTERM ends a worker; remedy names on_stop",
    "connections.taken_back": "no worker took the connections that this one, which leaves, had handed over",
    "worker.recycled": "a worker has answered max_requests; it leaves when its replacement serves",
    "worker.boot_failed": "a replacement could not boot; the service goes on and tries again",
    "probes.listening": "the probe port answers at this address",
    "probes.restarted": "the probe port's process had ended; another answers",
    "probe.failing": "a probe says 503 from now on; reason says why",
    "probe.passing": "a probe that had failed says 200 again",
    "master.stalled": "the main loop of the master has stopped: no signal is obeyed and no worker is replaced",
    "master.resumed": "the main loop of the master runs again",
    "background.waiting": "a leaving worker waits for its background work",
    "background.failed": "a background task raised",
    "background.deadline": "the deadline has passed with background work in hand; tasks is how much",
    "background.handed_back": "what became of the on_abandon of the tasks that were not finished",
    "background.abandoned": "a background task was not finished at the deadline",
    "background.abandoned_by_name": "more tasks of one name were not finished; tasks is how many",
    "threads.waiting": "a process that ends waits for threads of the app that are not daemons",
    "threads.left": "a thread of the app was not over at the deadline; the process ends beside it",
    "exit.stuck": "Python's own end was not over at the deadline, such as a function of atexit; the process ends",
    "stop.forwarded": "a stop of the service was sent on to a generation that still retires",
    "drain.abandoned": "workers were killed at the deadline with work in hand",
    "notify.failed": "systemd did not take a message; said once, until it takes one again",
    "watchdog.withheld": "the service does not live, and systemd's watchdog is not told that it does",
    "settings.slow": "Django's settings module is still being imported; a start waits for it up to UPGRADE_TIMEOUT",
    "settings.unread": "Django's settings module was not imported in time; the start goes on without its ZDD_WEB",
    "settings.invalid": "a setting cannot work; the service does not start",
    "internal.error": "zdd_web itself raised; the service goes on",
}

#: The kubelet reads no more of a termination message.
MESSAGE_BYTES = 4096

_BARE = re.compile(r"[A-Za-z0-9_.,:/@%+\[\]-]+\Z")

#: What dashboards and tests search for, when it stands in a text from elsewhere.
_FORGED = re.compile(rf"event=(?={'|'.join(map(re.escape, EVENTS))})")


def format_event(event: str, fields: dict[str, Any]) -> str:
    """Return the line of an event.

    Raises `KeyError` for a word that is not in `EVENTS`.

    >>> format_event("refused", {"generation": 1, "signal": "USR2", "reason": "an upgrade is under way"})
    'generation=1 event=refused signal=USR2 reason="an upgrade is under way"'
    """
    EVENTS[event]
    pairs = {"event": event, **fields}
    if "generation" in pairs:
        pairs = {"generation": pairs.pop("generation"), **pairs}
    return " ".join(f"{key}={_value(value)}" for key, value in pairs.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".") or "0"
    # A file name that is not UTF-8 comes as lone surrogates, which no handler can write.
    text = masking.urls(str(value).encode("utf-8", "backslashreplace").decode())
    return text if _BARE.match(text) else _disarmed(escaping.quoted(text))


def _disarmed(text: str) -> str:
    # JSON's own escape: a value that is read as JSON is what it was.
    return _FORGED.sub(r"event\\u003d", text)


def one_line(text: str) -> str:
    r"""Return a text from outside as it may stand at the end of a line that is not an event's.

    >>> print(one_line("RuntimeError: bad\n[1] event=phase.serving"))
    RuntimeError: bad\n[1] event\u003dphase.serving
    """
    return _disarmed(masking.printable(text, keep=""))


_generation = 0
#: A standard logger, or a gunicorn logger of the user's that has only gunicorn's methods.
_sink: Any = logging.getLogger("zdd_web")


def use_gunicorn(logger: Any) -> None:
    """Send events to gunicorn's logger from now on: to the handlers of its error log, if that is a standard one."""
    global _sink
    error_log = getattr(logger, "error_log", None)
    _sink = error_log if isinstance(error_log, logging.Logger) else logger


def use_generation(number: int) -> None:
    """Have every line of this process, and of its children, say which generation it is of."""
    global _generation
    _generation = number


def emit(
    event: str,
    level: int = logging.INFO,
    *,
    exc_info: bool | BaseException = False,
    detail: str = "",
    **fields: Any,
) -> None:
    """Write the line of an event, with the same keys as `extra` under `zdd_`; `detail` follows on lines of its own.

    Raises `KeyError` for a word that is not in `EVENTS`, and nothing else: a log that fails must not end what it
    reports on.
    """
    if _generation:
        fields = {"generation": _generation, **fields}
    message = format_event(event, fields)
    if detail:
        message += "\n" + _disarmed(escaping.indented(masking.urls(detail)))
    error = _exc_info(exc_info)
    trace = _traceback(*error) if error else ""
    extra = {f"zdd_{key}": _masked(value) for key, value in {"event": event, **fields}.items()}
    record = logging.getLogger("zdd_web").makeRecord(
        getattr(_sink, "name", "zdd_web"), level, __file__, 0, message, (), error, "emit", extra
    )
    # Formatters take this, and do not format the exception once more.
    record.exc_text = trace or None
    try:
        _write(record)
    except Exception:
        _write_to_stderr(record)


def _write(record: logging.LogRecord) -> None:
    if not isinstance(_sink, logging.Logger):
        # No `exc_info`: how it would be written is not known.
        text = "\n".join(filter(None, (record.getMessage(), record.exc_text)))
        getattr(_sink, record.levelname.lower())(text)
    elif _sink.name == "zdd_web":
        if _sink.isEnabledFor(record.levelno):
            _sink.handle(record)
    elif record.levelno >= _sink.level:
        # Not `handle()`, which a disabled logger ignores; the handlers above it count for one that propagates.
        _sink.callHandlers(record)


def _write_to_stderr(record: logging.LogRecord) -> None:
    handler = logging.lastResort
    if handler is not None and record.levelno >= handler.level:
        with contextlib.suppress(Exception):
            handler.handle(record)


def _masked(value: Any) -> Any:
    # A formatter of the user's prints it as it is.
    return one_line(value) if isinstance(value, str) else value


def _traceback(kind: type[BaseException], error: BaseException, trace: Any) -> str:
    try:
        chunks = [masking.urls(chunk) for chunk in traceback.format_exception(kind, error, trace)]
    except Exception:  # its own __str__, and the like
        chunks = [kind.__qualname__]
    return _disarmed(escaping.traceback_lines(chunks, set(_names(error, set()))))


def _names(error: BaseException | None, seen: set[int]) -> Iterator[str]:
    """Yield what a traceback calls an exception, and those that it came from."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield from (type(error).__qualname__, f"{type(error).__module__}.{type(error).__qualname__}")
    for other in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        yield from _names(other, seen)


_former: list[Any] = []


def own_streams() -> set[int]:
    """Give a forked process streams of its own to log to; return the descriptors that its log needs.

    A thread of the parent may have been writing, and its lock on the stream is never released in the copy. (Python
    makes the handlers' own locks anew in a forked process, not those below.) Old streams are kept: to collect one would
    flush it.
    """
    needed = set() if isinstance(_sink, logging.Logger) else log_files.descriptors()
    for logger in _standard_loggers():
        for handler in logger.handlers:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream = handler.stream  # type: ignore[attr-defined]
                fd = os.dup(stream.fileno())
                _former.append(stream)
                needed.add(fd)
                fresh = open(fd, "w", encoding=stream.encoding, errors=stream.errors)  # noqa: SIM115 - stays open
                handler.stream = fresh  # type: ignore[attr-defined]
            for attribute in ("socket", "sock"):
                with contextlib.suppress(OSError, AttributeError):
                    needed.add(getattr(handler, attribute).fileno())
    return needed


def _standard_loggers() -> list[logging.Logger]:
    """Return the loggers by whose handlers the lines go; all there are for a logger that does not tell."""
    if not isinstance(_sink, logging.Logger):
        return log_files.loggers()
    found: list[logging.Logger] = [_sink]
    while found[-1].propagate and found[-1].parent is not None:
        found.append(found[-1].parent)
    return found


def leave_a_message(path: str, text: str) -> None:
    """Write why the process ends where the platform shows it, if there is such a place.

    Kubernetes makes the file for each container and shows its content as the reason of the last termination.
    """
    # Not created: elsewhere than in a pod it would be a stray file. Nor waited for, if it is a pipe.
    with contextlib.suppress(OSError), open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK), "wb") as file:
        file.write(masking.printable(text).encode()[:MESSAGE_BYTES])


def _exc_info(exc_info: bool | BaseException) -> Any:
    if isinstance(exc_info, BaseException):
        return type(exc_info), exc_info, exc_info.__traceback__
    return sys.exc_info() if exc_info and sys.exc_info()[1] is not None else None
