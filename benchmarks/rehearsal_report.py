"""What a long rehearsal's report costs: `python -m benchmarks.rehearsal_report [UPGRADES] [REQUESTS]`.

Feeds requests to the tally that a rehearsal feeds, without a server, and makes the report in every format. Prints how
long that took after the last request, what each request had cost by then, and the peak resident memory of the process.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from zdd_web.cli.rehearse import junit, render, report
from zdd_web.cli.rehearse.html import page
from zdd_web.cli.rehearse.samples import Handover, Outcome, PhaseSpan, Sample
from zdd_web.cli.rehearse.tally import Tally

#: Of ten million requests that is more than the report keeps whole.
LOSS_IN = 500


def phases(upgrades: int) -> list[PhaseSpan]:
    """Return the phases of each generation of that load."""
    found = []
    for generation in range(1, upgrades + 2):
        begin = 6.0 * generation - 3.0
        spans = [("booting", 0.0, 0.9), ("serving", 0.9, 7.0), ("retiring", 7.0, 7.2), ("stopped", 7.2, 7.3)]
        found += [PhaseSpan(generation, name, begin + since, begin + until) for name, since, until in spans]
    return found


def feed(tally: Tally, upgrades: int, requests: int) -> None:
    """Have each upgrade take a second and the load five more, with a loss in `LOSS_IN` requests."""
    each = requests // upgrades
    for number in range(1, upgrades + 1):
        begin = 6.0 * number
        for n in range(each):
            at = begin + 6.0 * n / each
            if n == each // 2:
                tally.expect(at)
            elif n == each // 2 + each // 6:
                tally.handover(Handover(number, number, number + 1, at - 1.0, at - 0.1, at, ok=True))
            outcome = Outcome.OK if (number * each + n) % LOSS_IN else Outcome.RESET
            # From ready_at on the new generation answers.
            generation = number + (at > begin + 3.9)
            took = 0.002 + (n % 977) * 1e-5
            tally.append(Sample(n % 32, "new", "/", at, at, at + took, outcome, 200, generation, "", 12, "abcd"))


def main() -> None:
    """Feed and report."""
    upgrades, requests = (int(each) for each in (*sys.argv[1:], "1000", "10000000")[:2])
    tally = Tally()
    began = time.monotonic()
    feed(tally, upgrades, requests)
    fed = time.monotonic()
    made = report.of(tally, stop=None, phases=phases(upgrades))
    sizes = {
        "text": len(render.text(made)),
        "page": len(page(made)),
        "JSON": len(json.dumps(made.to_json(), indent=2)),
        "JUnit": len(junit.document(made)),
    }
    done = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(made.handovers):,} upgrades, {made.requests:,} requests, {made.lost:,} lost")
    print(f"while the load ran: {(fed - began) / requests * 1e6:.1f} us for each request")
    written = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    print(f"after it: {done - fed:.2f} s for the report in every format (characters: {written})")
    print(f"most memory: {peak:.0f} MB")


if __name__ == "__main__":
    main()
