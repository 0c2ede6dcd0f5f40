"""What a large service costs: `python -m benchmarks.scale`.

The master's CPU time while nothing happens, with more and more workers, connections and background tasks; an upgrade
and a stop of a service with 64 workers and 10,000 kept connections.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import time
from collections import Counter
from typing import Any, TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.deployed import until
from benchmarks.scale.clients import ClientProcess, Seen
from benchmarks.scale.service import STAGES, Service, cpu, gone, running
from benchmarks.servers import ServerError
from zdd_web import metrics

PARTS = ("idle", "upgrade", "stop")

#: How long the clients ask before and after an upgrade, or before a stop, seconds.
STEADY, AFTER = 15.0, 5.0

#: Requests that have background tasks begun, so that they are spread over the workers.
TASK_REQUESTS = 400


def begin_tasks(service: Service, tasks: int) -> None:
    """Have the workers begin tasks that never end. Raises `ServerError`."""
    for number in range(TASK_REQUESTS):
        count = tasks // TASK_REQUESTS + (number < tasks % TASK_REQUESTS)
        connection = http.client.HTTPConnection("127.0.0.1", service.server.port, timeout=30)
        connection.request("GET", f"/tasks/{count}", headers={"Connection": "close"})
        connection.getresponse().read()
        connection.close()
    with contextlib.closing(service.generation()) as generation:
        if (found := generation.snapshot().tasks) != tasks:
            raise ServerError(f"{tasks} tasks were begun, and {found} are on the board")


def idle(service: Service, seconds: float) -> list[str]:
    """Return what a service costs that does nothing: milliseconds of CPU time a second, and of its answers."""
    # The loop turns fifty times a second until what the boot has begun is over.
    time.sleep(3)
    with contextlib.closing(service.generation()) as generation:
        master, probe = generation.pid, generation.header.probe_pid
        workers = [worker.pid for worker in generation.snapshot().workers]

        def used() -> tuple[float, float, float]:
            return cpu(master), cpu(probe), sum(map(cpu, workers))

        before, began = used(), time.monotonic()
        time.sleep(seconds)
        after, took = used(), time.monotonic() - began
    spent = [f"{(late - early) / took * 1000:.2f}" for early, late in zip(before, after, strict=True)]
    # Answers are kept for a second.
    scrapes = []
    for _ in range(3):
        scrapes.append(service.scrape())
        time.sleep(1.1)
    statuses = [service.status() for _ in range(3)]
    return [*spent, f"{min(scrapes) * 1000:.1f}", f"{min(statuses) * 1000:.0f}"]


def upgrade(service: Service, connections: int, threads: int) -> list[Any]:
    """Upgrade a service under load; return a row of the table."""
    with ClientProcess(service.server.port, connections, threads) as clients:
        clients.doing("steady")
        time.sleep(STEADY)
        took = service.upgrade(clients.doing)
        clients.doing("after")
        time.sleep(AFTER)
        seen = clients.end()
    with contextlib.closing(service.generation()) as generation:
        handed_over = metrics.totals(generation.board).connections_handed_over
    return [service.workers, connections, seen.asked, seen.lost, seen.closed, handed_over, f"{took:.1f} s",
            *_stalls(seen), "; ".join(seen.reasons) or "-"]  # fmt: skip


def _stalls(seen: Seen) -> list[str]:
    steady = seen.latencies.get("steady")
    stages = [seen.latencies.get(stage) for stage in STAGES]
    return [
        f"{steady[2]:.1f} ms" if steady else "-",
        f"{steady[3]:.1f} ms" if steady else "-",
        *(f"{each[2]:.0f}, {each[3]:.0f} ms" if each else "-" for each in stages),
    ]


def stop(service: Service, connections: int, tasks: int, threads: int) -> list[Any]:
    """Stop a service under load; return a row of the table."""
    begin_tasks(service, tasks)
    with ClientProcess(service.server.port, connections, threads) as clients:
        clients.doing("steady")
        time.sleep(AFTER)
        with contextlib.closing(service.generation()) as generation:
            master = generation.pid
        clients.doing("stop")
        began = time.monotonic()
        os.kill(master, signal.SIGTERM)
        until("the end of the master", lambda: gone(master))
        took = time.monotonic() - began
        seen = clients.end()
    named, counted = named_tasks(service.server.log.read_text(errors="replace"))
    return [service.workers, connections, tasks, seen.asked, seen.lost, seen.closed, f"{took:.1f} s", named, counted,
            "; ".join(seen.reasons) or "-"]  # fmt: skip


def named_tasks(log: str) -> tuple[int, int]:
    """Return how many unfinished tasks a log names one by one, and how many more it counts by name.

    >>> named_tasks("event=background.abandoned pid=7 name=a\\nevent=background.abandoned_by_name pid=7 name=a tasks=5")
    (1, 5)
    """
    by_name = re.findall(r"event=background\.abandoned_by_name .*?\btasks=(\d+)", log)
    return len(re.findall(r"event=background\.abandoned ", log)), sum(map(int, by_name))


IDLE_COLUMNS = ["workers", "connections", "tasks", "master, ms/s", "probe process, ms/s", "all workers, ms/s",
                "/metrics, ms", "status, CPU ms"]  # fmt: skip
UPGRADE_COLUMNS = ["workers", "connections", "answered", "lost", "closed", "handed over", "took", "steady p99",
                   "steady longest", "p99 and longest: boot", "window", "handing over", "why lost"]  # fmt: skip
STOP_COLUMNS = ["workers", "connections", "tasks", "answered", "lost", "closed", "took", "tasks named",
                "counted by name", "why lost"]  # fmt: skip


def measure(worker_class: str, counts: tuple[int, ...], at: int, connections: int, tasks: int, seconds: float,
            threads: int, parts: tuple[str, ...], trouble: Counter[str]) -> dict[str, list[list[Any]]]:  # fmt: skip
    """Run all parts; what goes wrong is in `trouble`, and its rows are missing."""
    rows: dict[str, list[list[Any]]] = {part: [] for part in parts}

    @contextlib.contextmanager
    def part(name: str) -> Any:
        click.echo(f"{name} ...", err=True)
        try:
            yield
        except (ServerError, OSError) as error:
            trouble[f"{name}: {error}"] += 1
            click.echo(f"{name}: {error}", err=True)

    if "idle" in parts:
        for workers in counts:
            with part(f"idle, {workers} workers"), running(worker_class, workers) as service:
                rows["idle"].append([workers, 0, 0, *idle(service, seconds)])
                if connections:
                    with ClientProcess(service.server.port, connections, 0):
                        rows["idle"].append([workers, connections, 0, *idle(service, seconds)])
                if tasks:
                    begin_tasks(service, tasks)
                    rows["idle"].append([workers, 0, tasks, *idle(service, seconds)])
                click.echo(tabulate(rows["idle"], IDLE_COLUMNS), err=True)
    if "upgrade" in parts:
        with part(f"upgrade, {at} workers"), running(worker_class, at) as service:
            rows["upgrade"].append(upgrade(service, connections, threads))
    if "stop" in parts:
        for count in dict.fromkeys((0, tasks)):
            with part(f"stop, {at} workers, {count} tasks"), running(worker_class, at) as service:
                rows["stop"].append(stop(service, connections, count, threads))
    return rows


@click.command()
@click.option("--worker-class", type=click.Choice(["gthread", "sync", "gevent"]), default="gthread", show_default=True)
@click.option("--workers", "counts", multiple=True, type=click.IntRange(1, 512), default=(4, 64, 256),
              show_default=True, help="Of the idle service; repeatable.")  # fmt: skip
@click.option("--at", default=64, show_default=True, type=click.IntRange(1, 512), help="Workers in upgrade and stop.")
@click.option("--connections", default=10_000, show_default=True, type=click.IntRange(0))
@click.option("--tasks", default=10_000, show_default=True, type=click.IntRange(0), help="Tracked background tasks.")
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(1), help="Of idleness, each row.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Clients that ask.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, help="Only this; repeatable.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the rows to FILE ('-' for stdout) too.")
def main(
    worker_class: str,
    counts: tuple[int, ...],
    at: int,
    connections: int,
    tasks: int,
    seconds: float,
    threads: int,
    parts: tuple[str, ...],
    json_file: TextIO | None,
) -> None:
    """Measure what many workers, kept connections and background tasks cost."""
    trouble: Counter[str] = Counter()
    rows = measure(worker_class, counts, at, connections, tasks, seconds, threads, parts, trouble)
    columns = {"idle": IDLE_COLUMNS, "upgrade": UPGRADE_COLUMNS, "stop": STOP_COLUMNS}
    click.echo(f"gunicorn {gunicorn_package.__version__}, {worker_class}, {len(os.sched_getaffinity(0))} cores")
    for name, found in rows.items():
        click.echo(f"\n{name}\n{tabulate(found, columns[name], tablefmt='pipe', disable_numparse=True)}")
    for each in trouble:
        click.echo(f"not measured: {each}")
    if json_file is not None:
        cells = {name: [dict(zip(columns[name], row, strict=True)) for row in found] for name, found in rows.items()}
        json.dump(cells, json_file, indent=2)


if __name__ == "__main__":
    main()
