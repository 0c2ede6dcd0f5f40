"""WaitGroup: background work that a worker finishes before it exits.

As Go's `sync.WaitGroup`, with what a stop needs on top: each entry has a name, an age and a stack, so that what was not
finished can be named, and work is counted from the moment it is offered, not from when a thread picks it up.

    with zdd_web.background.track("send-receipt"):
        ...
    zdd_web.background.go(send_receipt, order.id)
    zdd_web.background.create_task(notify(order.id))     # in asyncio code

    @zdd_web.background.task
    def rebuild_index(): ...
    rebuild_index()            # returns a Future; runs on the group's own threads

The group owns its threads: an executor of another library may be shut down while requests still want to hand it work.

At its end a worker calls, in this order: `close_all()`, `abandon()`, `run_drained_hooks()`.
"""

from __future__ import annotations

from zdd_web.waitgroup.abandoned_work import ABANDONED_AT_ONCE, abandon
from zdd_web.waitgroup.all_groups import all_entries, close_all, oldest, remember_hooks, renew_locks, reset
from zdd_web.waitgroup.drained_hooks import on_drained, run_drained_hooks
from zdd_web.waitgroup.entry import Entry, current_request
from zdd_web.waitgroup.executor import Executor
from zdd_web.waitgroup.group import WaitGroup, background
from zdd_web.waitgroup.stop_hooks import forget_stop_hooks, on_stop, run_stop_hooks
from zdd_web.waitgroup.task import Task

__all__ = [
    "ABANDONED_AT_ONCE",
    "Entry",
    "Executor",
    "Task",
    "WaitGroup",
    "abandon",
    "all_entries",
    "background",
    "close_all",
    "current_request",
    "forget_stop_hooks",
    "oldest",
    "on_drained",
    "on_stop",
    "remember_hooks",
    "renew_locks",
    "reset",
    "run_drained_hooks",
    "run_stop_hooks",
]
