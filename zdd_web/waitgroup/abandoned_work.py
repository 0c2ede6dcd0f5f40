"""What becomes of background work that is not finished at the deadline.

Little time is left, and the process may be killed at any moment of it, so the most important comes first: the number
of tasks, then `on_abandon`, which may save work, and the names last. A name with its stack is dear (a log line for each
of ten thousand tasks takes seconds), so only the oldest tasks have a line each; the others are counted by name.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from zdd_web import log
from zdd_web.waitgroup.entry import Entry
from zdd_web.waitgroup.threads import BEAT, close_connections, report

#: How many `on_abandon` run at once, as long as they end: each may want a connection to a database.
ABANDONED_AT_ONCE = 32

#: Of the time for all of it, the part in which `on_abandon` is waited for.
CALLBACKS_SHARE = 0.75

#: How many tasks have a log line of their own: at most, and however little time is left.
NAMED_AT_MOST, NAMED_AT_LEAST = 100, 10

#: How many names have a line with the number of further tasks; the rest are one line.
COUNTED_NAMES = 20

#: After so long, seconds, a callback is taken for one that hangs, and another is begun beside it.
GIVE_WAY = BEAT / 2


def abandon(
    entries: Iterable[Entry],
    timeout: float,
    beat: Callable[[], object] = lambda: None,
    counted: Callable[[int], object] = lambda count: None,
) -> list[tuple[Entry, str]]:
    """Give up what of `entries` is still in hand; return it, oldest first, each with its stack if that was logged.

    `counted` is called first of all, with their number. What waits for a thread is not begun any more. Each
    `on_abandon` runs in a daemon thread, or is counted as not run; then the tasks are logged. All of it gets `timeout`
    seconds, in which `beat` is called. Work goes on meanwhile: it may end after its `on_abandon` was called.

    >>> from zdd_web.waitgroup import WaitGroup
    >>> group = WaitGroup("doctest")
    >>> entry = group.add("import", on_abandon=lambda entry: print(entry.name, "once more"))
    >>> [(entry.name, stack)] = abandon(group.entries(), timeout=5)
    import once more
    >>> entry.done()
    """
    began = time.monotonic()
    given_up = [entry for entry in entries if entry.in_hand]
    if not given_up:
        return []
    counted(len(given_up))
    with_callback = [entry for entry in given_up if entry.on_abandon is not None]
    log.emit("background.deadline", logging.ERROR, pid=os.getpid(), tasks=len(given_up), on_abandon=len(with_callback))
    for entry in given_up:
        entry.given_up = True
    if with_callback:
        _Callbacks(with_callback).run(began + CALLBACKS_SHARE * timeout, beat)
    named = _name(given_up, began + timeout, beat)
    for entry in given_up:
        entry.cancel()
    return named


class _Callbacks:
    """The `on_abandon` of many tasks, called on a few daemon threads: however they hang, the process can end."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._total = len(entries)
        self._waiting = collections.deque(entries)
        self._running: dict[Entry, float] = {}
        self._begun = self._returned = self._failed = self._threads = 0
        self._until = 0.0
        self._changed = threading.Condition()

    def run(self, until: float, beat: Callable[[], object]) -> None:
        """Call them until then on the monotonic clock, and log what became of them."""
        self._until = until
        for _ in range(min(ABANDONED_AT_ONCE, self._total)):
            if not self._start():
                break
        while self._threads and (left := until - time.monotonic()) > 0:
            beat()
            with self._changed:
                self._changed.wait(min(left, GIVE_WAY))
            if self._waiting and self._one_hangs():
                self._start()
        self._log_outcome()

    def _start(self) -> bool:
        with self._changed:
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="zdd_web-apart", daemon=True).start()
        except RuntimeError as error:  # the process can have no more threads
            with self._changed:
                self._threads -= 1
            if not self._threads:
                report(error, hook="on_abandon")
            return False
        return True

    def _one_hangs(self) -> bool:
        with self._changed:
            return time.monotonic() - min(self._running.values(), default=time.monotonic()) > GIVE_WAY

    def _work(self) -> None:
        try:
            while (entry := self._next()) is not None:
                self._call(entry)
            close_connections(hook="on_abandon")
        finally:
            with self._changed:
                self._threads -= 1
                if not self._threads:
                    self._changed.notify_all()

    def _next(self) -> Entry | None:
        with self._changed:
            # Not left to `run()` alone: a greenlet that never waits for anything would let nothing else run. Those
            # that the first threads begin with are called however little time is left.
            if not self._waiting or (self._begun >= ABANDONED_AT_ONCE and time.monotonic() >= self._until):
                return None
            self._begun += 1
            entry = self._waiting.popleft()
            self._running[entry] = time.monotonic()
            return entry

    def _call(self, entry: Entry) -> None:
        failure: BaseException | None = None
        try:
            assert entry.on_abandon is not None
            entry.on_abandon(entry)
        except BaseException as error:
            failure = error
        with self._changed:
            del self._running[entry]
            self._failed += failure is not None
            self._returned += failure is None
            is_logged = self._failed <= NAMED_AT_MOST
        if failure is not None and is_logged:
            report(failure, **entry.fields(), hook="on_abandon")

    def _log_outcome(self) -> None:
        with self._changed:
            not_run = len(self._waiting)
            self._waiting.clear()
            running = list(self._running.items())
            returned, failed = self._returned, self._failed
        level = logging.INFO if returned == self._total else logging.ERROR
        log.emit("background.handed_back", level, pid=os.getpid(), on_abandon=self._total, returned=returned,
                 failed=failed, running=len(running), not_run=not_run)  # fmt: skip
        for entry, began in running[:NAMED_AT_MOST]:
            error = TimeoutError(f"still running after {time.monotonic() - began:.1f} s")
            report(error, **entry.fields(), hook="on_abandon")


