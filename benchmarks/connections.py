"""What becomes of thousands of kept connections in a deploy.

`python -m benchmarks.connections`. Clients keep N connections to four workers and ask on random ones, a third of the
time with a POST, while the service is upgraded, reloaded, replaces its workers (`max_requests`), or stops. Beside
zdd_web with HAND_OVER_CONNECTIONS on and off: gunicorn, upgraded by hand (USR2, and TERM to the old master when the new
one serves).
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.deployed import until, upgrade
from benchmarks.kept_clients import KeptClients, Seen
from benchmarks.servers import Server, ServerError, gunicorn
from zdd_web import metrics, service

#: Other benchmarks may run services on this machine.
NAME = f"connections-{os.getpid()}"
WORKERS = 4
CLASSES = ("gthread", "gevent", "asgi", "uvicorn")
SERVERS = ("on", "off", "gunicorn")
ACTIONS = ("upgrade", "reload", "max_requests", "stop", "lame_duck")

#: With and without a lame duck: nothing is left that connections could be handed to, and gunicorn has none.
STOPS = {"stop": 0.0, "lame_duck": 5.0}

#: Seconds that clients ask before a stop.
BEFORE_STOP = 2.0

#: How long a reload, or gunicorn's old generation, is given, and how long workers are recycled for, seconds.
SETTLES = 5.0


@dataclass(frozen=True)
class Service:
    """A service under test, and how it is deployed."""

    server: Server
    pid_file: Path
    is_ours: bool

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())

    def upgrade(self) -> None:
        """Upgrade the service, and wait until the old generation is gone. Raises `ServerError`."""
        if self.is_ours:
            upgrade(self.pid_file)
            until("the old generation's end", lambda: len(_generations()) == 1)
            return
        old, second = self.pid, Path(f"{self.pid_file}.2")
        os.kill(old, signal.SIGUSR2)
        until("a second master", second.exists)
        # What people do: it has no way to say that its workers serve.
        time.sleep(2)
        os.kill(old, signal.SIGTERM)
        until("the old master's end", lambda: not second.exists() and not _runs(old))

    def stop(self) -> None:
        """Stop the service, and wait until its master is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGTERM)
        until("the end of the master", lambda: not _runs(pid))

    def reload(self) -> None:
        """Reload the service and wait until the old workers are gone."""
        before = _workers() if self.is_ours else set()
        os.kill(self.pid, signal.SIGHUP)
        if self.is_ours:
            until("the old workers' end", lambda: not before & _workers())
        else:
            time.sleep(SETTLES)


def _generations() -> list[service.Generation]:
    return [each for each in service.generations() if each.header.name == NAME]


def _workers() -> set[int]:
    return {worker.pid for each in _generations() for worker in each.snapshot().workers}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(worker_class: str, which: str, action: str, per_worker: int) -> Iterator[Service]:
    """Run a service."""
    is_asgi = worker_class in ("asgi", "uvicorn")
    app = "benchmarks.apps:plain_asgi" if is_asgi else "benchmarks.apps:plain"
    spelled = "uvicorn_worker.UvicornWorker" if worker_class == "uvicorn" else worker_class
    with tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-") as directory:
        pid_file = Path(directory, "pid")
        arguments = [app, "--worker-class", spelled, "--workers", str(WORKERS), "--pid", str(pid_file)]
        arguments += ["--keep-alive", "600", "--worker-connections", "20000", "--backlog", "4096"]
        arguments += ["--threads", "4"] if worker_class == "gthread" else []
        arguments += ["--max-requests", str(per_worker)] if action == "max_requests" else []
        arguments += [] if which == "gunicorn" else ["-c", "benchmarks/with_zdd_web.py"]
        environ = {"ZDD_WEB_NAME": NAME, "ZDD_WEB_HAND_OVER_CONNECTIONS": "01"[which == "on"]}
        environ["ZDD_WEB_DRAIN_DELAY"] = f"{STOPS.get(action, 0.0):g}"
        with gunicorn(arguments, environ=environ) as server:
            yield Service(server, pid_file, which != "gunicorn")


@dataclass(frozen=True)
class Row:
    """One run."""

    worker_class: str
    server: str
    action: str
    seen: Seen
    handed_over: int
    seconds: float


