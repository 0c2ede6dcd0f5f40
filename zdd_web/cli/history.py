"""`zdd-web history`: what was done to a service, and when."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime, timezone

import click

from zdd_web import release
from zdd_web.cli.deploys import entries_of
from zdd_web.cli.options import Which, which_service
from zdd_web.cli.output import cell, show
from zdd_web.history import Entry

COLUMNS = ("when", "what", "generation", "release", "took", "outcome")


@click.command()
@which_service
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def history(which: Which, as_json: bool) -> None:
    """Show the last 50 starts, deploys, reloads and rollbacks of a service, the oldest first."""
    generation = which.find()
    entries = entries_of(generation)
    if as_json:
        plain = [{**dataclasses.asdict(entry), "at": _time(entry.at, local=False)} for entry in entries]
        show(json.dumps({"format": 1, "name": generation.header.name, "entries": plain}, indent=2))
        return
    show(table(entries) if entries else "nothing was noted yet")


def table(entries: Sequence[Entry]) -> str:
    """Return entries as a table, with what is to be known of one on a line below it."""
    rows = [COLUMNS, *(_row(entry) for entry in entries)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines = []
    for row, entry in zip(rows, (None, *entries), strict=True):
        lines.append("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        if entry is not None:
            lines += [f"    {cell(text)}" for text in (_canary(entry), entry.reason, entry.note) if text]
    return "\n".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    outcome = cell(entry.outcome) + (f", {entry.times} times" if entry.times > 1 else "")
    number = str(entry.generation) if entry.generation else ""
    name = cell(release.short(entry.release))
    return _time(entry.at), cell(entry.kind), number, name, f"{entry.seconds:.1f} s", outcome


def _canary(entry: Entry) -> str:
    return f"canary: {entry.canary}" if entry.canary else ""


def _time(at: float, *, local: bool = True) -> str:
    try:
        moment = datetime.fromtimestamp(at, timezone.utc)
        if local:
            return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return moment.isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{at:g}"
