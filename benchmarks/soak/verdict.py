"""Whether a chain of upgrades kept what is promised: nothing lost, every upgrade as expected, nothing grown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: How much memory may differ between the first samples and the last, KiB: the allocator keeps what it has once needed.
MEMORY_TOLERANCE = 2048
#: The same for the memory of all processes together.
ALL_MEMORY_TOLERANCE = 6144


class Growth(NamedTuple):
    """The median of a figure in the first tenth of the samples and in the last, and how much more is no growth."""

    name: str
    first: float
    last: float
    tolerance: float

    @property
    def grew(self) -> bool:
        """Whether there is more in the end."""
        return self.last - self.first > self.tolerance


def tolerance(name: str) -> float:
    """Return by how much a figure may differ.

    >>> tolerance("descriptors of the master"), tolerance("resident memory of a worker, KiB")
    (0.0, 2048.0)
    """
    if not name.endswith("KiB"):
        return 0.0
    return float(ALL_MEMORY_TOLERANCE if name.startswith("proportional") else MEMORY_TOLERANCE)


def growth(samples: Sequence[Mapping[str, float]]) -> list[Growth]:
    """Compare the first tenth of the samples with the last, figure by figure; nothing of fewer than two samples.

    >>> growth([{"processes": 3}, {"processes": 3}, {"processes": 4}])
    [Growth(name='processes', first=3, last=4, tolerance=0.0)]
    """
    if len(samples) < 2:
        return []
    tenth = max(1, len(samples) // 10)
    first, last = samples[:tenth], samples[-tenth:]
    return [
        Growth(
            name,
            statistics.median_low([each[name] for each in first]),
            statistics.median_low([each[name] for each in last]),
            tolerance(name),
        )
        for name in samples[0]
    ]


@dataclass(frozen=True)
class Verdict:
    """Why a chain has failed; no reason, no failure."""

    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all was as it must be."""
        return not self.reasons


def judge(
    lost: int,
    unexpected: Sequence[str],
    grown: Sequence[Growth],
    *,
    requests: int,
    upgrades: int,
    leftovers: str = "",
    unsent: int = 0,
) -> Verdict:
    """Judge a chain.

    >>> judge(0, [], [Growth("processes", 3, 3, 0.0)], requests=1000, upgrades=12)
    Verdict(reasons=())
    >>> judge(2, ["upgrade 3: boom"], [Growth("processes", 3, 4, 0.0)], requests=9, upgrades=1).reasons
    ('2 of 9 requests lost', 'upgrade 3: boom', 'processes: from 3 to 4')
    """
    reasons = [f"{lost} of {requests} requests lost"] if lost else []
    reasons += list(unexpected)
    reasons += [f"{each.name}: from {each.first:g} to {each.last:g}" for each in grown if each.grew]
    if leftovers:
        reasons.append(f"after the stop: {leftovers}")
    if unsent:
        reasons.append(f"{unsent} requests could not be sent: see `ulimit -n` and the ports of this machine")
    if not requests or not upgrades:
        reasons.append(f"nothing was shown: {requests} requests, {upgrades} upgrades")
    return Verdict(tuple(reasons))
