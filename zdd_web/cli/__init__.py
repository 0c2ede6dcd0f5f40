"""The command `zdd-web`; each of its commands has a module."""

from __future__ import annotations

import click

import zdd_web
from zdd_web.cli.cancel import cancel as _cancel
from zdd_web.cli.drain import drain as _drain
from zdd_web.cli.history import history as _history
from zdd_web.cli.man import man as _man
from zdd_web.cli.rehearse.command import rehearse as _rehearse
from zdd_web.cli.rollback import rollback as _rollback
from zdd_web.cli.status import status as _status
from zdd_web.cli.upgrade import upgrade as _upgrade


class WholeHelp(click.Group):
    """A group whose list of commands cuts no sentence: click ends one at 45 characters with "..."."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, each with the whole of its first sentence."""
        rows = [(name, each.get_short_help_str(limit=1000)) for name, each in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=WholeHelp, context_settings={"max_content_width": 80})
@click.version_option(zdd_web.__version__, prog_name="zdd-web")
def main() -> None:
    """Deploy, look at and rehearse a gunicorn service with zdd_web."""


for _each in (_upgrade, _rollback, _cancel, _drain, _status, _history, _rehearse, _man):
    main.add_command(_each)
