"""`zdd-web cancel`."""

from __future__ import annotations

import sys

import click

from zdd_web.board import UpgradeState
from zdd_web.cli import control
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.options import Which, another_version, title, which_service
from zdd_web.cli.output import cell, say
from zdd_web.lifecycle import Phase


@click.command()
@which_service
def cancel(which: Which) -> None:
    """Give up the upgrade under way; the old generation serves on.

    Status 0 when it was cancelled, 1 when there was none or it was too late: the new generation serves then.
    """
    generation = which.find()
    say(title(generation))
    try:
        with another_version():
            result = control.cancel(generation)
    except PermissionError:
        raise CannotHelp(control.no_permission(generation)) from None
    number, snapshot = generation.header.generation, result.snapshot
    if result.reason:
        say(f"  {cell(result.reason)}")
    if snapshot.upgrade_state is UpgradeState.COMMITTING or snapshot.phase is Phase.RETIRING:
        say(f"too late: generation {number + 1} serves", err=True)
    elif snapshot.phase is Phase.SERVING and not result.hangs:
        say(f"generation {number} serves on")
    if not result.cancelled:
        sys.exit(1)