def _name(given_up: list[Entry], until: float, beat: Callable[[], object]) -> list[tuple[Entry, str]]:
    named: list[tuple[Entry, str]] = []
    for entry in given_up[:NAMED_AT_MOST]:
        if len(named) >= NAMED_AT_LEAST and time.monotonic() >= until:
            break
        beat()
        # The caller's own stack says nothing of the work.
        stack = "" if entry.task is None and entry.thread_id == threading.get_ident() else entry.stack()
        log.emit("background.abandoned", logging.ERROR, pid=os.getpid(), group=entry.group.name, name=entry.name,
                 age=entry.age, thread=entry.thread, request=entry.request, detail=stack)  # fmt: skip
        named.append((entry, stack))
    others = given_up[len(named) :]
    for fields in count_by_name(others):
        log.emit("background.abandoned_by_name", logging.ERROR, pid=os.getpid(), **fields)
    return [*named, *((entry, "") for entry in others)]


def count_by_name(entries: Sequence[Entry], most: int = COUNTED_NAMES) -> list[dict[str, Any]]:
    """Return what the log says of many tasks: one row for each name, the most frequent first; the rest are one row.

    >>> from zdd_web.waitgroup import WaitGroup
    >>> group = WaitGroup("doctest")
    >>> entries = [group.add(name) for name in ("mail", "mail", "index", "report")]
    >>> for row in count_by_name(entries, most=1):
    ...     print({**row, "age": 0.0})
    {'group': 'doctest', 'name': 'mail', 'tasks': 2, 'age': 0.0}
    {'names': 2, 'tasks': 2, 'age': 0.0}
    >>> for entry in entries:
    ...     entry.done()
    """
    by_name: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        by_name.setdefault((entry.group.name, entry.name), []).append(entry)
    rows: list[dict[str, Any]] = []
    found = sorted(by_name.items(), key=lambda item: -len(item[1]))
    for (group, name), tasks in found[:most]:
        rows.append({"group": group, "name": name, "tasks": len(tasks), "age": max(task.age for task in tasks)})
    rest = [entry for _, tasks in found[most:] for entry in tasks]
    if rest:
        rows.append({"names": len(found) - most, "tasks": len(rest), "age": max(entry.age for entry in rest)})
    return rows
