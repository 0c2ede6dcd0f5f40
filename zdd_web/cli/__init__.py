"""The command `zdd-web`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from tabulate import tabulate

import zdd_web
from zdd_web import release, service
from zdd_web.board import Snapshot, UpgradeState, WorkerView
from zdd_web.cli import deploys, follow, history, rollback, stop
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.output import cell, say, show
from zdd_web.cli.rehearse.command import rehearse
from zdd_web.deploy_request import DeployRequest
from zdd_web.errors import BoardError, ServiceNotFound
from zdd_web.lifecycle import Phase, stalled_for
from zdd_web.lookup import user

#: The end of a failed generation's log that `upgrade` prints.
LOG_LINES = 60


@click.group()
@click.version_option(zdd_web.__version__, prog_name="zdd-web")
def main() -> None:
    """Deploy, look at and rehearse a gunicorn service with zdd_web."""


@dataclasses.dataclass(frozen=True)
class Which:
    """Which service the operator means, and whether to tell what was skipped in the search for it."""

    name: str | None
    pid: int | None
    pid_file: str | None
    owner: int | None
    verbose: bool

    def note(self, text: str) -> None:
        """Print what was skipped, with -v."""
        if self.verbose:
            say(f"skipped: {cell(text)}", err=True)

    def find(self) -> service.Generation:
        """Return the active generation. Raises `CannotHelp`, or a usage error."""
        if sum(given is not None for given in (self.name, self.pid, self.pid_file)) > 1:
            raise click.UsageError("give one of --name, --pid and --pid-file")
        try:
            return service.find(name=self.name, pid=self.pid, pid_file=self.pid_file, owner=self.owner, note=self.note)
        except ServiceNotFound as error:
            raise CannotHelp(cell(str(error))) from None


def _uid(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return pwd.getpwnam(value).pw_uid
    except KeyError:
        if value.isdecimal():
            return int(value)
    raise click.BadParameter(f"there is no user {value!r} here")


def _which_service(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which service, as one argument."""

    @functools.wraps(command)
    def with_which(
        name: str | None, pid: int | None, pid_file: str | None, owner: int | None, verbose: bool, **others: Any
    ) -> Any:
        return command(Which(name, pid, pid_file, owner, verbose), **others)

    found: Callable[..., Any] = with_which
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Print which processes were skipped, and why."),
        click.option("--user", "owner", metavar="USER", callback=_uid, help="Only services of this user; for root."),
        click.option("--pid-file", metavar="FILE", help="The service's pid file."),
        click.option("--pid", type=int, help="The pid of its master."),
        click.option("--name", help="Its NAME; needed where several services run."),
    ):
        found = option(found)
    return found


def _title(generation: service.Generation) -> str:
    header, whose = generation.header, _whose(generation)
    return f"{cell(header.name)}: generation {header.generation} (pid {generation.pid}{whose and f', {whose}'})"


def _whose(generation: service.Generation) -> str:
    """Return whose a service is, where that is not the user who asks."""
    return "" if generation.owner == os.geteuid() else user(generation.owner)


@main.command()
@_which_service
@click.option("--to", metavar="DIR", type=click.Path(exists=True, file_okay=False, resolve_path=True),
              help="Start the next generation from this release's directory.")  # fmt: skip
@click.option("--watch", metavar="SECONDS", type=click.FloatRange(0, 86_400),
              help="Have both generations serve for so long; take back one that does worse.")  # fmt: skip
@click.option("--max-errors", metavar="SHARE", callback=deploys.share,
              help="Of replies with status 500 or above, beyond those of the old one: 0.01 or 1%.")  # fmt: skip
def upgrade(which: Which, to: str | None, watch: float | None, max_errors: float | None) -> None:
    """Replace the running code with what is on disk; status 0 only when the new generation serves."""
    plain = to is None and watch is None and max_errors is None
    _deploy(which, None if plain else DeployRequest(to=to or "", watch=watch, max_errors=max_errors))


