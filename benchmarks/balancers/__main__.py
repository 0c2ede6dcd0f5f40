"""What a balancer's clients lose when the instances behind it are restarted in turn: `python -m benchmarks.balancers`.

SIGTERM to one instance, wait for its end, start it again, wait until it answers; some seconds later the other one.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from typing import Any, TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.balancers.proxies import PROXIES, Proxy, running
from benchmarks.balancers.traffic import Traffic, answers
from benchmarks.servers import ServerError, gunicorn
from tests.helpers.ports import free_port

HEADERS = ("balancer", "settings", "DRAIN_DELAY", "restarts", "requests", "lost", "of them")
PROGRAMS = tuple(dict.fromkeys(proxy.program for proxy in PROXIES))


@dataclass(frozen=True)
class Instance:
    """How an instance is started; it has the same port each time."""

    port: int
    worker_class: str
    drain_delay: float

    def start(self) -> contextlib.AbstractContextManager[object]:
        """Start it on entry, and wait until it answers; stop it with SIGTERM on exit, and wait for its end."""
        arguments = ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:echoing", "--worker-class", self.worker_class,
                     "--workers", "2", "--keep-alive", "75", "--log-level", "warning"]  # fmt: skip
        if self.worker_class == "gthread":
            arguments += ["--threads", "4"]
        return gunicorn(arguments, port=self.port, environ={"ZDD_WEB_DRAIN_DELAY": f"{self.drain_delay:g}"})


def measure(proxy: Proxy, instances: list[Instance], rounds: int, settle: float, clients: int) -> Traffic:
    """Restart each instance in turn, `rounds` times, under load through the balancer. Raises `ServerError`."""
    with contextlib.ExitStack() as stack:
        running_now = [stack.enter_context(contextlib.ExitStack()) for _ in instances]
        for slot, instance in zip(running_now, instances, strict=True):
            slot.enter_context(instance.start())
        port = stack.enter_context(running(proxy, [instance.port for instance in instances], answers))
        with Traffic(port, clients) as traffic:
            time.sleep(settle)
            for _ in range(rounds):
                for slot, instance in zip(running_now, instances, strict=True):
                    slot.close()
                    slot.enter_context(instance.start())
                    time.sleep(settle)
        return traffic


@click.command()
@click.option("--proxy", "programs", multiple=True, type=click.Choice(PROGRAMS), default=PROGRAMS, help="Which.")
@click.option("--drain-delay", "delays", multiple=True, type=click.FloatRange(0), default=(0.0, 5.0), show_default=True,
              help="DRAIN_DELAY of the instances, seconds.")  # fmt: skip
@click.option("--worker-class", type=click.Choice(["sync", "gthread"]), default="gthread", show_default=True)
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1), help="Restarts of each instance.")
@click.option("--settle", default=4.0, show_default=True, type=click.FloatRange(0), help="Seconds between restarts.")
@click.option("--clients", default=12, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(
    programs: tuple[str, ...],
    delays: tuple[float, ...],
    worker_class: str,
    rounds: int,
    settle: float,
    clients: int,
    json_file: TextIO | None,
) -> None:
    """Restart two instances behind nginx, HAProxy and Envoy in turn; print what their clients lost."""
    rows: list[list[object]] = []
    results: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for proxy in PROXIES:
        if proxy.program not in programs:
            continue
        if proxy.path is None:
            rows.append([proxy.program, proxy.settings, "not installed"])
            continue
        versions[proxy.program] = proxy.version_line()
        for delay in delays:
            click.echo(f"{proxy.program}, {proxy.settings}, DRAIN_DELAY = {delay:g} ...", err=True)
            instances = [Instance(free_port(), worker_class, delay) for _ in range(2)]
            try:
                traffic = measure(proxy, instances, rounds, settle, clients)
            except ServerError as error:
                raise click.ClickException(str(error)) from None
            lost = dict(traffic.lost.most_common())
            reasons = ", ".join(f"{reason}: {count}" for reason, count in lost.items())
            click.echo(f"... lost {sum(lost.values())} of {traffic.requests} {reasons}", err=True)
            rows.append([proxy.program, proxy.settings, f"{delay:g}", 2 * rounds, traffic.requests,
                         sum(lost.values()), reasons or "-"])  # fmt: skip
            results.append({"proxy": proxy.program, "settings": proxy.settings, "drain_delay": delay,
                            "restarts": 2 * rounds, "requests": traffic.requests, "lost": lost})  # fmt: skip
    click.echo(f"gunicorn {gunicorn_package.__version__}, {worker_class}, 2 workers; {clients} clients, half POSTs")
    for version in versions.values():
        click.echo(version)
    click.echo(tabulate(rows, HEADERS, disable_numparse=True))
    if json_file is not None:
        json.dump(results, json_file, indent=2)


if __name__ == "__main__":
    main()
