"""`zdd-web status --watch`: a live board, the generations of a service side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from rich.box import ASCII, ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from zdd_web import release
from zdd_web.board import Board, Snapshot
from zdd_web.cli import terminal
from zdd_web.cli.control import UNDER_WAY
from zdd_web.cli.deploy_requests import entries_of
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.history import lines_of
from zdd_web.cli.options import count
from zdd_web.cli.output import cell
from zdd_web.cli.status_text import Shown, canary_of, hangs, phase_of, stalled, state_of, upgrade_of, workers_of
from zdd_web.cli.times import Now
from zdd_web.errors import BoardError
from zdd_web.health.view import Result

#: How often the boards are read, seconds. All processes are looked at much less often: see watched_services.py.
EVERY = 0.5
#: How many background tasks of a generation are named.
MOST_TASKS = 4
#: How many entries of the history are shown.
MOST_ENTRIES = 3
#: Below that, two generations do not fit side by side.
LEAST_WIDTH = 38

RESULT_STYLES = {Result.PASSED: terminal.GOOD, Result.FAILED: terminal.BAD, Result.LATE: terminal.BAD}
WRONG = (Result.FAILED, Result.LATE)

Services = list[list[Shown]]


def run(look: Callable[[], Services]) -> None:
    """Show the board until Ctrl-C. Raises `CannotHelp` where there is no terminal."""
    console = terminal.stdout()
    if not console.is_terminal or console.is_dumb_terminal:
        raise CannotHelp("--watch needs a terminal: use --json in a loop instead")
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                live.update(board(look_again(look), Now(), console), refresh=True)
                time.sleep(EVERY)
    except KeyboardInterrupt:
        return


def look_again(look: Callable[[], Services]) -> Services:
    """Look, where a service that is gone is a fact to show."""
    try:
        return look()
    except CannotHelp:
        return []


def board(services: Services, now: Now, console: Console) -> RenderableType:
    """Return what is shown at an instant."""
    parts: list[RenderableType] = [Text(f"{now.clock(now.monotonic)}  Ctrl-C ends", style=terminal.FAINT)]
    for line in services:
        parts.append(Text(cell(line[-1].snapshot.name), style=terminal.HEAD))
        parts.append(_side_by_side([_panel(each, now, console) for each in line], console.width))
        for each in line:
            parts += canary_of(each.snapshot, console.width)
            if each.snapshot.upgrade_state in UNDER_WAY or not has_history(each):
                parts += upgrade_of(each.snapshot, now, console.width)
            if stalled(each.snapshot, now):
                parts += terminal.paragraph(hangs(each.snapshot, now), console.width, style=terminal.BAD)
        parts += recent(line[-1], console.width)
    if not services:
        parts.append(Text("no service runs here", style=terminal.BAD))
    return Group(*parts)


def has_history(shown: Shown) -> bool:
    """Tell whether a generation keeps a history, which has the outcome of its last upgrade, too."""
    return bool(shown.generation.header.history_fd)


def recent(shown: Shown, width: int) -> list[Text]:
    """Return the last things that were done to a service."""
    if not has_history(shown):
        return []
    try:
        entries = entries_of(shown.generation)
    except CannotHelp:
        return []  # it has ended, or its history cannot be read: `zdd-web history` says why
    return [Text(""), *lines_of(entries[-MOST_ENTRIES:], width, indent=2)] if entries else []


def _side_by_side(panels: list[Panel], width: int) -> RenderableType:
    fit = max(1, width // LEAST_WIDTH)
    grids: list[RenderableType] = []
    for start in range(0, len(panels), fit):
        row = panels[start : start + fit]
        grid = Table.grid(expand=True)
        for _ in row:
            grid.add_column(ratio=1)
        grid.add_row(*row)
        grids.append(grid)
    return Group(*grids)


def _panel(shown: Shown, now: Now, console: Console) -> Panel:
    snapshot = shown.snapshot
    title = Text.assemble(f"generation {snapshot.generation}: ", phase_of(snapshot, now))
    lines: list[Text] = [
        Text(f"since {now.clock(snapshot.phase_since)}, {now.age(snapshot.phase_since)}"),
        Text(f"master {snapshot.master_pid}, {workers_of(snapshot)} workers"),
        Text(f"in hand: {count(snapshot.in_flight, 'request')}, {count(snapshot.tasks, 'task')}"),
    ]
    if snapshot.release:
        lines.append(Text(f"release {cell(release.short(snapshot.release))}"))
    lines += _workers(snapshot)
    lines += _queues(snapshot)
    lines += _work(shown, now)
    ascii_only = not console.encoding.startswith("utf")
    return Panel(Group(*lines), title=title, title_align="left", box=ASCII if ascii_only else ROUNDED)


def _workers(snapshot: Snapshot) -> Iterator[Text]:
    rows = [
        (str(each.pid), state_of(each, brief=True), str(each.in_flight), str(each.requests))
        for each in snapshot.workers
    ]
    if rows:
        yield Text("")
        yield from terminal.table(("worker", "state", "busy", "requests"), rows, left=(1,), indent=0)
    for each in snapshot.workers:
        if each.error:
            yield Text(f"{each.pid}: {cell(each.error)}", style=terminal.BUSY)


def _queues(snapshot: Snapshot) -> Iterator[Text]:
    for each in snapshot.listeners:
        limit = f" of {each.limit}" if each.limit else ""
        yield Text(f"{each.length}{limit} wait at {cell(each.name)}", style=terminal.BUSY if each.length else "")


def _work(shown: Shown, now: Now) -> Iterator[Text]:
    """The oldest background tasks, and what the checks found last."""
    try:
        found = shown.generation.board
    except BoardError:
        return
    yield from _tasks(shown.snapshot, found, now)
    for name, (result, message) in sorted(checks(found).items()):
        text = f"check {name}: {result.name.lower()}" + (f": {message}" if message and result in WRONG else "")
        yield Text(text, style=RESULT_STYLES.get(result, terminal.FAINT))


def _tasks(snapshot: Snapshot, found: Board, now: Now) -> Iterator[Text]:
    named = snapshot.oldest_tasks[:MOST_TASKS]
    for task in named:
        yield Text(f"task for {now.age(task.started)}: {cell(task.name)}", style=terminal.BUSY)
    others = snapshot.tasks - len(named)
    if others > 0:
        what = "more task" if named else "background task"
        yield Text(count(others, what) + ("" if named else _oldest_of(found, now)), style=terminal.BUSY)


def _oldest_of(found: Board, now: Now) -> str:
    # Workers of an earlier version name no task.
    oldest = min((slot.oldest_task for slot in found.taken_slots() if slot.tasks and slot.oldest_task), default=0)
    return f", the oldest: {now.age(oldest)}" if oldest else ""


def checks(found: Board) -> dict[str, tuple[Result, str]]:
    """Return what each check found last, in the worker where it is worst."""
    seen: dict[str, tuple[Result, str]] = {}
    for slot in found.taken_slots():
        for record in map(slot.check, range(slot.checks)):
            try:
                result = Result(record.result)
            except ValueError:
                continue
            name = cell(record.name)
            if name not in seen or result in WRONG:
                seen[name] = result, cell(record.message)
    return seen
