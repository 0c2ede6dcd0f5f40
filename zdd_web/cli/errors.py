"""How a command says that it could not do what was asked."""

from __future__ import annotations

import click


class CannotHelp(click.ClickException):
    """The question was wrong or could not be put: exit status 2, as for bad usage. 1 means "no" or "lost"."""

    exit_code = 2
