"""What clients that are slow to close cost everybody else, while a service serves and in its lame duck.

`python -m benchmarks.lazy_clients`. A hundred and twenty clients ask twice a second and close a connection only some
time after its last reply; beside them one client asks in a row, on a new connection each time, and is timed. In a lame
duck every reply is a connection's last one. Two services stand side by side, one of them in its lame duck, and are
asked in turns: what else the machine does happens to both, and the ratio is what counts.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import selectors
import signal
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.client import REQUEST, reply_length
from benchmarks.servers import ServerError, gunicorn

WORKER_CLASSES = {"gthread": ["--threads", "4"], "sync": []}
#: Seconds between two requests of a lazy client.
THINK = 0.5
#: The timed client asks that often a second at most: it is to find the service as the others leave it.
EVERY = 0.01


@dataclass(frozen=True)
class Times:
    """How long requests took, milliseconds."""

    p50: float
    p99: float
    longest: float


@dataclass
class _Lazy:
    """One client that closes late; at `due` it does what comes next."""

    due: float
    connection: socket.socket | None = None
    received: bytes = b""
    closes: bool = False


def be_lazy(port: int, clients: int, late: float) -> None:
    """Run that many lazy clients in this process until it is ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    selector = selectors.DefaultSelector()
    began = time.monotonic()
    all_of_them = [_Lazy(began + THINK * n / clients) for n in range(clients)]
    while True:
        for key, _ in selector.select(0.002):
            _receive(key.data, selector, late)
        now = time.monotonic()
        for client in all_of_them:
            if client.due <= now:
                _act(client, selector, port)


def _receive(client: _Lazy, selector: selectors.BaseSelector, late: float) -> None:
    assert client.connection is not None
    received = b""
    with contextlib.suppress(OSError):
        received = client.connection.recv(65536)
    client.received += received
    complete = 0 < reply_length(client.received) <= len(client.received)
    if received and not complete:
        return
    selector.unregister(client.connection)
    client.closes = not complete or b"connection: close" in client.received.lower()
    client.due = time.monotonic() + (late if client.closes else THINK)


def _act(client: _Lazy, selector: selectors.BaseSelector, port: int) -> None:
    client.due = float("inf")
    if client.closes and client.connection is not None:
        client.connection.close()
        client.connection, client.closes = None, False
        client.due = time.monotonic() + THINK
        return
    try:
        if client.connection is None:
            client.connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        client.received = b""
        client.connection.sendall(REQUEST)
        selector.register(client.connection, selectors.EVENT_READ, client)
    except OSError:
        # The server has closed a connection that was idle.
        client.closes, client.due = True, 0.0


@contextlib.contextmanager
def lazy_clients(port: int, clients: int, late: float) -> Iterator[None]:
    """Have lazy clients ask in the block, in a process of their own."""
    process = multiprocessing.get_context("fork").Process(target=be_lazy, args=(port, clients, late), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def time_requests(ports: Sequence[int], seconds: float) -> list[Times]:
    """Ask one request after the other for so long, in turns and each on a new connection; return the times by port."""
    took: list[list[float]] = [[] for _ in ports]
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for times, port in zip(took, ports, strict=True):
            began = time.monotonic()
            ask(port)
            times.append((time.monotonic() - began) * 1000)
            time.sleep(max(0.0, EVERY - (time.monotonic() - began)))
    return [Times(statistics.median(times), sorted(times)[int(len(times) * 0.99)], max(times)) for times in took]


def ask(port: int) -> None:
    """Get a whole reply on a new connection. Raises `ServerError` where it is cut off."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(REQUEST)
        received = b""
        while not 0 < reply_length(received) <= len(received):
            more = client.recv(65536)
            if not more:
                raise ServerError("the server closed a connection without a reply")
            received += more


def compare(worker_class: str, clients: int, late: float, seconds: float) -> tuple[Times, Times]:
    """Return the times of requests to a service that serves, and to one in its lame duck."""
    arguments = ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:plain", "--worker-class", worker_class,
                 *WORKER_CLASSES[worker_class], "--workers", "2", "--log-level", "warning"]  # fmt: skip
    environ = {"ZDD_WEB_DRAIN_DELAY": str(seconds + 60), "ZDD_WEB_GRACE_PERIOD": str(seconds + 120)}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(gunicorn(arguments, environ=environ)) for _ in range(2)]
        for server in servers:
            stack.enter_context(lazy_clients(server.port, clients, late))
        os.kill(servers[1].pid, signal.SIGTERM)
        # Until every client has met the lame duck.
        time.sleep(1 + 2 * THINK)
        serving, lame_duck = time_requests([server.port for server in servers], seconds)
        os.kill(servers[1].pid, signal.SIGQUIT)
        return serving, lame_duck


@click.command()
@click.option("--clients", default=120, show_default=True, type=click.IntRange(1), help="Lazy clients.")
@click.option("--late", default=0.1, show_default=True, type=click.FloatRange(0), help="Seconds until they close.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(1), help="Of requests.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(clients: int, late: float, seconds: float, json_file: TextIO | None) -> None:
    """Time requests beside clients that close late, to a service that serves and to one in its lame duck."""
    click.echo(
        f"gunicorn {gunicorn_package.__version__}, 2 workers; {clients} clients that close {late:g} s late; times in ms"
    )
    rows, results = [], []
    try:
        for worker_class in WORKER_CLASSES:
            before, after = compare(worker_class, clients, late, seconds)
            ratios = after.p50 / before.p50, after.p99 / before.p99
            figures = [before.p50, after.p50, ratios[0], before.p99, after.p99, ratios[1], after.longest]
            rows.append([worker_class, *(f"{figure:.2f}" for figure in figures)])
            results.append(
                {"worker_class": worker_class, "serving": asdict(before), "lame_duck": asdict(after), "ratios": ratios}
            )
    except ServerError as error:
        raise click.ClickException(str(error)) from None
    heads = ["worker class", "p50", "in lame duck", "ratio", "p99", "in lame duck", "ratio", "longest there"]
    click.echo(tabulate(rows, heads, disable_numparse=True))
    if json_file is not None:
        json.dump(results, json_file, indent=2)


if __name__ == "__main__":
    main()