def _deploy(which: Which, request: DeployRequest | None) -> None:
    generation = which.find()
    say(_title(generation))
    with _another_version(), deploys.asking(generation, request) as asked:
        result = follow.upgrade(generation, lambda snapshot: say(f"  {_PROGRESS[snapshot.upgrade_state]}"))
        note = asked.note if result.ok else ""
    if result.ok:
        say(f"generation {result.generation} serves, after {result.seconds:.1f} s")
        if note:
            say(f"note: {cell(note)}", err=True)
        return
    say(f"upgrade {cell(result.reason)}", err=True)
    lines = result.log.splitlines()[-LOG_LINES:]
    if lines:
        say(f"the new generation's last {len(lines)} log lines:", err=True)
        say("\n".join(f"  | {cell(line)}" for line in lines), err=True)
    if result.serves_on:
        say(f"generation {generation.header.generation} serves on", err=True)
    sys.exit(1)


@main.command()
@_which_service
@click.option("--no-wait", is_flag=True, help="Send SIGTERM and leave it at that.")
def drain(which: Which, no_wait: bool) -> None:
    """Stop the service and follow it to its end; status 0 only when nothing was cut off."""
    generation = which.find()
    number = generation.header.generation
    say(_title(generation) + (", which stops already" if stop.stops(generation) else ""))
    try:
        if no_wait:
            stop.request(generation)
            return
        with _another_version():
            result = stop.drain(generation, lambda snapshot: say(f"  {_drains(snapshot)}"))
    except PermissionError:
        raise CannotHelp(f"no permission to signal process {generation.pid}: run this as its user or as root") from None
    except ProcessLookupError:
        raise CannotHelp(f"the master {generation.pid} is gone") from None
    if result.ok:
        say(f"generation {number} has ended, after {result.seconds:.1f} s; nothing was cut off")
        return
    if result.reason:
        say(f"drain failed: {result.reason}", err=True)
    else:
        lost = f"{_count(result.requests, 'request')} and {_count(result.tasks, 'background task')}"
        say(f"generation {number} has ended, after {result.seconds:.1f} s; cut off: {lost}: "
                   f"see event=background.abandoned and event=drain.abandoned in its log", err=True)  # fmt: skip
    sys.exit(1)


def _drains(snapshot: Snapshot) -> str:
    if snapshot.phase is Phase.LAME_DUCK:
        return "lame_duck: readiness is 503 (unless LAME_DUCK_READY), everything is still served"
    in_hand = f"{_count(snapshot.in_flight, 'request')} and {_count(snapshot.tasks, 'background task')} in hand"
    return f"{snapshot.phase.label}: {in_hand}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def _another_version() -> Iterator[None]:
    try:
        yield
    except BoardError as error:
        raise CannotHelp(str(error)) from None


_PROGRESS = {
    UpgradeState.BOOTING: "the new generation boots",
    UpgradeState.COMMITTING: "it is ready and answers; waiting for the commit window to end",
    UpgradeState.DONE: "it is in office; the old one finishes what it has",
    UpgradeState.FAILED: "it failed",
    UpgradeState.REFUSED: "refused",
}


@main.command()
@_which_service
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(which: Which, as_json: bool) -> None:
    """Show generations, phases, workers, requests in flight and background tasks."""
    owners, snapshots, refused = [], [], []
    for generation in _shown(which):
        try:
            snapshots.append(generation.snapshot())
            owners.append(generation.owner)
        except BoardError as error:
            # Another service may be of another version, and these are not the worse for it.
            refused.append(cell(f"{generation.header.name} (pid {generation.pid}): {error}"))
    if not snapshots:
        raise CannotHelp("; ".join(refused))
    for each in refused:
        say(each, err=True)
    if as_json:
        plain = [{**_plain(snapshot), "uid": owner} for snapshot, owner in zip(snapshots, owners, strict=True)]
        show(json.dumps({"format": 1, "generations": plain}, indent=2))
    else:
        tables = (_generation_table(snapshots, owners), _worker_table(snapshots), _listener_table(snapshots))
        show("\n\n".join(tables))
    stalled = [(snapshot, owner) for snapshot, owner in zip(snapshots, owners, strict=True) if _stalled_for(snapshot)]
    for snapshot, owner in stalled:
        say(f"{_stall_of(snapshot)} ({user(owner)})" if owner != os.geteuid() else _stall_of(snapshot), err=True)
    # Anybody can make a board that says so; that must not fail the watch over one's own.
    if any(owner in (os.geteuid(), which.owner) for _, owner in stalled):
        sys.exit(1)


def _stalled_for(snapshot: Snapshot) -> float:
    return stalled_for(snapshot.phase, snapshot.tick_at, time.monotonic_ns())


