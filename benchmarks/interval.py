"""A confidence interval for a median that assumes nothing about how the values are distributed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The median of some values; `low` and `high` enclose the true one with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return the narrowest symmetric pair of order statistics that covers the median with `confidence` or more.

    Each value lies below the true median with probability 1/2, so that how many do is binomial. The coverage is
    exact, and as a rule above the one asked for. None with too few values: 95 % needs six.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    Interval(median=3.5, low=1.0, high=6.0, coverage=0.96875)
    """
    ordered = sorted(values)
    count = len(ordered)
    best = None
    outside = 0.0
    for rank in range((count + 1) // 2):
        # `rank` values or fewer below the median put it beneath ordered[rank].
        outside += math.comb(count, rank) / 2**count
        coverage = 1 - 2 * outside
        if coverage < confidence:
            break
        best = Interval(statistics.median(ordered), ordered[rank], ordered[count - 1 - rank], coverage)
    return best


def verdict(interval: Interval | None, bar: float) -> str:
    """Say on which side of `bar` the interval lies.

    >>> verdict(Interval(0.99, 0.98, 1.01, 0.988), 0.97)
    'reaches 0.97: the whole interval lies at or above it'
    """
    if interval is None:
        return f"not known whether it reaches {bar:g}: too few pairs for an interval"
    if interval.low >= bar:
        return f"reaches {bar:g}: the whole interval lies at or above it"
    if interval.high < bar:
        return f"does not reach {bar:g}: the whole interval lies below it"
    return f"not decided: {bar:g} lies within the interval; measure more pairs or on a quieter machine"
