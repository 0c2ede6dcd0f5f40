"""What a command reads of a service's history, and how it asks for more than a signal can say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import click

from zdd_web import deploy_request, history
from zdd_web.cli.errors import CannotHelp
from zdd_web.deploy_request import DeployRequest
from zdd_web.errors import UpgradeError
from zdd_web.history import Entry
from zdd_web.service import Generation
from zdd_web.settings.values import NORMALISE
from zdd_web.system import shared_text

ANOTHER_VERSION = "the running version of zdd_web {what}: upgrade it (`zdd-web upgrade`), and the next generation does"


def entries_of(generation: Generation) -> tuple[Entry, ...]:
    """Return the history of the service that a generation is of. Raises `CannotHelp` when it has none."""
    fd = _open(generation)
    try:
        return history.decode(shared_text.read(fd))
    except ValueError as error:
        raise CannotHelp(f"the history of process {generation.pid} cannot be read: {error}") from None
    finally:
        os.close(fd)


def _open(generation: Generation) -> int:
    number = generation.header.history_fd
    if not number:
        raise CannotHelp(ANOTHER_VERSION.format(what="keeps no history"))
    try:
        return generation.open_memfd(number, history.MEMFD_NAME)
    except OSError as error:
        raise CannotHelp(f"the history of process {generation.pid} cannot be read: {error}") from None


def share(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read a share of requests, as the setting MAX_ERRORS does; for click."""
    found: float | None = _as_setting("max_errors", value)
    return found


def canary(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Read how many workers a canary has, as the setting CANARY does; for click."""
    found: str | None = _as_setting("canary", value)
    if found == "":
        raise click.BadParameter("must be a number of workers, or a percentage of them such as 25%")
    return found


def _as_setting(name: str, value: str | None) -> Any:
    try:
        return None if value is None else NORMALISE[name](value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


class Asked:
    """An upgrade that was asked for."""

    def __init__(self, fd: int = -1, standing: deploy_request.Standing | None = None) -> None:
        self._fd, self._standing = fd, standing

    def taken(self) -> None:
        """The master has taken the request."""
        if self._standing is not None:
            self._standing.taken()

    @property
    def note(self) -> str:
        """What the operator is to know of it now that it is done; "" when there is nothing."""
        if self._fd < 0:
            return ""
        with contextlib.suppress(ValueError, OSError):
            entries = history.decode(shared_text.read(self._fd))
            return entries[-1].note if entries else ""
        return ""


@contextlib.contextmanager
def asking(generation: Generation, request: DeployRequest) -> Iterator[Asked]:
    """Have a request stand while the upgrade that it is for is asked for and followed.

    Raises `CannotHelp` when it cannot be put to the master. A plain one need not be: SIGUSR2 alone means the same.
    """
    is_plain = request == DeployRequest()
    if request.canary is not None and not generation.header.workers_full:
        raise CannotHelp(ANOTHER_VERSION.format(what="starts all workers at once, without a canary"))
    number = generation.header.request_fd
    if not number and not is_plain:
        raise CannotHelp(ANOTHER_VERSION.format(what="takes no such request"))
    with contextlib.ExitStack() as stack:
        asked = Asked()
        try:
            if number:
                # Held from now on: it outlives its master, which notes there how the upgrade ends.
                fd = _open(generation)
                stack.callback(os.close, fd)
                assert generation.owner is not None
                standing = deploy_request.standing(generation.pid, number, generation.owner, request)
                asked = Asked(fd, stack.enter_context(standing))
        except UpgradeError as error:
            raise CannotHelp(str(error)) from None
        except PermissionError:
            if not is_plain:
                raise CannotHelp(
                    f"no permission to ask process {generation.pid} for it: run this as its user or as root"
                ) from None
        except OSError as error:
            if not is_plain:
                raise CannotHelp(f"process {generation.pid} cannot be asked for it: {error}") from None
        yield asked
