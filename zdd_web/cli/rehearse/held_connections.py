"""The TCP connections that a process holds, by its descriptors and the kernel's table."""

from __future__ import annotations

import os

#: In /proc/net/tcp: ESTABLISHED, and CLOSE_WAIT, whose other end waits for a reply.
_HELD = frozenset({"01", "08"})


def inodes(table: str) -> set[str]:
    """Return the inodes of the connections in the text of /proc/net/tcp.

    >>> inodes("sl local rem st\\n0: 0100007F:1F90 0100007F:D431 01 0:0 0:0 0 0 0 4711 1\\n")
    {'4711'}
    """
    rows = (line.split() for line in table.splitlines()[1:])
    return {row[9] for row in rows if len(row) > 9 and row[3] in _HELD}


def held_by(pid: int) -> int:
    """Return how many TCP connections a process holds; 0 of one that has ended."""
    try:
        found = set()
        for table in ("tcp", "tcp6"):
            with open(f"/proc/{pid}/net/{table}") as file:
                found |= inodes(file.read())
        count = 0
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                count += os.readlink(f"/proc/{pid}/fd/{fd}")[len("socket:[") : -1] in found
            except FileNotFoundError:
                continue  # closed meanwhile
        return count
    except OSError:
        return 0
