"""The options by which an operator says which service is meant."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pwd
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from zdd_web import service
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.output import cell, say
from zdd_web.errors import BoardError, ServiceNotFound
from zdd_web.lookup import user


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


def _names(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Return the names of services that run, for a shell that completes the option."""
    names = {cell(each.header.name) for each in service.generations()}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(begun)]


def which_service(command: Callable[..., Any]) -> Callable[..., Any]:
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
        click.option("--name", shell_complete=_names, help="Its NAME; needed where several services run."),
    ):
        found = option(found)
    return found


def title(generation: service.Generation) -> str:
    """Return how a command names the generation that it found; its user where that is not the one who asks."""
    header = generation.header
    owner = "" if generation.owner == os.geteuid() else f", {user(generation.owner)}"
    return f"{cell(header.name)}: generation {header.generation} (pid {generation.pid}{owner})"


@contextlib.contextmanager
def another_version() -> Iterator[None]:
    """Turn a board that cannot be read into a message."""
    try:
        yield
    except BoardError as error:
        raise CannotHelp(str(error)) from None


def count(number: int, what: str) -> str:
    """Return a number of things.

    >>> count(1, "request"), count(2, "background task")
    ('1 request', '2 background tasks')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def in_hand(requests: int, tasks: int) -> str:
    """Return what processes have in hand, in words.

    >>> in_hand(1, 0), in_hand(2, 1), in_hand(0, 0)
    ('1 request in hand', '2 requests and 1 background task in hand', 'nothing in hand')
    """
    parts = [count(number, what) for number, what in ((requests, "request"), (tasks, "background task")) if number]
    return f"{' and '.join(parts) or 'nothing'} in hand"
