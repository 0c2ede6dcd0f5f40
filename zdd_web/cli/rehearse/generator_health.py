"""Whether the load generator itself was the bottleneck: its thread's share of a CPU, and how late it ran.

A generator that is out of CPU measures itself: it sends less than it was asked to, and reads replies later than they
arrived. So its event loop is asked to run something every 50 ms, and how late it does, and how much CPU the thread used
meanwhile, is part of the report.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

from zdd_web.cli.rehearse.latencies import Latencies

#: How often the event loop is looked at, seconds.
EVERY = 0.05

#: From this share of one CPU on the thread counts as busy.
BUSY = 0.9
#: A generator that was busy for a larger share of its time was the bottleneck.
BUSY_SHARE = 0.1
#: Later than this, milliseconds at the 99th percentile, is a part of the latencies that a reader must know of.
LATE_MS = 50.0
#: A load that sent a smaller share of the requests that were due has not measured the rate that was asked for.
SENT_SHARE = 0.95


@dataclass(frozen=True)
class GeneratorHealth:
    """How the generator itself fared.

    `busy` is the share of the time in which its thread used a whole CPU, `late_ms` how late its event loop ran at the
    99th percentile, in milliseconds. Of an open loop: `asked` and `sent` requests a second, None of a closed one;
    `waited` counts the requests that were due while every client had one in hand, and `clients` those clients.
    """

    busy: float
    late_ms: float
    asked: float | None = None
    sent: float | None = None
    waited: int = 0
    clients: int = 0

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the generator before the figures; nothing of one that kept up.

        >>> GeneratorHealth(busy=0.0, late_ms=2.0, asked=100.0, sent=99.9).notes
        []
        >>> GeneratorHealth(busy=0.4, late_ms=2.0).notes[0][:74]
        'the load generator was the bottleneck: it used a whole CPU for 40 % of the'
        """
        found = []
        if self.busy > BUSY_SHARE:
            found.append(
                f"the load generator was the bottleneck: it used a whole CPU for {self.busy * 100:.0f} % of the time, "
                f"so the server may be faster than shown: use fewer --clients or a lower --rate"
            )
        if self.late_ms > LATE_MS:
            found.append(
                f"the load generator waited for a CPU, up to {self.late_ms:.0f} ms at the 99th percentile, which is "
                f"part of every latency: use a lower --rate, fewer --clients, or a machine with more CPUs"
            )
        if self.asked and self.sent is not None and self.sent < SENT_SHARE * self.asked:
            why = (
                f"all {self.clients} clients were waiting for replies: use more --clients"
                if self.waited
                else "the generator could not send more"
            )
            found.append(
                f"--rate {self.asked:g} was not reached: {self.sent:.1f} requests a second were sent, as {why}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the notes."""
        return {**asdict(self), "notes": self.notes}


class Watch:
    """Looks at the event loop that it runs in."""

    def __init__(self) -> None:
        self._late = Latencies()
        self._looks = self._busy = 0

    async def run(self) -> None:
        """Look until cancelled."""
        wall, cpu = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(EVERY)
            now, used = time.monotonic(), time.thread_time()
            self._late.add(max(0.0, now - wall - EVERY) * 1000)
            self._looks += 1
            self._busy += (used - cpu) >= BUSY * (now - wall)
            wall, cpu = now, used

    def health(self, asked: float | None, sent: float | None, waited: int, clients: int) -> GeneratorHealth:
        """Return what was seen so far."""
        busy = self._busy / self._looks if self._looks else 0.0
        return GeneratorHealth(busy, self._late.percentile(0.99) or 0.0, asked, sent, waited, clients)
