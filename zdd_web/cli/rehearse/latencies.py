"""Latencies in bounded memory: a histogram whose buckets are narrower than 0.1 % of what they hold."""

from __future__ import annotations

import math

#: Buckets for each doubling are half of this; 11 bits give buckets of less than 0.1 %.
_BITS = 11


def bucket(microseconds: int, bits: int = _BITS) -> int:
    """Return the number of a value's bucket: numbers ascend with the values.

    >>> bucket(1000), bucket(1001), bucket(100_000) == bucket(100_020)
    (1000, 1001, True)
    """
    shift = microseconds.bit_length() - bits
    return microseconds if shift <= 0 else (shift << bits) | (microseconds >> shift)


def upper_edge(number: int, bits: int = _BITS) -> int:
    """Return the number of microseconds at which the next bucket begins.

    >>> upper_edge(bucket(100_000)), upper_edge(bucket(77))
    (100032, 78)
    """
    shift = number >> bits
    return ((number & ((1 << bits) - 1)) + 1) << shift


class Latencies:
    """Latencies in milliseconds: their percentiles to 0.1 %, and their maximum.

    A percentile is always a value that was measured: of each bucket the first one is kept.

    >>> latencies = Latencies()
    >>> for ms in (1.0, 2.0, 4.0):
    ...     latencies.add(ms)
    >>> latencies.percentile(0.5), latencies.percentile(0.99), latencies.max
    (2.0, 4.0, 4.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.max: float | None = None
        self._counts: dict[int, int] = {}
        self._values: dict[int, float] = {}

    def add(self, milliseconds: float) -> None:
        """Take one value."""
        number = bucket(int(milliseconds * 1000))
        counts = self._counts
        if number in counts:
            counts[number] += 1
        else:
            counts[number] = 1
            self._values[number] = milliseconds
        self.count += 1
        if self.max is None or milliseconds > self.max:
            self.max = milliseconds

    def percentile(self, share: float) -> float | None:
        """Return the nearest-rank percentile, None of nothing."""
        wanted = max(1, math.ceil(share * self.count))
        for number in sorted(self._counts):
            wanted -= self._counts[number]
            if wanted <= 0:
                return self._values[number]
        return None
