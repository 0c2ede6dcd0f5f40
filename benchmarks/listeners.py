"""What `reuseport` costs or gains against `fd`: requests per second and p99, for clients that keep no connection.

`python -m benchmarks.listeners`. In each pair two fresh servers, one of each mode, stand side by side and are loaded in
turns of a quarter of a second: fd, reuseport, reuseport, fd, and so on.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import asdict, dataclass
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.client import FreshLoad
from benchmarks.interval import Interval, median_interval, verdict
from benchmarks.servers import ServerError, gunicorn

#: The project's own bar: within 10 %, or better.
BAR = 0.9
WARM_UP, TURN = 0.5, 0.25
WORKERS = (1, 2, 4, 8, 16)
CLASSES = {"sync": [], "gthread": ["--threads", "4"]}
MODES = ("fd", "reuseport")


@dataclass(frozen=True)
class Case:
    """One line of the table; `view` is `probed` (as little as possible) or `slow` (20 ms)."""

    worker_class: str
    workers: int
    view: str


@dataclass(frozen=True)
class Result:
    """What came out: the ratios of requests per second, their interval, and p99 in milliseconds by mode."""

    case: Case
    ratios: list[float]
    rate: dict[str, float]
    p99: dict[str, float]

    @property
    def interval(self) -> Interval | None:
        """See `median_interval`."""
        return median_interval(self.ratios)


def measure(case: Case, pairs: int, seconds: float, clients: int) -> Result:
    """Load `pairs` pairs of servers."""
    arguments = ["-c", "benchmarks/with_zdd_web.py", f"benchmarks.apps:{case.view}", "--worker-class",
                 case.worker_class, *CLASSES[case.worker_class], "--workers", str(case.workers),
                 "--backlog", "2048", "--log-level", "warning"]  # fmt: skip
    ratios: list[float] = []
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    latencies: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(pairs):
        order = MODES if number % 2 else MODES[::-1]
        replies, taken = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0.0)
        with contextlib.ExitStack() as stack:
            loads = {}
            for mode in order:
                environ = {"ZDD_WEB_LISTENER": mode, "ZDD_WEB_NAME": f"listeners-{mode}"}
                server = stack.enter_context(gunicorn(arguments, environ=environ))
                loads[mode] = stack.enter_context(contextlib.closing(FreshLoad(server.port, clients)))
            for load in loads.values():
                load.ask(WARM_UP)
                load.latencies.clear()
            for turn in range(round(seconds / TURN)):
                for mode in order if turn % 2 == 0 else reversed(order):
                    count, took = loads[mode].ask(TURN)
                    replies[mode] += count
                    taken[mode] += took
        for mode in MODES:
            rates[mode].append(replies[mode] / taken[mode])
            latencies[mode] += loads[mode].latencies
        ratios.append(rates["reuseport"][-1] / rates["fd"][-1])
    return Result(
        case,
        ratios,
        {mode: statistics.median(rates[mode]) for mode in MODES},
        {mode: statistics.quantiles(latencies[mode], n=100)[98] * 1e3 for mode in MODES},
    )


@click.command()
@click.option("--pairs", default=6, show_default=True, type=click.IntRange(1), help="How many; six for an interval.")
@click.option("--seconds", default=2.0, show_default=True, type=click.FloatRange(1), help="Of each server in a pair.")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the result to FILE ('-' for stdout) too.")
def main(pairs: int, seconds: float, clients: int, json_file: TextIO | None) -> None:
    """Measure requests per second in reuseport mode divided by those in fd mode; a connection for each request."""
    click.echo(f"gunicorn {gunicorn_package.__version__}; {clients} clients, a connection for each request; "
               f"{pairs} pairs, {seconds:g} s each in turns of {TURN:g} s")  # fmt: skip
    cases = [Case(name, workers, "probed") for name in CLASSES for workers in WORKERS] + [Case("sync", 16, "slow")]
    results = []
    try:
        for case in cases:
            results.append(measure(case, pairs, seconds, clients))
            ratio = statistics.median(results[-1].ratios)
            click.echo(f"{case.worker_class} {case.workers} {case.view}: {ratio:.3f}", err=True)
    except (ServerError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    rows = []
    for each in results:
        found = each.interval
        said = verdict(found, BAR).split(":")[0]
        rows.append((each.case.worker_class, each.case.workers, "20 ms" if each.case.view == "slow" else "trivial",
                     f"{each.rate['fd']:,.0f}", f"{each.rate['reuseport']:,.0f}",
                     f"{each.p99['fd']:.1f}", f"{each.p99['reuseport']:.1f}", f"{statistics.median(each.ratios):.3f}",
                     f"{found.low:.3f} to {found.high:.3f}" if found else "", said))  # fmt: skip
    click.echo(tabulate(rows, ("class", "workers", "view", "fd /s", "reuseport /s", "fd p99 ms", "reuseport p99 ms",
                               "ratio", "interval", "verdict")))  # fmt: skip
    if json_file is not None:
        json.dump([asdict(each) for each in results], json_file, indent=2)


if __name__ == "__main__":
    main()
