"""What zdd_web costs per request: requests per second with it, divided by those without.

`python -m benchmarks.overhead`. In each pair two fresh servers, one with and one without, stand side by side on one
core and are loaded in turns of a tenth of a second: without, with, with, without, and so on. A machine that gets
slower or faster meanwhile, for a second or two as shared ones do, does so for both. The result is the median of the
pairs' ratios with its interval.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import TextIO

import click
import gunicorn as gunicorn_package

from benchmarks.client import Load
from benchmarks.interval import Interval, median_interval, verdict
from benchmarks.servers import ServerError, cores, gunicorn, pinned

#: The project's own bar for the ratio.
BAR = 0.97
#: Seconds of load before a run that nobody measures.
WARM_UP = 1.0
#: Seconds of one turn.
TURN = 0.1

WITHOUT = ["benchmarks.apps:plain"]
WITH = ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:probed"]
SAME = ["--worker-class", "gthread", "--workers", "1", "--threads", "4", "--keep-alive", "5", "--log-level", "warning"]


@dataclass(frozen=True)
class Run:
    """One run: requests per second, and the server's CPU time for each of them in microseconds."""

    rate: float
    cpu: float


@dataclass(frozen=True)
class Pair:
    """One pair of runs; `first` is which of them ran first."""

    without: Run
    with_zdd_web: Run
    first: str

    @property
    def ratio(self) -> float:
        """Requests per second with, divided by those without."""
        return self.with_zdd_web.rate / self.without.rate

    @property
    def cpu_ratio(self) -> float:
        """CPU time for a request without, divided by that with: the same sense as `ratio`, less hurt by neighbours."""
        return self.without.cpu / self.with_zdd_web.cpu


def _pair(number: int, seconds: float, connections: int, arguments: dict[str, list[str]]) -> Pair:
    order = ["without", "with"] if number % 2 else ["with", "without"]
    server_cpus, client_cpus = cores()
    replies, taken, cpu = dict.fromkeys(order, 0), dict.fromkeys(order, 0.0), dict.fromkeys(order, 0.0)
    with contextlib.ExitStack() as stack:
        servers = {
            which: stack.enter_context(gunicorn([*arguments[which], *SAME], cpus=server_cpus)) for which in order
        }
        stack.enter_context(pinned(client_cpus))
        loads = {
            which: stack.enter_context(contextlib.closing(Load(servers[which].port, connections))) for which in order
        }
        for load in loads.values():
            load.ask(WARM_UP)
        before = {which: servers[which].cpu_seconds() for which in order}
        for turn in range(round(seconds / TURN)):
            # ABBA: what changes steadily over four turns is the same for both.
            for which in order if turn % 2 == 0 else reversed(order):
                count, took = loads[which].ask(TURN)
                replies[which] += count
                taken[which] += took
        for which in order:
            cpu[which] = servers[which].cpu_seconds() - before[which]
    runs = {which: Run(replies[which] / taken[which], cpu[which] / replies[which] * 1e6) for which in order}
    return Pair(runs["without"], runs["with"], order[0])


def _text(run: Run) -> str:
    return f"{run.rate:7,.0f}/s {run.cpu:5.0f} us"


def _interval_text(interval: Interval | None, pairs: int) -> str:
    if interval is None:
        return f"{pairs} pairs are too few for an interval"
    return (f"median ratio {interval.median:.4f}, {interval.coverage:.1%} interval "
            f"{interval.low:.4f} to {interval.high:.4f} (order statistics of {pairs} pairs)")  # fmt: skip


@click.command()
@click.option("--pairs", default=11, show_default=True, type=click.IntRange(1), help="How many; six for an interval.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(1), help="Of each server in a pair.")
@click.option("--connections", default=16, show_default=True, type=click.IntRange(1), help="Kept connections.")
@click.option("--same", is_flag=True, help="Run the server without zdd_web on both sides: the noise of this machine.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the result to FILE ('-' for stdout) too.")
def main(pairs: int, seconds: float, connections: int, same: bool, json_file: TextIO | None) -> None:
    """Measure requests per second with zdd_web divided by without, on a trivial view under gthread."""
    server_cpus, client_cpus = cores()
    apart = "pinned to different cores" if server_cpus != client_cpus else "NOT pinned: this machine has one core"
    click.echo(f"gunicorn {gunicorn_package.__version__}, gthread, 1 worker, 4 threads; {connections} kept "
               f"connections, {seconds:g} s each in turns of {TURN:g} s; server and client {apart}")  # fmt: skip
    if same:
        click.echo("both sides run WITHOUT zdd_web")
    arguments = {"without": WITHOUT, "with": WITHOUT if same else WITH}
    done: list[Pair] = []
    try:
        for number in range(1, pairs + 1):
            done.append(_pair(number, seconds, connections, arguments))
            pair = done[-1]
            click.echo(f"pair {number:2}  without {_text(pair.without)}  with {_text(pair.with_zdd_web)}  "
                       f"ratio {pair.ratio:.4f}, by CPU time {pair.cpu_ratio:.4f}  ({pair.first} first)")  # fmt: skip
    except (ServerError, ValueError, ConnectionError) as error:
        raise click.ClickException(str(error)) from None
    interval = median_interval([pair.ratio for pair in done])
    cpu_interval = median_interval([pair.cpu_ratio for pair in done])
    click.echo()
    click.echo(f"requests per second: {_interval_text(interval, len(done))}")
    click.echo(f"by CPU time:         {_interval_text(cpu_interval, len(done))}")
    click.echo(verdict(interval, BAR))
    if json_file is not None:
        result = {
            "gunicorn": gunicorn_package.__version__, "seconds": seconds,
            "connections": connections, "same": same, "bar": BAR, "verdict": verdict(interval, BAR),
            "pairs": [{**asdict(pair), "ratio": pair.ratio, "cpu_ratio": pair.cpu_ratio} for pair in done],
            "interval": asdict(interval) if interval else None,
            "cpu_interval": asdict(cpu_interval) if cpu_interval else None,
        }  # fmt: skip
        json.dump(result, json_file, indent=2)


if __name__ == "__main__":
    main()
