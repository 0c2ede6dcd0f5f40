"""The end of a process beside threads of the app.

As it exits, Python waits for each thread that is not a daemon, and for the calls that the pools of concurrent.futures
have in hand or queued: without a heartbeat, without a limit and without a log line. The consumer of a queue that was
started at import holds up each worker in this way, until gunicorn's `timeout` or the deadline of a stop kills it. So
the wait is done here, before Python's own: with a heartbeat and a deadline, and what is left is logged with its stack.
"""

from __future__ import annotations

import concurrent.futures.thread as pools
import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from zdd_web import log
from zdd_web.system import clock

if TYPE_CHECKING:
    import queue

#: The longest time between two heartbeats of a wait, seconds; the first pause is shorter, as most threads end at once.
LOOK, FIRST_LOOK = 0.1, 0.02

#: A wait that takes longer is logged, seconds.
SAID_AFTER = 0.2

#: How many threads have a log line of their own.
NAMED_AT_MOST = 20

#: The least time for Python's own exit (functions of `atexit` for example), seconds.
EXIT_AT_LEAST = 1.0

REMEDY = "end it when zdd_web.draining() is true, have it tracked by zdd_web.background, or make it a daemon"

Frames = Callable[[], Mapping[int, FrameType]]


def waited_for(
    but: Collection[threading.Thread] = (), frames: Frames = sys._current_frames, *, pools_only: bool = False
) -> list[threading.Thread]:
    """Return the threads that Python would wait for as it exits, except the caller's and those of `but`.

    A thread of a pool counts while it has a call in hand or queued, whether it is a daemon or not.

    >>> [thread.name for thread in waited_for()]
    []
    """
    queues = _pool_queues()
    here, ours = threading.current_thread(), set(but) | {threading.main_thread()}
    others = [thread for thread in threading.enumerate() if thread is not here and thread not in ours]
    # Under gevent this searches through all objects, so only where it is needed.
    stands_at = frames() if any(thread in queues for thread in others) else {}
    found = []
    for thread in others:
        if thread in queues:
            if not queues[thread].empty() or _is_in_a_call(stands_at.get(thread.ident or 0)):
                found.append(thread)
        elif not thread.daemon and not pools_only:
            found.append(thread)
    return found


def _pool_queues() -> dict[threading.Thread, queue.SimpleQueue[object]]:
    while True:
        try:
            return dict(pools._threads_queues)
        except (RuntimeError, KeyError):  # a pool was begun, or a thread of one has ended, meanwhile
            continue


def _is_in_a_call(frame: FrameType | None) -> bool:
    return any(each.f_code is pools._WorkItem.run.__code__ for each in _outwards(frame))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def wait(
    left: Callable[[], list[threading.Thread]], deadline_ns: Callable[[], int], beat: Callable[[], object]
) -> list[threading.Thread]:
    """Wait until no thread is left, with a heartbeat; return those that are left at the deadline.

    `deadline_ns` is called again and again: a stop may bring an earlier one.

    >>> wait(lambda: [], lambda: clock.NEVER, lambda: None)
    []
    """
    began, is_said, pause = time.monotonic(), False, FIRST_LOOK
    while threads := left():
        until = deadline_ns()
        if clock.passed(until):
            return threads
        if not is_said and time.monotonic() - began >= SAID_AFTER:
            is_said = True
            names = ", ".join(thread.name for thread in threads[:NAMED_AT_MOST])
            log.emit("threads.waiting", pid=os.getpid(), threads=len(threads), names=names)
        beat()
        remaining = clock.remaining(until)
        time.sleep(pause if remaining is None else min(pause, remaining))
        pause = LOOK
    return []


def name(threads: Sequence[threading.Thread], frames: Frames = sys._current_frames) -> None:
    """Log the threads that the process does not wait for, each with its stack."""
    stands_at = frames()
    for thread in threads[:NAMED_AT_MOST]:
        frame = stands_at.get(thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        log.emit("threads.left", logging.WARNING, pid=os.getpid(), thread=thread.name, remedy=REMEDY, detail=stack)
    if len(threads) > NAMED_AT_MOST:
        log.emit("threads.left", logging.WARNING, pid=os.getpid(), more=len(threads) - NAMED_AT_MOST)


def end(status: int) -> NoReturn:
    """End the process now, without Python's wait for threads."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def status_under_way(default: int = 0) -> int:
    """Return the exit status of the SystemExit that is on its way up, as Python would have it.

    >>> try:
    ...     sys.exit(3)
    ... except SystemExit:
    ...     print(status_under_way(), end=" ")
    ... finally:
    ...     print(status_under_way())
    3 0
    """
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    if error is None:
        return default
    return 0 if error.code is None else error.code & 0xFF if isinstance(error.code, int) else 1


def bound(until_ns: int, beat: Callable[[], object], status: int, interval: float = 1.0) -> None:
    """Have the process end by then, whatever Python does as it exits; a wait that is cut off is logged with its stack.

    Functions of `atexit` may hang, and so may the wait for children of multiprocessing.
    """
    until = max(until_ns, clock.after_ns(EXIT_AT_LEAST))
    began = time.monotonic()

    def watch() -> None:
        while not clock.passed(until):
            beat()
            time.sleep(min(interval, clock.remaining(until) or 0))
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        log.emit("exit.stuck", logging.WARNING, pid=os.getpid(), seconds=time.monotonic() - began, detail=stack)
        end(status)

    with contextlib.suppress(RuntimeError):  # no thread is to be had
        threading.Thread(target=watch, name="zdd_web-exit", daemon=True).start()


def earlier(*deadlines_ns: int) -> int:
    """Return the earliest of some deadlines, of which any may be `clock.NEVER`.

    >>> earlier(clock.NEVER, 7, 5), earlier(clock.NEVER)
    (5, 0)
    """
    return min((each for each in deadlines_ns if each != clock.NEVER), default=clock.NEVER)
