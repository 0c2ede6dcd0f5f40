"""What `upgrade` and `drain` print while they follow a master: a line for each step, and on a terminal what goes on.

The line at the bottom of a terminal is redrawn; a pipe gets lines only, and at most one in `LINE_EVERY` seconds about
the same step.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from zdd_web import service
from zdd_web.board import Board, Snapshot, UpgradeState, WorkerState
from zdd_web.cli import terminal
from zdd_web.cli.options import count, in_hand
from zdd_web.cli.output import cell
from zdd_web.cli.times import Now, duration
from zdd_web.errors import BoardError
from zdd_web.lifecycle import Phase, stalled_for
from zdd_web.lookup import Generation
from zdd_web.system import clock, proc

if TYPE_CHECKING:
    from rich.live import Live

LINE_EVERY = 1.0
#: How often the successor is looked for, and the line redrawn, seconds.
LOOK_EVERY = 0.2
#: How many steps of workers, or background tasks, one line names.
MOST_STEPS = 2


class Ticker:
    """Prints steps, and what goes on at present."""

    def __init__(self) -> None:
        self._console = terminal.stdout()
        self._began = self._printed_at = time.monotonic()
        self._printed = ""
        self._live: Live | None = None

    def __enter__(self) -> Ticker:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Not for a pipe: a script need not wait for what draws on terminals.
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, text: str) -> None:
        """Print a line that stays."""
        self._printed, self._printed_at = text, time.monotonic()
        terminal.show(self._console, terminal.paragraph(text, terminal.width_of(self._console)))

    def now(self, text: str, more: str = "", *, repeats_step: bool = False) -> None:
        """Show what goes on: at the bottom of a terminal with `more`, and in a pipe as a line when it has changed.

        With `repeats_step` a step has printed it already, to a pipe.
        """
        if self._live is None:
            if not repeats_step and text != self._printed and time.monotonic() - self._printed_at >= LINE_EVERY:
                self.step(text)
            return
        elapsed = duration(time.monotonic() - self._began)
        lines = terminal.paragraph(f"{elapsed}: {text}{more}", self._console.width - 1)
        self._live.update(Text("\n", style=terminal.BUSY).join(lines), refresh=True)


class UpgradeProgress:
    """Follows an upgrade on the boards of both generations."""

    def __init__(self, generation: Generation, ticker: Ticker, watch: float | None = None) -> None:
        """`watch` is for how many seconds the new generation was asked to be watched; None: as the settings have it."""
        self._old, self._ticker, self._watch = generation, ticker, watch
        self._successor: Generation | None = None
        self._last: UpgradeState | None = None
        self._looked_at = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        """Show a look at the old generation's board."""
        if snapshot.upgrade_state is not self._last:
            self._last = snapshot.upgrade_state
            is_watched = self._watch and snapshot.upgrade_state is UpgradeState.COMMITTING
            self._ticker.step(WATCHED if is_watched else STEPS[snapshot.upgrade_state])
        if time.monotonic() - self._looked_at < LOOK_EVERY:
            return
        self._looked_at = time.monotonic()
        silence = stalled_for(snapshot.phase, snapshot.tick_at, time.monotonic_ns())
        if silence:
            self._ticker.now(f"the master hangs: its main loop has not run for {duration(silence)}")
        elif snapshot.upgrade_state is UpgradeState.BOOTING:
            self._ticker.now(booting(self._look()))
        elif snapshot.upgrade_state is UpgradeState.COMMITTING:
            found = self._look()
            shown = committing(found, snapshot, self._watch)
            more = shown.more + (self._errors() if shown.is_watched else "")
            self._ticker.now(shown.text, more, repeats_step=shown.repeats_step)

    def _errors(self) -> str:
        assert self._successor is not None
        try:
            return errors_of(self._successor.board)
        except BoardError:
            return ""

    def _look(self) -> Snapshot | None:
        try:
            if self._successor is None:
                self._successor = successor_of(self._old)
            return self._successor.snapshot() if self._successor is not None else None
        except BoardError:
            return None  # of another version, or it has ended


STEPS = {
    UpgradeState.NONE: "asked for",
    UpgradeState.BOOTING: "the new generation boots",
    UpgradeState.COMMITTING: "it is ready and answers; waiting for the commit window to end",
    UpgradeState.DONE: "it is active; the old one accepts nothing more",
    UpgradeState.FAILED: "the new generation is ended",
    UpgradeState.REFUSED: "refused",
}
WATCHED = "it is ready and answers; both generations serve while it is watched"


