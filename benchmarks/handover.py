"""What clients notice of an upgrade: `zdd-web rehearse` for both examples under both worker classes, in one table.

`python -m benchmarks.handover`. Each row is one rehearsal: upgrades under load, then a stop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

import click
from tabulate import tabulate

from benchmarks.servers import ROOT

EXAMPLES = ("example_django", "example_flask")
WORKER_CLASSES = ("sync", "gthread")
HEADERS = ("example", "worker class", "requests", "lost", "p99 steady", "p99 handover", "ratio", "longest stall",
           "handover median", "max")  # fmt: skip


def row(example: str, worker_class: str, report: dict[str, Any]) -> tuple[object, ...]:
    """Return the table's row for a rehearsal's JSON report; "-" for what there was none of."""
    steady, around = report["latency_ms"]["steady"]["p99"], report["latency_ms"]["around"]["p99"]
    times = report["seconds_to_handover"]
    return (
        example,
        worker_class,
        report["requests"],
        report["lost"],
        f"{steady:.1f} ms" if steady is not None else "-",
        f"{around:.1f} ms" if around is not None else "-",
        f"{around / steady:.2f}" if steady and around is not None else "-",
        f"{report['longest_stall'] * 1000:.0f} ms",
        f"{times['median']:.2f} s" if times else "-",
        f"{times['max']:.2f} s" if times else "-",
    )


def rehearse(example: str, worker_class: str, upgrades: int, clients: int) -> dict[str, Any] | None:
    """Hold one rehearsal; give its report, None when it could not be held, which it has said on stderr."""
    with tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-") as directory:
        report = Path(directory, "report.json")
        command = [sys.executable, "-m", "zdd_web.cli", "rehearse", example, "--upgrades", str(upgrades),
                   "--clients", str(clients), "--json", str(report)]  # fmt: skip
        environ = {**os.environ, "WORKER_CLASS": worker_class, "DATABASE_PATH": str(Path(directory, "db.sqlite3"))}
        done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
        # 1 is a rehearsal too: one that lost something.
        if done.returncode not in (0, 1) or not report.exists() or not report.stat().st_size:
            return None
        if done.returncode == 1:
            click.echo(done.stdout, err=True)
        held: dict[str, Any] = json.loads(report.read_text())
        return held


@click.command()
@click.option("--upgrades", default=10, show_default=True, type=click.IntRange(1), help="How many in each rehearsal.")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1), help="Concurrent clients.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the reports to FILE ('-' for stdout) too.")
def main(upgrades: int, clients: int, json_file: TextIO | None) -> None:
    """Rehearse both examples under sync and gthread; print what was lost and what clients noticed."""
    rows: list[tuple[object, ...]] = []
    reports: list[dict[str, Any]] = []
    for example in EXAMPLES:
        for worker_class in WORKER_CLASSES:
            click.echo(f"{example}, {worker_class} ...", err=True)
            report = rehearse(example, worker_class, upgrades, clients)
            if report is None:
                rows.append((example, worker_class, "not held"))
                continue
            rows.append(row(example, worker_class, report))
            reports.append({"example": example, "worker_class": worker_class, "report": report})
    click.echo(f"{upgrades} upgrades and a stop each, {clients} clients, workers as the examples have them (2)")
    click.echo(tabulate(rows, HEADERS, disable_numparse=True))
    if json_file is not None:
        json.dump(reports, json_file, indent=2)
    if len(reports) < len(rows):
        sys.exit(2)


if __name__ == "__main__":
    main()
