"""How a command says that it could not do what was asked."""

from __future__ import annotations

import contextlib
import sys
from typing import IO, Any

import click

from zdd_web.cli import terminal
from zdd_web.system import masking


class CannotHelp(click.ClickException):
    """The question was wrong or could not be put: exit status 2, as for bad usage. 1 means "no" or "lost"."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the message, safe for a terminal."""
        return masking.printable(super().format_message())

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message; where that is impossible, the exit status still tells."""
        with contextlib.suppress(OSError, AttributeError):
            stream = sys.stderr if file is None else file
            click.echo(terminal.wrapped(f"Error: {self.format_message()}", stream), file=stream)