def successor_of(generation: Generation) -> Generation | None:
    """Return the generation that was forked by a master and boots, or None while it has no board yet.

    Raises `BoardError` when that master's board cannot be read.
    """
    # To look at a process is to read the name of each of its descriptors: its workers have thousands of connections.
    workers = {pid for pid, _ in generation.board.worker_pids()}
    for pid in _children(generation.pid):
        if pid in workers:
            continue
        try:
            found = service.generation_of(pid)
        except OSError:
            continue  # it has ended
        if found is not None and found.header.predecessor_pid == generation.pid:
            return found
    return None


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        # A kernel without CONFIG_PROC_CHILDREN.
        return [int(each) for each in os.listdir("/proc") if each.isdigit() and proc.parent(int(each)) == pid]


def booting(successor: Snapshot | None) -> str:
    """Return how far the workers of a new generation have come, and what the others do."""
    if successor is None:
        return "the new master starts"
    states = [worker.state for worker in successor.workers]
    ready = states.count(WorkerState.READY) + states.count(WorkerState.SERVING)
    at_work = sorted({cell(worker.error) for worker in successor.workers if worker.error})
    waits = "; ".join(at_work[:MOST_STEPS]) + (" ..." if len(at_work) > MOST_STEPS else "")
    waits = f"; waiting for: {waits}" if waits else ""
    canary = f" (canary, of {successor.workers_full} workers)" if successor.is_canary else ""
    return f"worker {ready} of {successor.workers_wanted} is ready{canary}{waits}"


class Committing(NamedTuple):
    """What goes on in the commit window; `more` is what both have in hand, which changes all the time."""

    text: str
    more: str
    is_watched: bool = False
    #: A pipe has a line for it already.
    repeats_step: bool = False


def committing(successor: Snapshot | None, old: Snapshot, watch: float | None = None) -> Committing:
    """Return what goes on in the commit window, and until the old generation accepts nothing more.

    `watch` is for how many seconds the new generation was asked to be watched.
    """
    old_has = f"the old one {in_hand(old.in_flight, old.tasks)}"
    if old.phase is Phase.RETIRING:
        return Committing("the old generation stops accepting", f": {in_hand(old.in_flight, old.tasks)}")
    if successor is None:
        return Committing("commit window", f": the new generation is not seen, {old_has}", repeats_step=True)
    more = f"; the new generation has {in_hand(successor.in_flight, successor.tasks)}, {old_has}"
    states = [worker.state for worker in successor.workers]
    left = (watch or 0.0) - clock.since(old.upgrade_since)
    time_left = f", {duration(left)} left" if left > 0 else ""
    if successor.is_canary:
        few, all_of_them = successor.workers_wanted, count(successor.workers_full, "worker")
        return Committing(f"watched as a canary of {few} of {all_of_them}", time_left + more, is_watched=True)
    if WorkerState.BOOTING in states:
        serve = states.count(WorkerState.SERVING)
        return Committing(f"it grows: {serve} of {successor.workers_wanted} workers serve", more)
    text = "watched" if left > 0 else "commit window"
    return Committing(text, time_left + more, is_watched=left > 0, repeats_step=True)


def errors_of(board: Board) -> str:
    """Return how many replies of a generation had a status that counts against it."""
    requests, errors = board.answered()
    return f"; the new one has answered {count(requests, 'request')}, {errors} with status 500 or above"


class StopProgress:
    """Follows the stop of the generations of a service."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker
        self._last: tuple[int, Phase] | None = None

    def __call__(self, snapshot: Snapshot) -> None:
        """Show a look at the board of one that stops."""
        which = snapshot.generation, snapshot.phase
        if which != self._last:
            self._last = which
            self._ticker.step(stopping(snapshot))
        else:
            self._ticker.now(stopping(snapshot), oldest(snapshot) + limit(snapshot))


def stopping(snapshot: Snapshot) -> str:
    """Return what a generation that stops is at."""
    if snapshot.phase is Phase.LAME_DUCK:
        return "lame_duck: readiness is 503 (unless LAME_DUCK_READY), everything is still served"
    return f"{snapshot.phase.label}: {in_hand(snapshot.in_flight, snapshot.tasks)}"


def oldest(snapshot: Snapshot) -> str:
    """Return which background tasks have been in hand for longest, and for how long; "" where none has a name."""
    now = Now()
    named = [f"{cell(task.name)} for {now.age(task.started)}" for task in snapshot.oldest_tasks[:MOST_STEPS]]
    return f" ({'; '.join(named)}{' ...' if snapshot.tasks > len(named) else ''})" if named else ""


def limit(snapshot: Snapshot) -> str:
    """Return in how long what is in hand is cut off; "" where there is no deadline."""
    left = (snapshot.deadline - time.monotonic_ns()) / 1e9
    return f"; cut off in {duration(left)}" if snapshot.deadline and left > 0 else ""
