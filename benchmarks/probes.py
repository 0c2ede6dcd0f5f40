"""How long a probe waits while every worker is blocked: on the probe port, and on the app's.

`python -m benchmarks.probes`. Two sync workers, each in a request that takes minutes. A thousand probes on the probe
port, every other on a new connection, and a few on the app's port, since each of those takes Kubernetes' whole
`timeoutSeconds: 1`. The same with idle workers; and then `/livez` on the probe port beside clients that abuse it: eight
pipeline `/metrics` without end, ten thousand are connected and silent.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.abuse import abuse
from benchmarks.servers import Server, ServerError, gunicorn
from tests.helpers.ports import free_port

#: Kubernetes' default timeoutSeconds.
TIMEOUT = 1.0
WORKERS = 2
#: Longer than the benchmark runs.
BLOCKED = "/block"


class Prober:
    """Asks one port; every other probe on a connection that is kept."""

    def __init__(self, port: int, path: str = "/readyz") -> None:
        self._port, self._path = port, path
        self._kept = self._connection()
        self.seconds: list[float] = []
        self.asked = 0

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)

    def ask(self) -> None:
        """Send one probe, and note how long its answer took."""
        self.asked += 1
        kept = self.asked % 2 == 0
        connection = self._kept if kept else self._connection()
        began = time.perf_counter()
        try:
            connection.request("GET", self._path)
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                self.seconds.append(time.perf_counter() - began)
        except (OSError, http.client.HTTPException):
            connection.close()
        finally:
            if not kept:
                connection.close()

    def row(self) -> list[str]:
        """Return the cells of a row: asked, answered, p50, p99, the longest."""
        answered = sorted(self.seconds)
        cells = [str(self.asked), str(len(answered))]
        if not answered:
            return [*cells, *[f"> {TIMEOUT:g} s"] * 3]
        p99 = answered[max(0, -(-len(answered) * 99 // 100) - 1)]
        return [*cells, *(f"{1000 * value:.2f} ms" for value in (statistics.median(answered), p99, answered[-1]))]


def block(server: Server) -> list[http.client.HTTPConnection]:
    """Give every worker a request that does not end; return the connections, which are to be kept."""
    held = []
    while not _all_blocked(server.port):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        connection.request("GET", BLOCKED)
        held.append(connection)
        time.sleep(0.2)
    return held


def _all_blocked(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return True
    finally:
        connection.close()
    return False


def probe_under_abuse(port: int, count: int, pipelining: int, idle: int) -> list[str]:
    """Ask one port for liveness so many times, beside clients that abuse it."""
    prober = Prober(port, "/livez")
    with abuse(port, pipelining, idle):
        for _ in range(count):
            prober.ask()
    return ["abused", "probe port", *prober.row()]


def probe(ports: dict[str, tuple[int, int]]) -> list[list[str]]:
    """Ask each port so many times."""
    rows = []
    for name, (port, count) in ports.items():
        prober = Prober(port)
        for _ in range(count):
            prober.ask()
        rows.append([name, *prober.row()])
    return rows


@click.command()
@click.option("--probes", default=1000, show_default=True, type=click.IntRange(1), help="On the probe port.")
@click.option("--on-app", default=10, show_default=True, type=click.IntRange(1), help="On a blocked app's port.")
@click.option("--pipelining", default=8, show_default=True, type=click.IntRange(0), help="Clients that pipeline.")
@click.option("--idle", default=10_000, show_default=True, type=click.IntRange(0), help="Clients that are silent.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(probes: int, on_app: int, pipelining: int, idle: int, json_file: TextIO | None) -> None:
    """Measure how long probes wait while every worker is blocked, and while clients abuse the probe port."""
    click.echo(f"gunicorn {gunicorn_package.__version__}, {WORKERS} sync workers; a probe waits {TIMEOUT:g} s at most")
    probe_port = free_port()
    arguments = ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:blocking", "--workers", str(WORKERS),
                 "--log-level", "warning", "--env", f"ZDD_WEB_PROBE_BIND=127.0.0.1:{probe_port}"]  # fmt: skip
    rows = []
    try:
        with gunicorn(arguments) as server:
            for state, count, prepare in (("idle", probes, _nothing), ("blocked", on_app, block)):
                held = prepare(server)
                ports = {"probe port": (probe_port, probes), "app's port": (server.port, count)}
                rows += [[state, *row] for row in probe(ports)]
                for connection in held:
                    connection.close()
            rows.append(probe_under_abuse(probe_port, probes, pipelining, idle))
    except ServerError as error:
        raise click.ClickException(str(error)) from None
    headers = ["workers", "asked on", "probes", "answered", "p50", "p99", "longest"]
    click.echo(tabulate(rows, headers, disable_numparse=True))
    if json_file is not None:
        json.dump(rows, json_file, indent=2)


def _nothing(server: Server) -> list[http.client.HTTPConnection]:
    return []


if __name__ == "__main__":
    main()
