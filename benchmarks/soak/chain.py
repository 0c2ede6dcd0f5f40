"""One chain of upgrades in one mode, under load."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak import figures
from benchmarks.soak.load import STEADY, LoadProcess
from benchmarks.soak.service import FAULTS, Service, running
from benchmarks.soak.verdict import Growth, Verdict, growth, judge

#: Samples of a chain: enough for tenths, and no more the longer it is.
SAMPLES = 100

#: Upgrades with an unexpected end that are kept whole.
MOST_UNEXPECTED = 20

#: What is happening, as the clients are told it, while a worker crashes with what it has in hand.
_CRASH = "worker_crash"


@dataclass(frozen=True)
class Plan:
    """What a chain is to do. One of `broken_each` upgrades is of broken code; 0 for none."""

    mode: str
    worker_class: str
    upgrades: int
    workers: int = 2
    broken_each: int = 10
    clients: int = 12
    kept: int = 64

    def faults(self) -> Iterator[str]:
        """Return how each upgrade is broken, "" for a good one; every fault in turn.

        >>> list(Plan("fd", "gthread", 6, broken_each=2).faults())
        ['', 'import_error', '', 'worker_crash', '', 'never_ready']
        """
        broken = 0
        for number in range(1, self.upgrades + 1):
            if self.broken_each and number % self.broken_each == 0:
                yield FAULTS[broken % len(FAULTS)]
                broken += 1
            else:
                yield ""


@dataclass
class Chain:
    """A chain and what was measured of it so far."""

    plan: Plan
    load: dict[str, Any] = field(default_factory=dict)
    latencies: dict[str, list[float | None]] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)
    held: int = 0
    good: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0
    leftovers: str = ""

    @property
    def upgrades(self) -> int:
        """How many were made."""
        return self.good + self.broken.total()

    @property
    def lost(self) -> int:
        """Lost requests that no crashed worker had in hand."""
        every: Counter[str] = Counter(self.load.get("lost", {}))
        return every.total() - self.held

    @property
    def growth(self) -> list[Growth]:
        """What has grown, or not."""
        return growth(self.samples)

    @property
    def verdict(self) -> Verdict:
        """Whether all was as it must be."""
        return judge(self.lost, self.unexpected, self.growth, requests=self.load.get("requests", 0),
                     upgrades=self.upgrades, leftovers=self.leftovers, unsent=self.load.get("unsent", 0))  # fmt: skip

    def run(self, log: Path, is_over: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Run it until it is done or `is_over()`; what was measured by then is here, whatever is raised.

        Raises `ServerError` where it cannot go on.
        """
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="zdd-web-soak-") as directory:
            plan = self.plan
            with running(plan.mode, plan.worker_class, plan.workers, Path(directory), log) as service:
                with LoadProcess(service.port, plan.clients, plan.kept) as load:
                    try:
                        self._upgrades(service, load, is_over, say)
                    finally:
                        try:
                            load.end()
                        finally:
                            self._take(load)
                            self.seconds = time.monotonic() - began
                self.leftovers = service.stop()

    def _upgrades(self, service: Service, load: LoadProcess, is_over: Callable[[], bool],
                  say: Callable[[str], None]) -> None:  # fmt: skip
        plan, each = self.plan, max(1, self.plan.upgrades // SAMPLES)
        for number, fault in enumerate(plan.faults(), 1):
            if is_over():
                return
            load.doing(f"upgrade {number}{f': {fault}' if fault else ''}")
            self._upgrade(service, number, fault)
            load.doing(STEADY)
            self._take(load)
            if not fault and (number % each == 0 or len(self.samples) < 2):
                self.samples.append(figures.take(service) | figures.of_clients(load.pid))
            if number % max(1, plan.upgrades // 20) == 0:
                say(f"{plan.mode}: {number} of {plan.upgrades} upgrades, {self.load['requests']} requests, "
                    f"{self.lost} lost")  # fmt: skip

    def _upgrade(self, service: Service, number: int, fault: str) -> None:
        outcome = service.upgrade(fault)
        self.slowest = max(self.slowest, outcome.seconds if not fault else 0.0)
        if fault:
            self.broken[fault] += 1
        else:
            self.good += 1
        if not outcome.expected and len(self.unexpected) < MOST_UNEXPECTED:
            self.unexpected.append(f"upgrade {number} ({fault or 'good'}): {outcome.detail}")

    def _take(self, load: LoadProcess) -> None:
        self.load, self.latencies, self.losses = load.counts, load.latencies, load.losses
        held = sum(count for doing, count in load.lost_while.items() if doing.endswith(_CRASH))
        # A client has one request at a time, so no more than these can have been in hand in the workers that crashed.
        self.held = min(held, self.plan.clients * (self.broken[_CRASH] + 1))
