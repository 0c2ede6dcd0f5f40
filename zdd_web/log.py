"""The log vocabulary: one line a transition, `key=value` after a fixed event word.

    generation=2 event=upgrade.ready pid=4711 workers=4 seconds=1.92

Tests wait on these lines and dashboards parse them: they are interface. Every event word is listed in `EVENTS`; an
unknown one raises, so that the list in the docs cannot fall behind.

In gunicorn's processes a line goes straight to the handlers of gunicorn's error log. Through the logger it could be
lost: an app's `dictConfig` without `disable_existing_loggers: False` disables every logger that exists by then, ours
and gunicorn's. Elsewhere lines go to the logger `zdd_web`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from typing import Any

EVENTS = {
    "boot.started": "a master begins to boot its workers",
    "boot.failed": "a worker could not load the app; error says why",
    "phase.serving": "the generation serves: its gate is open",
    "phase.lame_duck": "a stop began: readiness is 503, everything is still accepted",
    "phase.draining": "requests and background work in hand are finished, nothing new is begun",
    "phase.retiring": "the successor serves; this generation finishes what it has",
    "phase.stopped": "the generation is gone; seconds is how long it took to leave",
    "upgrade.started": "SIGUSR2: a successor was forked; or one that was started takes over",
    "upgrade.ready": "all workers of the new generation stand at the gate",
    "upgrade.committed": "the successor has lived through the commit window and is in office",
    "upgrade.failed": "the successor was ended; the old generation serves on",
    "upgrade.cancelled": "a stop ended an upgrade under way",
    "upgrade.given_up": "the running master has given up this one, which had begun to take over",
    "takeover.offered": "a new master that is started may take over by this socket",
    "takeover.found": "a master runs already, and hands this one its listeners",
    "takeover.rejected": "somebody asked to take over who may not, or said nothing that makes sense",
    "takeover.failed": "the socket for takeovers cannot be had; tried again",
    "successor.lost": "the successor ended while this generation retired, which serves again",
    "predecessor.lost": "the old master ended before it answered; the new generation serves",
    "listener.added": "the new configuration binds this too; it listens from when the new generation serves",
    "listener.dropped": "the new configuration does not bind this any more; it is drained once the upgrade is through",
    "listener.closed": "a listener that the successor does not want is empty and closed",
    "listener.lost": "a listener that the successor did not want cannot be bound again, now that the successor is gone",
    "listener.queues": "the number of workers has changed, and with it the number of queues on a port",
    "listener.shared": "others listen on this port too; `unknown` of them are no service of ours (`ss -ltnp`)",
    "listener.steered": "others listen on this port too: new connections go to them, what waits here is finished",
    "keeper.started": "the retired master became a keeper: its pid stays, and signals go to the master in office",
    "reload.started": "SIGHUP: a child process tries config and app",
    "reload.done": "the new config is in force; new workers take over as they get ready",
    "refused": "a signal was not obeyed; reason and remedy say why and what to do",
    "warmup.cold": "a WARMUP path was refused by the app: what it should have warmed is cold",
    "check.failed": "a check of the app has failed in a worker; error says how",
    "check.passed": "a check that had failed passes again",
    "worker.recycled": "a worker has answered max_requests; it leaves when its replacement serves",
    "worker.boot_failed": "a replacement could not boot; the service goes on and tries again",
    "probes.listening": "the probe port answers at this address",
    "probes.restarted": "the probe port's process had ended; another answers",
    "probe.failing": "a probe says 503 from now on; reason says why",
    "probe.passing": "a probe that had failed says 200 again",
    "background.waiting": "a leaving worker waits for its background work",
    "background.failed": "a background task raised",
    "background.deadline": "the deadline has passed with background work in hand; tasks is how much",
    "background.handed_back": "what became of the on_abandon of the tasks that were not finished",
    "background.abandoned": "a background task was not finished at the deadline",
    "background.abandoned_by_name": "more tasks of one name were not finished; tasks is how many",
    "threads.waiting": "a process that ends waits for threads of the app that are not daemons",
    "threads.left": "a thread of the app was not over at the deadline; the process ends beside it",
    "exit.stuck": "Python's own end was not over at the deadline, such as a function of atexit; the process ends",
    "drain.abandoned": "workers were killed at the deadline with work in hand",
    "notify.failed": "systemd did not take a message; said once, until it takes one again",
    "watchdog.withheld": "the service does not live, and systemd's watchdog is not told that it does",
    "settings.invalid": "a setting cannot work; the service does not start",
    "internal.error": "zdd_web itself raised; the service goes on",
}

_BARE = re.compile(r"[A-Za-z0-9_.,:/@%+\[\]-]+\Z")


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
    # A file name that is no UTF-8 comes as lone surrogates, which no handler can write.
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if _BARE.match(text) else json.dumps(text, ensure_ascii=False)


_generation = 0
_sink: logging.Logger = logging.getLogger("zdd_web")


def use_gunicorn(error_log: logging.Logger) -> None:
    """Send events to the handlers of gunicorn's error log from now on."""
    global _sink
    _sink = error_log


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
    """Write the line of an event, with the same keys as `extra` under `zdd_`; `detail` follows on lines of its own."""
    if _generation:
        fields = {"generation": _generation, **fields}
    message = "\n".join([format_event(event, fields), *detail.splitlines()])
    extra = {f"zdd_{key}": value for key, value in {"event": event, **fields}.items()}
    if _sink.name == "zdd_web":
        _sink.log(level, message, extra=extra, exc_info=exc_info or None)
        return
    if level < _sink.level:
        return
    record = _sink.makeRecord(_sink.name, level, __file__, 0, message, (), _exc_info(exc_info), "emit", extra)
    # Not `handle()`, which a disabled logger ignores; the handlers above it count for one that propagates.
    _sink.callHandlers(record)


_former: list[Any] = []


def own_streams() -> set[int]:
    """Give a forked process streams of its own to log to; return the descriptors that its log needs.

    A thread of the parent may have been writing, and its lock on the stream is never released in the copy. (Python
    makes the handlers' own locks anew in a forked process, not those below.) Old streams are kept: to collect one would
    flush it.
    """
    needed = set()
    logger: logging.Logger | None = _sink
    while logger is not None:
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
        logger = logger.parent if logger.propagate else None
    return needed


def leave_a_message(path: str, text: str) -> None:
    """Write why the process ends where the platform shows it, if there is such a place.

    Kubernetes makes the file for each container and shows its content as the reason of the last termination.
    """
    # Not created: elsewhere than in a pod it would be a stray file. Nor waited for, if it is a pipe.
    with contextlib.suppress(OSError), open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK), "w") as file:
        file.write(text[:4096])


def _exc_info(exc_info: bool | BaseException) -> Any:
    import sys

    if isinstance(exc_info, BaseException):
        return type(exc_info), exc_info, exc_info.__traceback__
    return sys.exc_info() if exc_info else None
