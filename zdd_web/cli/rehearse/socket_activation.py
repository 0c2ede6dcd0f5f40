"""Start a command as systemd does for a socket unit.

`python -m zdd_web.cli.rehearse.socket_activation NAME=FD:... COMMAND ...`

A process of its own, since LISTEN_PID must be the pid that the command has.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Mapping

#: SD_LISTEN_FDS_START, see sd_listen_fds(3).
FIRST = 3


def spell(sockets: Mapping[str, int]) -> str:
    """Spell sockets as the command line has them.

    >>> spell({"web": 5, "health": 6})
    'web=5:health=6'
    """
    # A name may hold anything but a colon.
    return ":".join(f"{name}={fd}" for name, fd in sockets.items())


def parse(text: str) -> dict[str, int]:
    """Take apart what `spell()` has spelled.

    >>> parse("web=5:health=6")
    {'web': 5, 'health': 6}
    """
    return {name: int(fd) for name, _, fd in (each.rpartition("=") for each in text.split(":"))}


def activate(sockets: Mapping[str, int], command: list[str]) -> None:
    """Become the command, with the listeners, by name, where sd_listen_fds(3) looks for them. Raises OSError."""
    # Out of the way first: one may have the number that another is to get.
    behind = FIRST + len(sockets)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, behind) for fd in sockets.values()]
    for fd in sockets.values():
        os.close(fd)
    for at, fd in enumerate(moved, FIRST):
        os.dup2(fd, at)
        os.close(fd)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(sockets)), LISTEN_FDNAMES=":".join(sockets))
    os.execvp(command[0], command)


if __name__ == "__main__":
    activate(parse(sys.argv[1]), sys.argv[2:])
