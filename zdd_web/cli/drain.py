"""`zdd-web drain`."""

from __future__ import annotations

import sys

import click

from zdd_web.cli import control, terminal
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.options import Which, another_version, count, title, which_service
from zdd_web.cli.output import cell, say
from zdd_web.cli.progress import StopProgress, Ticker
from zdd_web.cli.upgrade import LEFT


@click.command()
@which_service
@click.option("--no-wait", is_flag=True, help="Send SIGTERM and leave it at that.")
def drain(which: Which, no_wait: bool) -> None:
    """Stop the service and follow it to its end.

    Status 0 only when nothing was cut off. A stop cannot be cancelled: Ctrl-C or SIGTERM says so, and a second one
    leaves with status 3 while the stop goes on.
    """
    generation = which.find()
    say(title(generation) + (", which stops already" if control.stops(generation) else ""))
    try:
        if no_wait:
            control.request_stop(generation)
            return
        with control.Interrupts() as interrupts:
            with another_version(), Ticker() as ticker:
                result = control.drain(
                    generation,
                    StopProgress(ticker),
                    interrupts=interrupts,
                    on_interrupt=lambda: ticker.step("a stop cannot be cancelled: it goes on; again to leave"),
                )
            status = _report(generation.header.generation, result)
    except PermissionError:
        raise CannotHelp(control.no_permission(generation)) from None
    except ProcessLookupError:
        raise CannotHelp(f"the master {generation.pid} is gone") from None
    sys.exit(status)


def _report(number: int, result: control.DrainResult) -> int:
    """Print how it ended, and return the exit status."""
    if result.left:
        say("left: the stop goes on; `zdd-web status` shows it", err=True)
        return LEFT
    if result.ok:
        say(f"generation {number} has ended, after {result.seconds:.1f} s; nothing was cut off")
        return 0
    if result.reason:
        terminal.fail(f"drain failed: {cell(result.reason)}")
    else:
        lost = f"{count(result.requests, 'request')} and {count(result.tasks, 'background task')}"
        terminal.fail(
            f"generation {number} has ended, after {result.seconds:.1f} s; cut off: {lost}: "
            f"see event=background.abandoned and event=drain.abandoned in its log"
        )
    return 1
