"""`zdd-web history`: what was done to a service, and when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone

import click
from rich.text import Text

from zdd_web import release
from zdd_web.cli import terminal
from zdd_web.cli.deploy_requests import entries_of
from zdd_web.cli.options import Which, which_service
from zdd_web.cli.output import cell, refuse, show
from zdd_web.history import Entry

COLUMNS = ("when", "what", "gen", "release", "took", "outcome")
#: A longer name of a release stands below its entry: 80 columns have no room for it.
LONGEST_RELEASE = 16

STYLES = {"done": terminal.GOOD, "failed": terminal.BAD, "lost": terminal.BAD}


@click.command()
@which_service
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def history(which: Which, as_json: bool) -> None:
    """Show the last 50 starts, deploys, reloads and rollbacks of a service, the oldest first."""
    generation = which.find()
    entries = entries_of(generation)
    if as_json:
        plain = [{**entry._asdict(), "at": _time(entry.at, local=False)} for entry in entries]
        show(json.dumps({"format": 1, "name": generation.header.name, "entries": plain}, indent=2))
        return
    console = terminal.stdout()
    found = lines_of(entries, terminal.width_of(console)) if entries else [Text("nothing was noted yet")]
    refuse(terminal.show(console, found))


def lines_of(entries: Sequence[Entry], width: int | None, *, indent: int = 0) -> list[Text]:
    """Return entries as a table, with what is to be known of one below it.

    >>> entry = Entry(at=0.0, kind="deploy", outcome="failed", generation=3, release="/srv/shop/3", reason="it ended")
    >>> [line.plain.strip() for line in lines_of([entry], 80)[2:]]
    ['it ended']
    """
    head, *rows = terminal.table(COLUMNS, [_row(entry) for entry in entries], left=(0, 1, 3, 5), indent=indent)
    found = [head]
    for entry, row in zip(entries, rows, strict=True):
        found.append(row)
        reason = entry.reason, STYLES.get(entry.outcome, "")
        for text, style in ((_release(entry), ""), (_canary(entry), ""), reason, (entry.note, "")):
            if text:
                found += terminal.paragraph(cell(text), width, indent=indent + 4, style=style)
    return found


def _row(entry: Entry) -> tuple[Text | str, ...]:
    outcome = cell(entry.outcome) + (f", {entry.times} times" if entry.times > 1 else "")
    number = str(entry.generation) if entry.generation else ""
    name = "" if _release(entry) else cell(release.short(entry.release))
    style = STYLES.get(entry.outcome, terminal.BUSY)
    return _time(entry.at), cell(entry.kind), number, name, f"{entry.seconds:.1f} s", Text(outcome, style=style)


def _release(entry: Entry) -> str:
    name = release.short(entry.release)
    return f"release: {name}" if len(name) > LONGEST_RELEASE else ""


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
