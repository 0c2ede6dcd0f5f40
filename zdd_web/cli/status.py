"""`zdd-web status`: the generations of services on this machine, once, live, or for programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import click
from rich.text import Text

from zdd_web import service
from zdd_web.board import Snapshot
from zdd_web.cli import terminal
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.options import Which, which_service
from zdd_web.cli.output import cell, refuse, say, show
from zdd_web.cli.status_text import Shown, hangs, lines_of, stalled
from zdd_web.cli.times import Now
from zdd_web.cli.watched_services import Followed
from zdd_web.errors import BoardError
from zdd_web.lookup import user


@click.command()
@which_service
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--watch", "live", is_flag=True, help="A live board, until Ctrl-C.")
def status(which: Which, as_json: bool, live: bool) -> None:
    """Show generations, phases, workers, requests in flight and background tasks.

    Status 1 when the main loop of a master has stopped.
    """
    if live and as_json:
        raise click.UsageError("give one of --json and --watch")
    if live:
        # Not for a pipe: a script need not wait for what draws on terminals.
        from zdd_web.cli import status_live

        with contextlib.closing(Followed(lambda: _services(which))) as followed:
            status_live.run(lambda: _read(followed.look())[0])
        return
    found, refused = _read(_services(which))
    if not found:
        raise CannotHelp("; ".join(refused))
    for each in refused:
        say(each, err=True)
    now = Now()
    if as_json:
        plain = [_plain(each.snapshot, each.generation.owner, now) for line in found for each in line]
        show(json.dumps({"format": 1, "generations": plain}, indent=2))
    else:
        console = terminal.stdout()
        refuse(terminal.show(console, _whole(found, now, terminal.width_of(console))))
    _say_who_hangs(which, found, now)


def _whole(found: list[list[Shown]], now: Now, width: int | None) -> list[Text]:
    lines: list[Text] = []
    for line in found:
        lines += [Text(""), *lines_of(line, now, width)] if lines else lines_of(line, now, width)
    return lines


def _read(services: list[list[service.Generation]]) -> tuple[list[list[Shown]], list[str]]:
    """Return the services with their generations, and those whose board cannot be read, with the reason."""
    found, refused = [], []
    for line in services:
        shown = []
        for generation in line:
            try:
                shown.append(Shown(generation, generation.snapshot()))
            except BoardError as error:
                # Another service may be of another version, and these are not the worse for it.
                refused.append(cell(f"{generation.header.name} (pid {generation.pid}): {error}"))
        if shown:
            found.append(shown)
    return found, refused


def _services(which: Which) -> list[list[service.Generation]]:
    if which.pid is None and which.pid_file is None:
        # Several may have that name, and this is where one sees it.
        everything = service.generations(which.owner, which.note)
        lines = [line for line in service.descent(everything, which.note) if service.has_name(line, which.name)]
        if lines:
            if everything.shortfall:
                say(everything.shortfall, err=True)
            return lines
    return [service.line_of(which.find())]


def _say_who_hangs(which: Which, found: list[list[Shown]], now: Now) -> None:
    hanging = [each for line in found for each in line if stalled(each.snapshot, now)]
    for each in hanging:
        whose = "" if each.generation.owner == os.geteuid() else f" ({user(each.generation.owner)})"
        terminal.fail(f"{hangs(each.snapshot, now)}{whose}")
    # Any user can make a board that says so; that must not fail the watch over one's own.
    if any(each.generation.owner in (os.geteuid(), which.owner) for each in hanging):
        sys.exit(1)


#: What a board has in monotonic nanoseconds, and `times` as ISO 8601.
TIMES = ("phase_since", "started_at", "ready_at", "tick_at", "deadline", "upgrade_since")


def _plain(snapshot: Snapshot, owner: int, now: Now) -> dict[str, Any]:
    fields = snapshot._asdict()
    fields["phase"] = snapshot.phase.label
    fields["successor_phase"] = snapshot.successor_phase.label if snapshot.successor_phase else None
    fields["upgrade_state"] = snapshot.upgrade_state.name.lower()
    fields["in_flight"], fields["tasks"] = snapshot.in_flight, snapshot.tasks
    fields["stalled_for"] = round(stalled(snapshot, now), 1)
    fields["times"] = {name: now.iso(fields[name]) for name in TIMES}
    fields["workers"] = [
        {
            **worker._asdict(),
            "state": worker.state.label,
            "oldest_tasks": [
                {**task._asdict(), "age": round(now.seconds_since(task.started), 1)} for task in worker.oldest_tasks
            ],
        }
        for worker in snapshot.workers
    ]
    fields["listeners"] = [listener._asdict() for listener in snapshot.listeners]
    return {**fields, "uid": owner}
