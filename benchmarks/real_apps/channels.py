"""A rehearsal of the Channels app with websockets that stay open: `python -m benchmarks.real_apps.channels CLASS`.

Runs in the app's own environment, and prints its report as JSON. HTTP load and the accounting for it are those of
`zdd-web rehearse`; websockets stay open over upgrades and through the stop, until the server closes them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.servers import ROOT

PACKAGES = ("channels", "uvicorn", "uvicorn-worker", "websockets", "httptools")
WORKER_CLASSES = {"asgi": "asgi", "uvicorn": "uvicorn_worker.UvicornWorker"}
APP = Path(__file__).with_name("channels_app")
#: Seconds of load before and after each upgrade. Websockets of the generation before are closed within.
SETTLE = 4.0
#: Seconds that a stop may take at most: more than the app's GRACE_PERIOD.
STOPS_WITHIN = 40.0


def rehearse(python: Path, worker_class: str, upgrades: int, clients: int) -> dict[str, Any] | None:
    """Hold a rehearsal in the environment of `python`; return its report, None when it could not be held."""
    command = [str(python), "-m", "benchmarks.real_apps.channels", worker_class, f"--upgrades={upgrades}",
               f"--clients={clients}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
    return report


@click.command()
@click.argument("worker_class", type=click.Choice(list(WORKER_CLASSES)))
@click.option("--upgrades", default=5, show_default=True, type=click.IntRange(0))
@click.option("--clients", default=16, show_default=True, type=click.IntRange(1), help="Of HTTP.")
@click.option("--sockets", default=8, show_default=True, type=click.IntRange(1), help="Of each kind of websocket.")
def main(worker_class: str, upgrades: int, clients: int, sockets: int) -> None:
    """Upgrade the Channels app under load and stop it; print a report as JSON."""
    from benchmarks.real_apps.sockets import Sockets
    from zdd_web import service
    from zdd_web.cli import control
    from zdd_web.cli.rehearse.load import Load, LoadThread
    from zdd_web.cli.rehearse.server import Server

    failures = []
    with Server(str(APP), ["--worker-class", WORKER_CLASSES[worker_class]]) as server:
        generation = server.start()
        http = LoadThread(Load("127.0.0.1", server.port, ("/",), clients))
        talk = Sockets(server.port, {"echo": sockets, "chat": sockets, "feed": sockets})
        with http, talk:
            time.sleep(SETTLE)
            for number in range(1, upgrades + 1):
                outcome = control.upgrade(generation)
                if not outcome.ok:
                    failures.append(f"upgrade {number}: {outcome.reason}")
                generation = service.is_active(server.generations())
                time.sleep(SETTLE)
            # As behind a load balancer that sends nothing more here; what is open stays open.
            http.dismiss()
            talk.dismiss()
            os.kill(generation.pid, signal.SIGTERM)
            status = server.wait(generation, STOPS_WITHIN)
            # Every connection has been closed by the server, or the clients would not have ended.
        if status != 0:
            failures.append(f"the stop: {'not over in time' if status is None else f'exit status {status}'}")
        samples = http.samples
        lost = [each for each in samples if each.outcome.lost]
        if failures or lost or any(tally.lost for tally in talk.tallies.values()):
            click.echo(server.log_tail(), err=True)
        for each in lost[:10]:
            click.echo(str(each), err=True)
    report = {
        "requests": len(samples),
        "lost": len(lost),
        "failures": failures,
        "sockets": {kind: tally.to_json() for kind, tally in talk.tallies.items()},
    }
    json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
