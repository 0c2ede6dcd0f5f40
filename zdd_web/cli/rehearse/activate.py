"""Start a command as systemd does for a socket unit: `python -m zdd_web.cli.rehearse.activate FD COMMAND ...`.

A process of its own, since LISTEN_PID is the pid of whoever becomes the command.
"""

from __future__ import annotations

import os
import sys

#: SD_LISTEN_FDS_START, see sd_listen_fds(3).
FIRST = 3


def main(fd: int, command: list[str]) -> None:
    """Become the command, with the listener `fd` where sd_listen_fds(3) looks for it. Raises OSError."""
    if fd != FIRST:
        os.dup2(fd, FIRST)
        os.close(fd)
    # dup2() of a descriptor to itself leaves it as it was.
    os.set_inheritable(FIRST, True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="web")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
