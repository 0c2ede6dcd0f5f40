"""How `status` shows a service: pure functions from what boards say to lines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from zdd_web import release
from zdd_web.board import Snapshot, UpgradeState, WorkerState, WorkerView
from zdd_web.cli import terminal
from zdd_web.cli.control import UNDER_WAY
from zdd_web.cli.output import cell
from zdd_web.cli.times import Now, duration
from zdd_web.lifecycle import Phase, stalled_for
from zdd_web.lookup import Generation, user

PHASE_STYLES = {
    Phase.BOOTING: terminal.BUSY,
    Phase.SERVING: terminal.GOOD,
    Phase.LAME_DUCK: terminal.BUSY,
    Phase.DRAINING: terminal.BUSY,
    Phase.RETIRING: terminal.FAINT,
    Phase.STOPPED: terminal.FAINT,
}


@dataclass(frozen=True)
class Shown:
    """A generation and its board as it was at the look."""

    generation: Generation
    snapshot: Snapshot


def stalled(snapshot: Snapshot, now: Now) -> float:
    """Return for how many seconds a master's loop has not run; 0 for one that runs."""
    return stalled_for(snapshot.phase, snapshot.tick_at, now.monotonic)


def hangs(snapshot: Snapshot, now: Now) -> str:
    """Return what it means that a master hangs, and what to do."""
    pid = snapshot.master_pid
    return (
        f"{cell(snapshot.name)}: generation {snapshot.generation} (pid {pid}) hangs: its main loop has not run for "
        f"{duration(stalled(snapshot, now))}: it obeys no signal and replaces no worker. `ps -o stat,wchan {pid}` "
        f"shows whether it is stopped (T: kill -CONT {pid}); `py-spy dump --pid {pid}` shows which hook it is in"
    )


def lines_of(line: Sequence[Shown], now: Now, width: int | None) -> list[Text]:
    """Return what is shown of one service, the oldest generation first, in at most 80 columns where `width` is 80."""
    snapshots = [each.snapshot for each in line]
    title = Text(cell(snapshots[-1].name), style=terminal.HEAD)
    owner = line[-1].generation.owner
    if owner != os.geteuid():
        title.append(f" ({user(owner)})", style=terminal.BUSY)
    lines = [title, *generations(snapshots, now)]
    for snapshot in snapshots:
        lines += release_of(snapshot, width)
    for snapshot in snapshots:
        lines += canary_of(snapshot, width)
        lines += upgrade_of(snapshot, now, width)
    lines += [Text(""), *workers(snapshots)]
    for worker in (worker for snapshot in snapshots for worker in snapshot.workers if worker.error):
        lines += terminal.paragraph(f"worker {worker.pid}: {cell(worker.error)}", width, style=_error_style(worker))
    queues = listeners(snapshots)
    return [*lines, Text(""), *queues] if queues else lines


def _error_style(worker: WorkerView) -> str:
    # While it boots, the step that it is at stands there.
    return terminal.BUSY if worker.state is WorkerState.BOOTING else terminal.BAD


def generations(snapshots: Sequence[Snapshot], now: Now) -> list[Text]:
    """Return the table of generations."""
    heads = ("gen", "phase", "since", "for", "master", "workers", "in flight", "tasks")
    return terminal.table(heads, [list(_generation(each, now)) for each in snapshots], left=(1, 2), indent=2)


def _generation(snapshot: Snapshot, now: Now) -> Iterator[Text | str]:
    yield str(snapshot.generation)
    yield phase_of(snapshot, now)
    yield now.clock(snapshot.phase_since)
    yield now.age(snapshot.phase_since)
    yield str(snapshot.master_pid)
    few = len(snapshot.workers) < snapshot.workers_wanted or snapshot.is_canary
    yield Text(workers_of(snapshot), style=terminal.BUSY if few and snapshot.phase is Phase.SERVING else "")
    yield str(snapshot.in_flight)
    yield str(snapshot.tasks)


