"""What concerns all groups of this process: they are counted, closed and reset together, and empty after a fork."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Callable

from zdd_web.waitgroup.drained_hooks import forget_drained_hooks, remember_drained_hooks
from zdd_web.waitgroup.entry import Entry, Group
from zdd_web.waitgroup.stop_hooks import forget_stop_hooks, remember_stop_hooks

_groups: weakref.WeakSet[Group] = weakref.WeakSet()

#: Called with the number of entries in all groups whenever it changes; `process` points it at the board.
observer: Callable[[int], None] | None = None


def add(group: Group) -> None:
    """Count a group among those of this process, for as long as it is referenced elsewhere."""
    _groups.add(group)


def all_entries() -> list[Entry]:
    """Return the work in hand in all groups of this process, oldest first."""
    return sorted((entry for group in _all_groups() for entry in group.entries()), key=lambda entry: entry.started)


def oldest(most: int) -> list[Entry]:
    """Return the oldest work in hand in all groups, at most so many, the oldest first; without a lock."""
    found = [entry for group in _all_groups() for entry in group._oldest(most)]
    found.sort(key=operator.attrgetter("started"))
    return found[:most]


def close_all() -> None:
    """Close every group of this process."""
    for group in _all_groups():
        group.close()


def _all_groups() -> list[Group]:
    while True:
        try:
            return list(_groups)
        except RuntimeError:
            continue  # another thread made a group meanwhile, which a WeakSet does not bear


def notify_observer() -> None:
    """Give the observer the number of entries in all groups, after it has changed."""
    # The thread that has notified looks again, so the last count told is the right one in any order of threads. A
    # lock would order them too, until the garbage collector ends work (a generator that stands in `track()`) in it.
    told = -1
    while observer is not None and told != (count := sum(len(group) for group in _all_groups())):
        observer(count)
        told = count


def _after_fork() -> None:
    # What the parent's threads were doing they are not doing here, and a lock that one of them held stays held. The
    # observer writes into the slot of the parent; a worker gets its own when it is attached.
    global observer
    observer = None
    for group in _all_groups():
        group._reset()


os.register_at_fork(after_in_child=_after_fork)


def reset() -> None:
    """Forget all work in hand and the functions of `on_drained` and `on_stop`, and open what was closed.

    For between two tests.
    """
    for group in _all_groups():
        group._reset()
    forget_drained_hooks()
    forget_stop_hooks()


def remember_hooks() -> Callable[[], None]:
    """Return what takes the functions of `on_drained` and `on_stop` back to those that there are now; for tests."""
    drained, stop = remember_drained_hooks(), remember_stop_hooks()

    def restore() -> None:
        drained()
        stop()

    return restore


def renew_locks() -> None:
    """Make the locks of all groups anew, before anybody waits: gevent has made greenlets of threads."""
    for group in _all_groups():
        group._changed = threading.Condition()
