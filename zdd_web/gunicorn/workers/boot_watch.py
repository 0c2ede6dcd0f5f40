"""What a booting process is doing: the step on the board, and a stack in the log where a step makes no progress.

A thread logs `boot.slow`. It cannot run while an extension module holds the interpreter's lock, and is not started
under gevent, where it would be a greenlet. So there is also a timer of faulthandler, which needs neither and fires a
second later: unless the thread cancels it, it writes the stacks to stderr, or to the boot log in an upgrade.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from zdd_web import log

#: Seconds in one step until its stack is logged.
SLOW_AFTER = 10.0
#: How much later faulthandler does, seconds.
SLACK = 1.0

REMEDY = "an upgrade and a replacement have UPGRADE_TIMEOUT to boot in: raise it if this step needs as long"


class BootWatch:
    """The steps of one process's boot; `show` is called with each, and `fd` is where faulthandler writes."""

    def __init__(self, show: Callable[[str], None], fd: int = 2) -> None:
        self._show, self._fd = show, fd
        self._what, self._since = "", 0.0
        self._reported = True
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, what: str) -> None:
        """Begin a step, which ends the one before it."""
        self._what, self._since, self._reported = what, time.monotonic(), False
        self._show(what)
        faulthandler.dump_traceback_later(SLOW_AFTER + SLACK, file=self._fd)
        if self._thread is None and not _threads_are_greenlets():
            self._thread = threading.Thread(target=self._watch, name="zdd_web-boot", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread is to be had
                self._thread.start()

    def over(self) -> None:
        """The boot is over."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._show("")

    def _watch(self) -> None:
        while not self._over.wait(SLOW_AFTER / 10):
            seconds = time.monotonic() - self._since
            if seconds >= SLOW_AFTER and not self._reported:
                self._reported = True
                faulthandler.cancel_dump_traceback_later()
                log.emit("boot.slow", logging.WARNING, pid=os.getpid(), step=self._what, seconds=seconds,
                         remedy=REMEDY, detail=_stacks())  # fmt: skip


@contextlib.contextmanager
def watched(what: str) -> Iterator[None]:
    """Watch a boot of one step."""
    watch = BootWatch(lambda what: None)
    watch.step(what)
    try:
        yield
    finally:
        watch.over()


def _threads_are_greenlets() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


def _stacks() -> str:
    """Return the main thread's stack, then those of the others, such as that of a check, without this one's."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda each: each is not threading.main_thread())
    return "".join(
        f"thread {each.name}:\n{''.join(traceback.format_stack(frames[each.ident]))}"
        for each in threads
        if each.ident in frames and each is not threading.current_thread()
    )
