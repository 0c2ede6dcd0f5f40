"""The board: shared memory in which a generation says what it is doing; see board.py for the theory of operation."""

from zdd_web.board.board import MEMFD_PREFIX, SLOTS, Board
from zdd_web.board.layout import (
    LARGEST_BYTES,
    LAYOUT,
    MAGIC,
    MAX_CHECKS,
    MOST_LISTENERS,
    MOST_SLOTS,
    NAMED_TASKS,
    CheckRecord,
    Header,
    Heartbeat,
    ListenerRecord,
    Order,
    Slot,
    TaskRecord,
    UpgradeState,
    WorkerState,
    shape,
)
from zdd_web.board.snapshot import ListenerView, Snapshot, WorkerView

__all__ = [
    "LARGEST_BYTES",
    "LAYOUT",
    "MAGIC",
    "MAX_CHECKS",
    "MEMFD_PREFIX",
    "MOST_LISTENERS",
    "MOST_SLOTS",
    "NAMED_TASKS",
    "SLOTS",
    "Board",
    "CheckRecord",
    "Header",
    "Heartbeat",
    "ListenerRecord",
    "ListenerView",
    "Order",
    "Slot",
    "Snapshot",
    "TaskRecord",
    "UpgradeState",
    "WorkerState",
    "WorkerView",
    "shape",
]
