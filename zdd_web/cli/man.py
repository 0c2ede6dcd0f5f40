"""`zdd-web man`: the man page, made of the texts that `--help` prints."""

from __future__ import annotations

from collections.abc import Iterator

import click

import zdd_web
from zdd_web.cli.output import show

STATUSES = {
    "0": "It was done.",
    "1": "No: the upgrade was refused, failed or was cancelled; work was cut off; a master hangs; something was lost.",
    "2": "It could not be tried, or what was found could not be written.",
    "3": "Interrupted twice: what was asked for goes on.",
}

FILES = {
    "/proc/PID/fd": "A service is found by the memory that its master holds open. Nothing is written anywhere.",
}

ENVIRONMENT = {
    "NO_COLOR": "No colour on a terminal.",
    "_ZDD_WEB_COMPLETE": "bash_source, zsh_source or fish_source prints what a shell needs to complete the command.",
}


@click.command()
def man() -> None:
    """Print the man page: `zdd-web man | man -l -`."""
    root = click.get_current_context().find_root()
    assert isinstance(root.command, click.Group)
    show(page(root.command).rstrip("\n"))


def page(group: click.Group) -> str:
    """Return the man page of the command and its commands, in roff."""
    return "\n".join(_lines(group)) + "\n"


def _lines(group: click.Group) -> Iterator[str]:
    about = (group.help or "").strip()
    yield f'.TH ZDD-WEB 1 "" "zdd_web {zdd_web.__version__}" "User Commands"'
    yield from (".SH NAME", f"zdd-web \\- {_roff(about[0].lower() + about[1:].rstrip('.'))}")
    yield from (".SH SYNOPSIS", ".B zdd-web", ".I COMMAND", "[OPTIONS]")
    yield ".SH COMMANDS"
    for name, command in sorted(group.commands.items()):
        context = click.Context(command, info_name=name)
        yield f".SS {_roff(name)}"
        yield from (f".B zdd-web {_roff(name)}", _roff(" ".join(command.collect_usage_pieces(context))))
        for paragraph in (command.help or "").split("\n\n"):
            yield from (".PP", _roff(" ".join(paragraph.split())))
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                yield from (".TP", f".B {_roff(record[0])}", _roff(record[1]))
    for title, entries in (("EXIT STATUS", STATUSES), ("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
        yield f".SH {title}"
        for term, text in entries.items():
            yield from (".TP", f".B {_roff(term)}", _roff(text))


def _roff(text: str) -> str:
    """Return a text that roff prints as it is.

    >>> _roff("--name 'x'")
    "\\\\-\\\\-name 'x'"
    """
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