def phase_of(snapshot: Snapshot, now: Now) -> Text:
    """Return the phase, and that the master hangs where it does."""
    if stalled(snapshot, now):
        return Text(f"{snapshot.phase.label}, hangs", style=terminal.BAD)
    return Text(snapshot.phase.label, style=PHASE_STYLES[snapshot.phase])


def release_of(snapshot: Snapshot, width: int | None) -> list[Text]:
    """Return which code a generation runs; nothing where its version of zdd_web does not tell."""
    # Not a column: a RELEASE may have a hundred characters.
    if not snapshot.release:
        return []
    text = f"release of generation {snapshot.generation}: {cell(release.short(snapshot.release))}"
    return terminal.paragraph(text, width)


def workers_of(snapshot: Snapshot) -> str:
    """Return how many workers a generation has, and is to have once it has grown."""
    # A version without canaries does not tell `workers_full`.
    return f"{len(snapshot.workers)} of {max(snapshot.workers_full, snapshot.workers_wanted)}"


def canary_of(snapshot: Snapshot, width: int | None) -> list[Text]:
    """Return that a generation serves with some of its workers only; nothing for any other."""
    if not snapshot.is_canary or snapshot.phase not in (Phase.BOOTING, Phase.SERVING):
        return []
    text = (
        f"generation {snapshot.generation} is a canary: {snapshot.workers_wanted} of {snapshot.workers_full} workers "
        f"until its watch is passed"
    )
    return terminal.paragraph(text, width, style=terminal.BUSY)


def upgrade_of(snapshot: Snapshot, now: Now, width: int | None) -> list[Text]:
    """Return what the last upgrade of a generation came to, with the whole of its reason."""
    state = snapshot.upgrade_state
    if state is UpgradeState.NONE:
        return []
    bad = state in (UpgradeState.FAILED, UpgradeState.REFUSED)
    text = f"upgrade of generation {snapshot.generation}: {state.name.lower()}"
    if snapshot.upgrade_since:
        clock, age = now.clock(snapshot.upgrade_since), now.age(snapshot.upgrade_since)
        text += f" since {clock}, for {age}" if state in UNDER_WAY else f" at {clock}, {age} ago"
    if snapshot.upgrade_reason:
        text += f": {cell(snapshot.upgrade_reason)}"
    style = terminal.BUSY if state in UNDER_WAY else terminal.BAD if bad else terminal.FAINT
    return terminal.paragraph(text, width, style=style)


def workers(snapshots: Sequence[Snapshot]) -> list[Text]:
    """Return the table of workers."""
    rows = [
        (
            str(snapshot.generation),
            str(each.pid),
            state_of(each),
            str(each.in_flight),
            str(each.requests),
            str(each.tasks),
        )
        for snapshot in snapshots
        for each in snapshot.workers
    ]
    heads = ("gen", "worker", "state", "in flight", "requests", "tasks")
    return terminal.table(heads, rows, left=(2,), indent=2)


def state_of(worker: WorkerView, *, brief: bool = False) -> Text:
    """Return a worker's state, and unless it is to be `brief`, that its master has ordered it to leave."""
    style = {WorkerState.SERVING: terminal.GOOD, WorkerState.LEAVING: terminal.FAINT}.get(worker.state, terminal.BUSY)
    return Text(f"{worker.state.label}, retiring" if worker.retiring and not brief else worker.state.label, style=style)


def listeners(snapshots: Sequence[Snapshot]) -> list[Text]:
    """Return the table of listeners, whose names may be long and stand last; empty where there is none."""
    found = [(one, each) for one in snapshots if one.phase is not Phase.STOPPED for each in one.listeners]
    # It is counted where there are several on a port: LISTENER = "reuseport".
    is_counted = any(each.accepted for _, each in found)
    rows = [
        (
            str(snapshot.generation),
            Text(str(each.length), style=terminal.BUSY if each.length else ""),
            str(each.limit or ""),
            *((str(each.accepted),) if is_counted else ()),
            cell(each.name),
        )
        for snapshot, each in found
    ]
    heads = ("gen", "waiting", "limit", *(("accepted",) if is_counted else ()), "listener")
    return terminal.table(heads, rows, left=(len(heads) - 1,), indent=2) if rows else []