def measure(worker_class: str, which: str, action: str, connections: int, times: int, per_worker: int) -> Row:
    """Run one service under load, deploy it so many times, and return what its clients saw."""
    with running(worker_class, which, action, per_worker) as under_test:
        clients = KeptClients(under_test.server.port, connections, threads=2, pause=0.001).start()
        began = time.monotonic()
        try:
            clients.until_asked(100)
            if action == "max_requests":
                time.sleep(times * SETTLES)
            else:
                for _ in range(times):
                    under_test.upgrade() if action == "upgrade" else under_test.reload()
                    clients.until_asked(20)
            seconds = time.monotonic() - began
        finally:
            seen = clients.stop()
        handed_over = 0
        if under_test.is_ours:
            handed_over = max(metrics.totals(each.board).connections_handed_over for each in _generations())
        return Row(worker_class, which, action, seen, handed_over, seconds)


def measure_stops(worker_class: str, which: str, action: str, connections: int, stops: int) -> Row:
    """Stop a service under load so many times, each time a new one, and add up what its clients saw."""
    total, began = Seen(), time.monotonic()
    for _ in range(stops):
        with running(worker_class, which, action, 0) as under_test:
            clients = KeptClients(under_test.server.port, connections, threads=2, pause=0.001).start()
            try:
                clients.until_asked(100)
                time.sleep(BEFORE_STOP)
                under_test.stop()
            finally:
                seen = clients.stop()
        total.asked, total.lost, total.closed = (
            total.asked + seen.asked,
            total.lost + seen.lost,
            total.closed + seen.closed,
        )
        total.stall = max(total.stall, seen.stall)
        total.reasons += seen.reasons
    return Row(worker_class, which, action, total, 0, time.monotonic() - began)


@click.command()
@click.option("--connections", default=4000, show_default=True, type=click.IntRange(1))
@click.option("--times", default=20, show_default=True, type=click.IntRange(1), help="Upgrades, or reloads, a run.")
@click.option("--stops", default=5, show_default=True, type=click.IntRange(1), help="Services that are stopped, a run.")
@click.option("--max-requests", "per_worker", default=1000, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="300 connections, twice, one stop, max_requests 300.")
@click.option("--class", "classes", multiple=True, type=click.Choice(CLASSES), help="Only this one; repeatable.")
@click.option("--server", "servers", multiple=True, type=click.Choice(SERVERS), help="Only this one; repeatable.")
@click.option("--action", "actions", multiple=True, type=click.Choice(ACTIONS), help="Only this one; repeatable.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(
    connections: int,
    times: int,
    stops: int,
    per_worker: int,
    quick: bool,
    classes: tuple[str, ...],
    servers: tuple[str, ...],
    actions: tuple[str, ...],
    json_file: TextIO | None,
) -> None:
    """Measure what clients that keep connections notice of upgrades, reloads, recycled workers and stops."""
    if quick:
        connections, times, stops, per_worker = 300, 2, 1, 300
    click.echo(f"gunicorn {gunicorn_package.__version__}, {WORKERS} workers, {connections} kept connections; "
               f"upgrades and reloads: {times} a run, stops: {stops}")  # fmt: skip
    rows: list[Row] = []
    for worker_class in classes or CLASSES:
        for which in servers or SERVERS:
            for action in actions or ACTIONS:
                if (which, action) == ("gunicorn", "lame_duck"):
                    continue
                try:
                    if action in STOPS:
                        rows.append(measure_stops(worker_class, which, action, connections, stops))
                    else:
                        rows.append(measure(worker_class, which, action, connections, times, per_worker))
                except ServerError as error:
                    click.echo(f"{worker_class}, {which}, {action}: {error}", err=True)
                    continue
                click.echo(_line(rows[-1]))
    columns = ["worker class", "server", "action", "answered", "lost", "closed", "longest stall", "handed over"]
    click.echo(tabulate([_cells(row) for row in rows], columns))
    if json_file is not None:
        cells = [dict(zip(columns, _cells(row), strict=True)) for row in rows]
        json.dump(cells, json_file, indent=2)


def _cells(row: Row) -> list[object]:
    seen = row.seen
    stall = f"{seen.stall * 1000:.0f} ms"
    return [row.worker_class, row.server, row.action, seen.asked, seen.lost, seen.closed, stall, row.handed_over]


def _line(row: Row) -> str:
    reasons = f": {row.seen.reasons[0]}" if row.seen.reasons else ""
    return f"{' '.join(map(str, _cells(row)))} in {row.seconds:.0f} s{reasons}"


if __name__ == "__main__":
    main()
