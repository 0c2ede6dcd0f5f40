"""`upgrade --watch`: whether a new generation that serves beside the old one answers with more errors than that.

The watch is a long commit window (commit_window.py): both generations accept, a worker that ends or freezes or a check
that fails rejects the new one, and nothing has been handed over yet. Here its replies of 500 and above are weighed
against those of the old generation, which has the same clients at the same time: when a neighbour is down, both fail,
and the new code is not to blame.

A few errors in a few requests say little. While the watch lasts the new generation is rejected once it has more errors
than chance explains; at its end its rate is taken as it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from zdd_web.board import LAYOUT, Board

#: One error is an accident: it must not take a release back where there are twenty requests a minute.
LEAST_ERRORS = 2

#: How far above what is allowed the errors must be while more requests are still to come, in standard deviations.
DEVIATIONS = 3.0


class Traffic(NamedTuple):
    """How many requests were answered, and how many of them with a status of 500 or more."""

    requests: int = 0
    errors: int = 0

    @property
    def rate(self) -> float:
        """The share of errors, from 0 to 1."""
        return min(1.0, self.errors / self.requests) if self.requests > 0 else 0.0

    def since(self, before: Traffic) -> Traffic:
        """Return what came after a first look."""
        return Traffic(max(0, self.requests - before.requests), max(0, self.errors - before.errors))

    def __str__(self) -> str:
        return f"{self.errors} of {self.requests} requests ({self.rate:.1%})"


def judge(old: Traffic, new: Traffic, allowed: float, *, is_over: bool) -> str:
    """Return why the new generation is rejected, "" while nothing is against it.

    `allowed` is by how much its share of errors may exceed that of the old one, from 0 to 1.

    >>> judge(Traffic(900, 0), Traffic(900, 90), 0.01, is_over=False)
    'it answers with more errors: status 500 and above for 90 of 900 requests (10.0%), the old generation for 0 of \
900 requests (0.0%), and 1.0% more are allowed'
    >>> judge(Traffic(900, 90), Traffic(900, 95), 0.01, is_over=True)
    ''
    """
    if new.errors < LEAST_ERRORS:
        return ""
    expected = min(1.0, old.rate + allowed) * new.requests
    margin = 0.0 if is_over else DEVIATIONS * math.sqrt(max(expected, 1.0))
    if new.errors <= expected + margin:
        return ""
    return (
        f"it answers with more errors: status 500 and above for {new}, the old generation for {old}, and "
        f"{allowed:.1%} more are allowed"
    )


def traffic(board: Board) -> Traffic:
    """Return what a generation has answered since it began."""
    return Traffic(*board.answered())


class ErrorWatch:
    """A watch over a new generation; `allowed` as in `judge()`."""

    def __init__(self, old: Board, new: Board, allowed: float) -> None:
        self._old, self._new, self._allowed = old, new, allowed
        self._old_before = traffic(old)
        # A new generation's own warm-up requests are not counted on its board; what it counts, a client has asked.
        self._new_before = traffic(new)

    def judge(self, *, is_over: bool = False) -> str:
        """Look, and judge; "" when nothing is against the new generation, or it cannot be read."""
        if self._new.header.layout != LAYOUT:
            return ""
        old, new = traffic(self._old).since(self._old_before), traffic(self._new).since(self._new_before)
        return judge(old, new, self._allowed, is_over=is_over)
