"""`zdd-web upgrade`."""

from __future__ import annotations

import sys

import click

from zdd_web.board import Snapshot
from zdd_web.cli import control, deploy_requests, terminal
from zdd_web.cli.options import Which, another_version, in_hand, title, which_service
from zdd_web.cli.output import cell, say
from zdd_web.cli.progress import Ticker, UpgradeProgress
from zdd_web.deploy_request import DeployRequest
from zdd_web.errors import BoardError
from zdd_web.lifecycle import Phase
from zdd_web.service import Generation

#: The end of a failed generation's log that `upgrade` prints.
LOG_LINES = 60

#: The operator did not wait for the end: a second Ctrl-C or SIGTERM.
LEFT = 3


@click.command()
@which_service
@click.option("--to", metavar="DIR", type=click.Path(exists=True, file_okay=False, resolve_path=True),
              help="Start the next generation from this release's directory.")  # fmt: skip
@click.option("--watch", metavar="SECONDS", type=click.FloatRange(0, 86_400),
              help="Have both generations serve for so long; take back one that does worse.")  # fmt: skip
@click.option("--max-errors", metavar="SHARE", callback=deploy_requests.share,
              help="Of replies with status 500 or above, beyond those of the old one: 0.01 or 1%.")  # fmt: skip
@click.option("--canary", metavar="N|P%", callback=deploy_requests.canary,
              help="Watch so many workers of the new one, or a percentage; then start the rest.")  # fmt: skip
def upgrade(which: Which, to: str | None, watch: float | None, max_errors: float | None, canary: str | None) -> None:
    """Replace the running code with what is on disk.

    Status 0 only when the new generation serves; 1 when the old one goes on. Ctrl-C or SIGTERM cancels: the command
    waits and says what became of it. A second one leaves with status 3 and does not wait.
    """
    if canary is not None and watch == 0:
        raise click.UsageError(f"--canary {canary} needs a watch, and --watch 0 is none: give --watch SECONDS")
    deploy(which, DeployRequest(to=to or "", watch=watch, max_errors=max_errors, canary=canary))


def deploy(which: Which, request: DeployRequest) -> None:
    """Upgrade the service, show how it goes, and end with the command's exit status.

    `request` is what is asked of the master beyond SIGUSR2.
    """
    generation = which.find()
    say(title(generation))
    # To the end: one that comes when the outcome is known must not print that the command was aborted.
    with control.Interrupts() as interrupts:
        with another_version(), deploy_requests.asking(generation, request) as asked_for, Ticker() as ticker:

            def interrupted(asked: bool) -> None:
                ticker.step(
                    "cancelling: waiting for what becomes of it; again to leave at once"
                    if asked
                    else "this master cannot be asked to cancel (an older zdd_web?): it goes on; again to leave"
                )

            shown = UpgradeProgress(generation, ticker, request.watch)

            def progress(snapshot: Snapshot) -> None:
                # The first is of a master that has taken the request.
                asked_for.taken()
                shown(snapshot)

            result = control.upgrade(generation, progress, interrupts=interrupts, on_interrupt=interrupted)
            note = asked_for.note if result.ok else ""
        status = _report(generation, result)
        if note:
            say(f"note: {cell(note)}", err=True)
    sys.exit(status)


def _report(generation: Generation, result: control.UpgradeResult) -> int:
    """Print how it ended, and return the exit status."""
    if result.left:
        say(_left(result), err=True)
        return LEFT
    if result.ok:
        if result.cancelled:
            say("too late to cancel: the upgrade is done")
        _say_what_is_left(generation)
        say(f"generation {result.generation} serves, after {result.seconds:.1f} s")
        return 0
    lines = result.log.splitlines()[-LOG_LINES:]
    if lines:
        say(f"the new generation's last {len(lines)} log lines:", err=True)
        say("\n".join(f"{terminal.BAR}{cell(line)}" for line in lines), err=True)
    say(_who_serves(generation, result), err=True)
    # Last: what the operator looks for is at the bottom of the screen.
    terminal.fail(f"upgrade {cell(result.reason)}")
    return 1


def _left(result: control.UpgradeResult) -> str:
    if result.cancelled:
        return "left: the master was asked to cancel, and its answer was not waited for; `zdd-web status` shows it"
    return "left: the upgrade goes on; `zdd-web status` shows it"


def _say_what_is_left(generation: Generation) -> None:
    try:
        old = generation.snapshot()
    except BoardError:
        return
    if old.phase is not Phase.STOPPED and (old.in_flight or old.tasks):
        say(f"generation {old.generation} finishes what it has: {in_hand(old.in_flight, old.tasks)}")


def _who_serves(generation: Generation, result: control.UpgradeResult) -> str:
    number = generation.header.generation
    if result.serves_on:
        return f"generation {number} serves on"
    if result.phase is Phase.STOPPED:
        return f"generation {number} has ended"
    if result.phase is Phase.SERVING:
        return f"generation {number} has not answered: whether it serves is not known, its workers may"
    return f"generation {number} is {result.phase.label}"
