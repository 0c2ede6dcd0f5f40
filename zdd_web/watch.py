"""Tell listeners in this process when the phase of its generation changes.

The board does not notify its readers of a write, so a thread looks at one of its words, five times a second. gunicorn's
workers start it when the app is loaded, and only where a callback is registered; the master, which with `preload_app`
has loaded the app too, never does. Under gevent it is a greenlet.

A phase that is over before the next look (a lame duck of no length) is left out: `previous` is the one that was told
last. A worker that leaves looks once more before it finishes its background work.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from zdd_web import log, process
from zdd_web.lifecycle import Phase

#: Seconds between two looks.
LOOK = 0.2
#: How long a worker that leaves waits for its listeners, seconds.
FINAL_POLL_TIMEOUT = 1.0

#: Is called with the phase, the one before it, and the number of the generation.
Told = Callable[[Phase, Phase, int], None]

_listeners: dict[str, Told] = {}
_watch: Watch | None = None


def listen(name: str, told: Told) -> None:
    """Have `told` called at each change, from the watching thread; what it raises is logged.

    A second listener of the same name takes the place of the first.

    >>> listen("doctest", lambda phase, previous, generation: print(phase.label))
    >>> forget("doctest")
    """
    _listeners[name] = told


def forget(name: str) -> None:
    """Have a listener not called any more."""
    _listeners.pop(name, None)


def start() -> None:
    """Begin to watch, in a worker, if anybody listens."""
    global _watch
    if _listeners:
        _watch = Watch()


def end() -> None:
    """Look a last time and end the watch; returns when the listeners were told, `FINAL_POLL_TIMEOUT` later at most."""
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.end()


class Watch:
    """The thread that looks."""

    def __init__(self) -> None:
        here = process.current()
        self._header = here.board.header
        self._seen = here.phase
        self._pid = os.getpid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zdd_web-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            if os.getpid() != self._pid:
                return  # a greenlet is copied into the processes that the app forks
            self._look()
        self._look()

    def _look(self) -> None:
        phase = Phase(self._header.phase)
        if phase is self._seen:
            return
        previous, self._seen = self._seen, phase
        for name, told in list(_listeners.items()):
            try:
                told(phase, previous, self._header.generation)
            except Exception as error:
                log.emit("internal.error", logging.ERROR, where=f"phase_changed:{name}", exc_info=error)

    def end(self) -> None:
        """See `end()` of the module."""
        self._over.set()
        self._thread.join(FINAL_POLL_TIMEOUT)
