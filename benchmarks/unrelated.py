"""Two masters that know nothing of each other on one port: what clients lose when the old one stops.

`python -m benchmarks.unrelated`. V2 starts, and when it is ready V1 is told to stop; twenty times under load, without
any capability. Beside it stock gunicorn with `--reuse-port`, which closes its sockets with what waits in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.servers import START_TIMEOUT, ServerError, gunicorn
from tests.helpers.ports import free_port
from zdd_web import service
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Outcome, Report, build
from zdd_web.lifecycle import Phase
from zdd_web.system import proc

KINDS = {
    "gunicorn --reuse-port": ["benchmarks.apps:slow", "--reuse-port"],
    "zdd_web reuseport": ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:slow"],
}
CLASSES = {"sync": ["--workers", "4"], "gthread": ["--workers", "2", "--threads", "4"]}
TIMEOUT = 10.0
#: Seconds of load between a master that is ready and its predecessor's end: stock gunicorn does not say when it is.
OVERLAP = 0.5


def without_privileges() -> list[str]:
    """Return a command that starts another without any capability; nothing where there is none to lose."""
    if os.geteuid() or not shutil.which("setpriv"):
        return []
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]


def _until_it_serves(pid: int) -> None:
    # The port is answered by the other one, meanwhile.
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        generation = service.generation_of(pid)
        if generation is not None and generation.board.header.phase == Phase.SERVING:
            return
        time.sleep(0.02)
    raise ServerError(f"the master {pid} did not get ready")


def measure(kind: str, worker_class: str, times: int, clients: int) -> Report:
    """Replace a master `times` times under load."""
    port = free_port()
    arguments = [*KINDS[kind], "--worker-class", worker_class, *CLASSES[worker_class], "--log-level", "warning"]

    with contextlib.ExitStack() as stack:

        def another(number: int) -> int:
            environ = {"ZDD_WEB_LISTENER": "reuseport", "ZDD_WEB_NAME": f"unrelated-{number}"}
            through = without_privileges()
            pid = stack.enter_context(gunicorn(arguments, port=port, environ=environ, through=through)).pid
            if "-c" in arguments:
                _until_it_serves(pid)
            return pid

        old = another(0)
        load = LoadThread(Load("127.0.0.1", port, ["/"], clients, timeout=TIMEOUT))
        with load:
            for number in range(1, times + 1):
                new = another(number)
                time.sleep(OVERLAP)
                os.kill(old, signal.SIGTERM)
                deadline = time.monotonic() + 60
                while proc.state(old) not in ("", "Z") and time.monotonic() < deadline:
                    time.sleep(0.02)
                old = new
            time.sleep(OVERLAP)
        return build(load.samples, [], stop=None)


@click.command()
@click.option("--times", default=20, show_default=True, type=click.IntRange(1), help="How many replacements.")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the reports to FILE ('-' for stdout) too.")
def main(times: int, clients: int, json_file: TextIO | None) -> None:
    """Count what is lost when a master is replaced by one that it does not know, in SO_REUSEPORT mode."""
    click.echo(f"gunicorn {gunicorn_package.__version__}; {clients} clients, a view of 20 ms, {times} replacements")
    reports = {}
    try:
        for worker_class in CLASSES:
            for kind in KINDS:
                reports[kind, worker_class] = measure(kind, worker_class, times, clients)
    except ServerError as error:
        raise click.ClickException(str(error)) from None
    kinds = [outcome for outcome in Outcome if outcome.lost and any(r.outcomes[outcome] for r in reports.values())]
    rows = [[kind, worker_class, report.requests, report.lost, *(report.outcomes[each] for each in kinds)]
            for (kind, worker_class), report in reports.items()]  # fmt: skip
    click.echo(tabulate(rows, ["server", "worker class", "requests", "lost", *(kind.value for kind in kinds)]))
    if json_file is not None:
        json.dump({" ".join(key): report.to_json() for key, report in reports.items()}, json_file, indent=2)


if __name__ == "__main__":
    main()
