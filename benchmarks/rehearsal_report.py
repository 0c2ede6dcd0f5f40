"""What a long rehearsal's report costs: `python -m benchmarks.rehearsal_report`.

Feeds requests to the tally that a rehearsal feeds, without a server, and makes the report in every format. Prints how
long that took after the last request, what each request had cost by then, and the peak resident memory of the process.
"""

from __future__ import annotations

import json
import resource
import time
from typing import TextIO

import click

from zdd_web.cli.rehearse import junit_report, report, text_report
from zdd_web.cli.rehearse.html_report import page
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


def feed(tally: Tally, upgrades: int, each: int) -> None:
    """Have each upgrade take a second and the load five more, in `each` requests; one in `LOSS_IN` is lost."""
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


@click.command()
@click.option("--upgrades", default=1000, show_default=True, type=click.IntRange(1), help="How many upgrades.")
@click.option("--requests", default=10_000_000, show_default=True, type=click.IntRange(1), help="How many requests.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(upgrades: int, requests: int, json_file: TextIO | None) -> None:
    """Feed so many requests to a rehearsal's tally, without a server, and make the report in every format."""
    tally = Tally()
    began = time.monotonic()
    feed(tally, upgrades, max(1, requests // upgrades))
    fed = time.monotonic()
    made = report.of(tally, stop=None, phases=phases(upgrades))
    sizes = {
        "text": len(text_report.text(made)),
        "page": len(page(made)),
        "JSON": len(json.dumps(made.to_json(), indent=2)),
        "JUnit": len(junit_report.document(made)),
    }
    done = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(f"{len(made.handovers):,} upgrades, {made.requests:,} requests, {made.lost:,} lost")
    click.echo(f"while the load ran: {(fed - began) / made.requests * 1e6:.1f} us for each request")
    written = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    click.echo(f"after it: {done - fed:.2f} s for the report in every format (characters: {written})")
    click.echo(f"peak resident memory: {peak:.0f} MB")
    if json_file is not None:
        figures = {"upgrades": len(made.handovers), "requests": made.requests, "seconds": done - fed, "peak_mb": peak}
        json.dump(figures, json_file, indent=2)


if __name__ == "__main__":
    main()
