"""Can the load generator see a loss? It must, on a gunicorn that is known to lose requests.

`python -m benchmarks.negative_control`. Stock gunicorn, without zdd_web, with `--reuse-port --max-requests 100`: each
worker that is recycled closes a listening socket of its own, and the kernel resets the connections that waited in its
queue. Status 1 when no loss was seen: then a rehearsal's "0 lost" would mean nothing.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.servers import ServerError, gunicorn
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Outcome, Report, build

WORKER_CLASSES = {"sync": [], "gthread": ["--threads", "4"]}
#: Seconds after which a request counts as lost: far beyond any that this view takes.
TIMEOUT = 5.0


def measure(worker_class: str, seconds: float, clients: int) -> Report:
    """Load one stock gunicorn for a while and account for every request."""
    arguments = ["benchmarks.apps:plain", "--worker-class", worker_class, *WORKER_CLASSES[worker_class],
                 "--workers", "2", "--reuse-port", "--max-requests", "100", "--log-level", "warning"]  # fmt: skip
    with gunicorn(arguments) as server:
        load = LoadThread(Load("127.0.0.1", server.port, ["/"], clients, timeout=TIMEOUT))
        with load:
            time.sleep(seconds)
        return build(load.samples, [], stop=None)


@click.command()
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(1), help="Length of each run.")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the reports to FILE ('-' for stdout) too.")
def main(seconds: float, clients: int, json_file: TextIO | None) -> None:
    """Count what the load generator sees lost on stock gunicorn with --reuse-port --max-requests 100."""
    click.echo(f"gunicorn {gunicorn_package.__version__} without zdd_web, --reuse-port --max-requests 100, 2 workers; "
               f"{clients} clients, {seconds:g} s each")  # fmt: skip
    try:
        reports = {name: measure(name, seconds, clients) for name in WORKER_CLASSES}
    except ServerError as error:
        raise click.ClickException(str(error)) from None
    kinds = [outcome for outcome in Outcome if outcome.lost and any(r.outcomes[outcome] for r in reports.values())]
    rows = [[name, report.requests, report.lost, *(report.outcomes[kind] for kind in kinds)]
            for name, report in reports.items()]  # fmt: skip
    click.echo(tabulate(rows, ["worker class", "requests", "lost", *(kind.value for kind in kinds)]))
    if json_file is not None:
        json.dump({name: report.to_json() for name, report in reports.items()}, json_file, indent=2)
    if not any(report.lost for report in reports.values()):
        click.echo("NO LOSS WAS SEEN: the generator cannot be trusted to see one", err=True)
        sys.exit(1)
    click.echo("the generator sees losses")


if __name__ == "__main__":
    main()