def _stall_of(snapshot: Snapshot) -> str:
    pid = snapshot.master_pid
    return (
        f"{snapshot.name}: generation {snapshot.generation} (pid {pid}): its main loop has not run for "
        f"{_stalled_for(snapshot):.0f} s: it obeys no signal and replaces no worker. `ps -o stat,wchan {pid}` shows "
        f"whether it is stopped (T: kill -CONT {pid}); `py-spy dump --pid {pid}` shows which hook it is in"
    )


def _shown(which: Which) -> list[service.Generation]:
    if which.pid is None and which.pid_file is None:
        # Several may have that name, and this is where one sees it.
        everything = service.generations(which.owner, which.note)
        lines = [line for line in service.descent(everything, which.note) if service.has_name(line, which.name)]
        if lines:
            if everything.shortfall:
                say(everything.shortfall, err=True)
            return [generation for line in lines for generation in line]
    return service.line_of(which.find())


def _generation_table(snapshots: list[Snapshot], owners: list[int]) -> str:
    columns = [
        "service",
        "generation",
        "release",
        "phase",
        "for",
        "master",
        "workers",
        "in flight",
        "tasks",
        "last upgrade",
    ]
    rows = [list(_generation_row(snapshot)) for snapshot in snapshots]
    if any(owner != os.geteuid() for owner in owners):
        at = columns.index("workers")
        columns.insert(at, "user")
        for row, owner in zip(rows, owners, strict=True):
            row.insert(at, user(owner).removeprefix("user "))
    return tabulate(rows, columns)


def _generation_row(snapshot: Snapshot) -> tuple[object, ...]:
    last = "" if snapshot.upgrade_state is UpgradeState.NONE else snapshot.upgrade_state.name.lower()
    if snapshot.upgrade_reason:
        last += f": {cell(snapshot.upgrade_reason)[:60]}"
    return (
        cell(snapshot.name),
        snapshot.generation,
        cell(release.short(snapshot.release)),
        f"{snapshot.phase.label}, stalled" if _stalled_for(snapshot) else snapshot.phase.label,
        _age(snapshot.phase_since),
        snapshot.master_pid,
        f"{len(snapshot.workers)} of {snapshot.workers_wanted}",
        snapshot.in_flight,
        snapshot.tasks,
        last,
    )


def _worker_table(snapshots: list[Snapshot]) -> str:
    columns = ("generation", "worker", "state", "in flight", "requests", "tasks", "error")
    rows = [
        (
            snapshot,
            (
                snapshot.generation,
                each.pid,
                _state(each),
                each.in_flight,
                each.requests,
                each.tasks,
                cell(each.error),
            ),
        )
        for snapshot in snapshots
        for each in snapshot.workers
    ]
    return _table_of(snapshots, columns, rows)


def _listener_table(snapshots: list[Snapshot]) -> str:
    columns = ("generation", "listener", "waiting", "limit", "accepted")
    rows = [
        (snapshot, (snapshot.generation, cell(each.name), each.length, each.limit, each.accepted or ""))
        for snapshot in snapshots
        for each in snapshot.listeners
    ]
    return _table_of(snapshots, columns, rows)


def _table_of(
    snapshots: list[Snapshot], columns: tuple[str, ...], rows: Sequence[tuple[Snapshot, tuple[object, ...]]]
) -> str:
    """Return a table of what masters have, with whose each row is where there are several."""
    if len(snapshots) == 1:
        return tabulate([row for _, row in rows], columns)
    return tabulate([(snapshot.master_pid, *row) for snapshot, row in rows], ("master", *columns))


def _state(worker: WorkerView) -> str:
    return f"{worker.state.label}, told to go" if worker.retiring else worker.state.label


def _age(since_ns: int) -> str:
    return f"{max(0.0, time.monotonic() - since_ns / 1e9):.0f} s"


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    fields = dataclasses.asdict(snapshot)
    fields["phase"] = snapshot.phase.label
    fields["successor_phase"] = snapshot.successor_phase.label if snapshot.successor_phase else None
    fields["upgrade_state"] = snapshot.upgrade_state.name.lower()
    fields["in_flight"], fields["tasks"] = snapshot.in_flight, snapshot.tasks
    fields["stalled_for"] = round(_stalled_for(snapshot), 1)
    for worker in fields["workers"]:
        worker["state"] = worker["state"].label
    return fields


main.add_command(rehearse)
history.add_to(main, _which_service)
rollback.add_to(main, _which_service, _deploy)
