"""The commands as `manage.py zdd ...` and `flask zdd ...` have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import click

from zdd_web import checks
from zdd_web.cli import WholeHelp
from zdd_web.cli.cancel import cancel
from zdd_web.cli.drain import drain
from zdd_web.cli.history import history
from zdd_web.cli.output import cell, say
from zdd_web.cli.rollback import rollback
from zdd_web.cli.status import status
from zdd_web.cli.upgrade import upgrade

#: The commands of `zdd-web` for a service that runs. `rehearse` and `man` concern no such service.
COMMANDS = (status, history, upgrade, rollback, cancel, drain)


def group(check: Callable[..., None], *options: click.Option) -> click.Group:
    """Return `COMMANDS` and the framework's own `check`."""
    own = click.Command("check", callback=check, params=list(options), help=check.__doc__)
    return WholeHelp("zdd", commands=[*COMMANDS, own], help="Deploy and look at this service.")


def switch(name: str, text: str) -> click.Option:
    """Return an option that is there or not."""
    return click.Option([name], is_flag=True, help=text)


def run(commands: click.Group, arguments: Sequence[str], name: str) -> int:
    """Run a command; return its exit status. Errors are printed."""
    try:
        commands.main(list(arguments), name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))


def report(serious: Iterable[str], others: Iterable[str] = ()) -> None:
    """Print what a framework has found, run the app's checks once, and end with status 1 if anything serious is wrong.

    A check that is not critical is printed and counts as a warning.
    """
    failed = False
    for text in serious:
        failed = True
        say(f"error: {text}", err=True)
    for text in others:
        say(f"warning: {text}", err=True)
    wrong = checks.failing()
    for each in checks.registered():
        if each.name not in wrong:
            say(f"ok: check {each.name!r}")
            continue
        failed = failed or each.critical
        say(f"{'error' if each.critical else 'warning'}: check {each.name!r}: {cell(wrong[each.name])}", err=True)
    if failed:
        raise SystemExit(1)
    # An app without checks proves nothing.
    say("nothing serious was found" if checks.count() else "nothing serious was found; the app has no checks")
