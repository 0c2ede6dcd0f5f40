"""What happened when, in a bounded number of slices: the material of the report's charts."""

from __future__ import annotations

from dataclasses import dataclass, field

from zdd_web.cli.rehearse.latencies import bucket, upper_edge
from zdd_web.cli.rehearse.samples import Outcome, Sample

#: Slices at first, seconds; two become one whenever there are more than `MOST`.
WIDTH = 0.1
MOST = 1200

#: Buckets of latency in a slice are narrower than 13 %: they are for a chart, and there are many slices.
_BITS = 4

_OK = Outcome.OK


@dataclass(slots=True)
class Slice:
    """The requests that ended in one slice of time: complete replies by generation, losses, and latencies."""

    answered: dict[int | None, int] = field(default_factory=dict)
    lost: int = 0
    latencies: dict[int, int] = field(default_factory=dict)
    slowest: float = 0.0  # milliseconds

    def merge(self, other: Slice) -> None:
        """Take in another slice."""
        for generation, count in other.answered.items():
            self.answered[generation] = self.answered.get(generation, 0) + count
        for number, count in other.latencies.items():
            self.latencies[number] = self.latencies.get(number, 0) + count
        self.lost += other.lost
        self.slowest = max(self.slowest, other.slowest)

    def percentile(self, share: float) -> float | None:
        """Return a percentile of its latencies in milliseconds, to 13 %; None where there was no reply."""
        wanted = share * sum(self.latencies.values())
        for number in sorted(self.latencies):
            wanted -= self.latencies[number]
            if wanted <= 0:
                return min(upper_edge(number, _BITS) / 1000, self.slowest)
        return None


class Timeline:
    """Slices of equal `width` seconds from `origin` on, which is None until there was a request."""

    def __init__(self) -> None:
        self.origin: float | None = None
        self.width = WIDTH
        self.slices: list[Slice] = []

    def add(self, sample: Sample) -> None:
        """Take a request that is one (no stale connection, not unsent), in the order in which they ended."""
        if self.origin is None:
            self.origin = sample.started
        index = int((sample.ended - self.origin) / self.width)
        slices = self.slices
        if index >= len(slices):
            while index >= MOST:
                self._halve()
                index = int((sample.ended - self.origin) / self.width)
            slices = self.slices
            slices.extend(Slice() for _ in range(index + 1 - len(slices)))
        place = slices[index]
        if sample.outcome is not _OK and sample.outcome.lost:
            place.lost += 1
        if sample.outcome is _OK or sample.outcome.answered:
            answered, generation = place.answered, sample.generation
            answered[generation] = answered.get(generation, 0) + 1
            took = (sample.ended - sample.started) * 1000
            number = bucket(int(took * 1000), _BITS)
            place.latencies[number] = place.latencies.get(number, 0) + 1
            if took > place.slowest:
                place.slowest = took

    def _halve(self) -> None:
        self.width *= 2
        halved = self.slices[::2]
        for left, right in zip(halved, self.slices[1::2], strict=False):
            left.merge(right)
        self.slices = halved
