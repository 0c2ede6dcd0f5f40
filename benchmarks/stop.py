"""What clients lose when a service stops under load, without a lame duck: with zdd_web and without.

`python -m benchmarks.stop`. Forty clients that do not leave, a view of 20 ms: the kernel's queue is never empty. Then
SIGTERM. "Lost" is a connection that was accepted by the kernel and then reset or closed; one that is refused was not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.servers import ServerError, gunicorn
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Outcome

WORKER_CLASSES = {"sync": [], "gthread": ["--threads", "4"]}
WITH = ["-c", "benchmarks/with_zdd_web.py"]
#: Nobody waits longer than this for the end of the server, seconds.
END_WITHIN = 40.0
HARMLESS = {Outcome.OK, Outcome.STALE, Outcome.UNSENT, Outcome.REFUSED}


def variants() -> dict[str, tuple[list[str], list[str]]]:
    """Return the servers to compare: more arguments for gunicorn, and what it is started through."""
    found: dict[str, tuple[list[str], list[str]]] = {"gunicorn": ([], []), "zdd_web": (WITH, [])}
    if os.geteuid() == 0 and shutil.which("setpriv"):
        found["zdd_web without CAP_NET_ADMIN"] = (WITH, ["setpriv", "--bounding-set=-net_admin", "--"])
    return found


def stop(arguments: list[str], through: list[str], worker_class: str, clients: int) -> Counter[Outcome]:
    """Stop one server under load and account for every request."""
    common = ["benchmarks.apps:slow", "--worker-class", worker_class, *WORKER_CLASSES[worker_class],
              "--workers", "2", "--log-level", "warning"]  # fmt: skip
    with gunicorn([*arguments, *common], through=through) as server:
        load = LoadThread(Load("127.0.0.1", server.port, ["/"], clients, think=0.02, timeout=20.0))
        with load:
            time.sleep(2)
            os.kill(server.pid, signal.SIGTERM)
            deadline = time.monotonic() + END_WITHIN
            # Its parent has not reaped it yet: a zombie has closed its sockets.
            while time.monotonic() < deadline and not any(s.outcome is Outcome.REFUSED for s in load.samples):
                time.sleep(0.05)
        return Counter(sample.outcome for sample in load.samples)


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Stops of each server.")
@click.option("--clients", default=40, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the counts to FILE ('-' for stdout) too.")
def main(rounds: int, clients: int, json_file: TextIO | None) -> None:
    """Count what clients that do not leave lose in a stop without a lame duck."""
    click.echo(
        f"gunicorn {gunicorn_package.__version__}, 2 workers, a view of 20 ms; {clients} clients, {rounds} stops"
    )
    rows, results = [], []
    try:
        for worker_class in WORKER_CLASSES:
            for name, (arguments, through) in variants().items():
                found = [stop(arguments, through, worker_class, clients) for _ in range(rounds)]
                lost = [sum(n for kind, n in each.items() if kind not in HARMLESS) for each in found]
                kinds = sum(found, Counter())
                said = ", ".join(f"{kind.value} {n}" for kind, n in sorted(kinds.items()) if kind not in HARMLESS)
                rows.append([worker_class, name, kinds[Outcome.OK], " ".join(map(str, lost)), said])
                results.append({"worker_class": worker_class, "server": name, "lost": lost, "outcomes": kinds})
    except ServerError as error:
        raise click.ClickException(str(error)) from None
    click.echo(tabulate(rows, ["worker class", "server", "answered", "lost in each stop", "how"]))
    if json_file is not None:
        json.dump(results, json_file, indent=2)


if __name__ == "__main__":
    main()
