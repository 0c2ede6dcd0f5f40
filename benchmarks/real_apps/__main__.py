"""Real applications from PyPI, upgraded under load: `python -m benchmarks.real_apps`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import click
import gunicorn
from tabulate import tabulate

from benchmarks.real_apps import channels, wagtail
from benchmarks.real_apps.environments import environment, version

HEADERS = ("app", "worker class", "requests", "lost", "messages", "lost", "sent again", "closed with", "failures")


def wagtail_row(report: dict[str, Any]) -> list[object]:
    """Return the cells of a Wagtail rehearsal, from the third on."""
    failed = [each for each in report["handovers"] if not each["ok"]]
    stop = report["stop"]
    reasons = [each["reason"] for each in failed] + ([stop["reason"]] if stop and not stop["ok"] else [])
    return [report["requests"], report["lost"], "-", "-", "-", "-", "; ".join(reasons) or "none"]


def channels_row(report: dict[str, Any]) -> list[object]:
    """Return the cells of a Channels rehearsal, from the third on."""
    sockets = report["sockets"]
    codes = [f"{kind}: " + ", ".join(f"{code} ({count})" for code, count in sorted(tally["closes"].items()))
             for kind, tally in sockets.items()]  # fmt: skip
    again = ", ".join(f"{kind} {tally['sent_again']}" for kind, tally in sockets.items() if kind != "feed")
    return [
        report["requests"],
        report["lost"],
        sum(tally["messages"] for tally in sockets.values()),
        sum(sum(tally["lost"].values()) for tally in sockets.values()),
        again,
        "\n".join(codes),
        "; ".join(report["failures"]) or "none",
    ]


APPS = {
    "wagtail": (wagtail.PACKAGES, tuple(wagtail.WORKER_CLASSES), wagtail.rehearse, wagtail_row),
    "channels": (channels.PACKAGES, tuple(channels.WORKER_CLASSES), channels.rehearse, channels_row),
}


@click.command()
@click.option("--cache", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Directory for the virtualenvs, which are made where they are missing.")  # fmt: skip
@click.option("--app", "apps", multiple=True, type=click.Choice(list(APPS)), default=list(APPS), help="Which.")
@click.option("--upgrades", default=5, show_default=True, type=click.IntRange(1), help="How many in each rehearsal.")
@click.option("--clients", default=16, show_default=True, type=click.IntRange(1), help="Concurrent HTTP clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the reports to FILE ('-' for stdout) too.")
def main(cache: Path, apps: tuple[str, ...], upgrades: int, clients: int, json_file: TextIO | None) -> None:
    """Rehearse a Wagtail site and a Channels app under the worker classes they are run with; print what was lost."""
    rows: list[list[object]] = []
    reports = []
    for app in apps:
        packages, worker_classes, rehearse, row = APPS[app]
        try:
            python = environment(cache.absolute(), app, packages)
        except subprocess.CalledProcessError as error:
            raise click.ClickException(f"no environment for {app}: pip ended with status {error.returncode}") from None
        name = f"{app} {version(python, app)}"
        for worker_class in worker_classes:
            click.echo(f"{name}, {worker_class} ...", err=True)
            report = rehearse(python, worker_class, upgrades, clients)
            if report is None:
                rows.append([name, worker_class, "not held"])
                continue
            rows.append([name, worker_class, *row(report)])
            reports.append({"app": name, "worker_class": worker_class, "report": report})
    click.echo(f"gunicorn {gunicorn.__version__}, 2 workers; {upgrades} upgrades and a stop each, {clients} clients")
    click.echo(tabulate(rows, HEADERS, disable_numparse=True))
    if json_file is not None:
        json.dump(reports, json_file, indent=2)
    if len(reports) < len(rows):
        sys.exit(2)


if __name__ == "__main__":
    main()
