"""What a balancer's clients and its kept connections notice of upgrades: `python -m benchmarks.balancers.deploys`.

Two instances behind nginx with `keepalive` and HAProxy with `http-reuse always`, retries off, half of the requests
POSTs. They are upgraded in turn. How many connections the balancer opens to them meanwhile is compared with how many
it opens while a third service, which has no traffic, is upgraded as often: on a busy machine a balancer needs more
connections at a time, wherever the work comes from. `HAND_OVER_CONNECTIONS` leaves it those that it has.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.balancers.proxies import KEEPING, Proxy, running
from benchmarks.balancers.traffic import Traffic, answers
from benchmarks.deployed import upgrade
from benchmarks.servers import ServerError, gunicorn

PROGRAMS = tuple(proxy.program for proxy in KEEPING)

#: Until the balancer has as many connections as it needs, seconds.
WARM_UP = 5.0


@dataclass(frozen=True)
class Span:
    """What a balancer did with its connections to the instances in some seconds: opened, and ended of those it had."""

    seconds: float
    opened: int
    ended: int

    def __str__(self) -> str:
        return f"{self.opened} opened, {self.ended} ended, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Row:
    """One balancer; `another` is while a service is upgraded that it does not know."""

    balancer: str
    handed_over: bool
    upgrades: int
    requests: int
    errors: int
    reasons: dict[str, int]
    another: Span
    deploying: Span


def established(port: int) -> set[str]:
    """Return the ports of the connections to a port of this machine.

    >>> import socket
    >>> with socket.create_server(("127.0.0.1", 0)) as server:
    ...     name = server.getsockname()
    ...     with socket.create_connection(name) as client:
    ...         established(name[1]) == {str(client.getsockname()[1])}
    True
    """
    with Path("/proc/net/tcp").open() as table:
        rows = [line.split() for line in list(table)[1:]]
    return {
        str(int(local.rpartition(":")[2], 16))
        for _, local, remote, state, *_ in rows
        if state == "01" and int(remote.rpartition(":")[2], 16) == port
    }


def measure(proxy: Proxy, worker_class: str, upgrades: int, clients: int, *, hand_over: bool) -> Row:
    """Upgrade the instances behind one balancer in turn, under load. Raises `ServerError`."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-")))
        pid_files, ports = [directory / "one", directory / "two", directory / "third"], list[int]()
        for pid_file in pid_files:
            arguments = ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:echoing", "--worker-class", worker_class,
                         "--workers", "2", "--keep-alive", "75", "--pid", str(pid_file)]  # fmt: skip
            arguments += ["--threads", "8"] if worker_class == "gthread" else []
            environ = {"ZDD_WEB_HAND_OVER_CONNECTIONS": "01"[hand_over], "ZDD_WEB_NAME": pid_file.name}
            ports.append(stack.enter_context(gunicorn(arguments, environ=environ)).port)
        third, ports = pid_files.pop(), ports[:2]
        port = stack.enter_context(running(proxy, ports, answers))
        with Traffic(port, clients) as traffic:
            time.sleep(WARM_UP)
            another = _span(traffic, ports, [third] * upgrades)
            deploying = _span(traffic, ports, [pid_files[number % 2] for number in range(upgrades)])
        name, lost = f"{proxy.program}, {proxy.settings}", dict(traffic.lost.most_common())
        return Row(name, hand_over, upgrades, traffic.requests, sum(lost.values()), lost, another, deploying)


def _span(traffic: Traffic, ports: list[int], to_upgrade: list[Path]) -> Span:
    # Only those that replies have come by: HAProxy's health checks use others.
    known, began = set(traffic.upstream_ports), time.monotonic()
    before = known & _established(ports)
    for pid_file in to_upgrade:
        upgrade(pid_file)
    time.sleep(1)
    opened, ended = traffic.upstream_ports - known, before - _established(ports)
    return Span(time.monotonic() - began, len(opened), len(ended))


def _established(ports: list[int]) -> set[str]:
    return {client for port in ports for client in established(port)}


@click.command()
@click.option("--upgrades", default=50, show_default=True, type=click.IntRange(1), help="Behind each balancer.")
@click.option("--proxy", "programs", multiple=True, type=click.Choice(PROGRAMS), default=PROGRAMS, help="Which.")
@click.option("--worker-class", type=click.Choice(["gthread", "gevent"]), default="gthread", show_default=True)
@click.option("--clients", default=12, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--off/--no-off", default=True, show_default=True, help="The same with HAND_OVER_CONNECTIONS off.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(
    upgrades: int,
    programs: tuple[str, ...],
    worker_class: str,
    clients: int,
    off: bool,
    json_file: TextIO | None,
) -> None:
    """Upgrade two instances behind nginx and HAProxy in turn; print errors, and connections that were opened."""
    rows, missing = list[Row](), list[str]()
    for proxy in (proxy for proxy in KEEPING if proxy.program in programs):
        if proxy.path is None:
            missing.append(proxy.program)
            continue
        click.echo(proxy.version_line())
        for hand_over in (True, False)[: 1 + off]:
            try:
                rows.append(measure(proxy, worker_class, upgrades, clients, hand_over=hand_over))
            except ServerError as error:
                raise click.ClickException(str(error)) from None
            click.echo(f"{rows[-1]}", err=True)
    click.echo(f"gunicorn {gunicorn_package.__version__}, {worker_class}, 2 workers; {clients} clients, half POSTs")
    cells = [
        [row.balancer, "on" if row.handed_over else "off", row.upgrades, row.requests, row.errors,
         row.another, row.deploying,
         ", ".join(f"{reason}: {count}" for reason, count in row.reasons.items()) or "-"]
        for row in rows
    ]  # fmt: skip
    columns = ["balancer", "handing over", "upgrades", "requests", "errors", "while another is deployed",
               "while deploying", "of the errors"]  # fmt: skip
    click.echo(tabulate(cells, columns, tablefmt="pipe", disable_numparse=True))
    for each in missing:
        click.echo(f"{each} is not installed")
    if json_file is not None:
        json.dump([asdict(row) for row in rows], json_file, indent=2)


if __name__ == "__main__":
    main()
