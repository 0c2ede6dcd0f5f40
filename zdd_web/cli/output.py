"""What the commands print: nothing that comes from a service steers the terminal, and no work depends on it.

An upgrade or a stop goes on whether or not its progress can be read: `zdd-web upgrade | head -1` must not end with the
pipe, and a full disk behind `> upgrade.log` is not a failed upgrade.
"""

from __future__ import annotations

import errno
import sys
from typing import IO, Any, TextIO, cast

import click

from zdd_web.cli import terminal
from zdd_web.cli.errors import CannotHelp
from zdd_web.system import masking
from zdd_web.system.stdio import TolerantStream


def safe(text: object) -> str:
    """Return what came from a service as it may be printed, on lines of its own."""
    return masking.printable(str(text))


def cell(text: object) -> str:
    """Return what came from a service as it may be printed on one line."""
    return masking.printable(str(text), keep="")


def say(text: str = "", *, err: bool = False) -> None:
    """Print a text, if that is possible."""
    _print(text, sys.stderr if err else sys.stdout)


def _print(text: str, to: Any) -> OSError | None:
    stream = TolerantStream(to)
    click.echo(terminal.wrapped(safe(text), to), file=cast("IO[str]", stream))
    return stream.lost


def show(text: str = "") -> None:
    """Print what a command is there to print. Raises `CannotHelp` when it cannot be written.

    A reader that has read enough (`| head -1`) is not an error.
    """
    refuse(_print(text, sys.stdout))


def save(text: str, file: TextIO) -> None:
    """Write a text as it is, to a file or to stdout. Raises `CannotHelp` as `show()` does."""
    stream = TolerantStream(file)
    stream.write(text)
    stream.flush()
    refuse(stream.lost)


def refuse(lost: OSError | None) -> None:
    """Raise `CannotHelp` for output that could not be written; a reader that has gone is not an error."""
    if lost is not None and lost.errno != errno.EPIPE:
        raise CannotHelp(f"the output cannot be written: {lost.strerror}")
