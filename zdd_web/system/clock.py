"""The clock of all deadlines: absolute, monotonic, the same in every process of this machine.

CLOCK_MONOTONIC counts from boot for the whole system, so a deadline that the master writes on the board means the same
instant in a worker. The board holds whole nanoseconds, since a word is written at once and a float pair is not.
"""

from __future__ import annotations

import time

#: On the board, "no deadline".
NEVER = 0


def now_ns() -> int:
    """Return the monotonic time in nanoseconds."""
    return time.monotonic_ns()


def after_ns(seconds: float) -> int:
    """Return the deadline that lies `seconds` from now."""
    return time.monotonic_ns() + int(seconds * 1e9)


def remaining(deadline_ns: int) -> float | None:
    """Return the seconds left until a deadline, never below zero; None when there is no deadline."""
    if deadline_ns == NEVER:
        return None
    return max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)


def passed(deadline_ns: int) -> bool:
    """Tell whether a deadline exists and lies in the past."""
    return deadline_ns != NEVER and time.monotonic_ns() >= deadline_ns


def since(instant_ns: int) -> float:
    """Return the seconds since an instant."""
    return (time.monotonic_ns() - instant_ns) / 1e9
