"""How a command asks a master to give up an upgrade: a memfd of the master's into which the command writes a number.

Theory of operation
-------------------
A board is sealed: no other process writes on it. A signal carries no number, and could reach an upgrade that began
a moment later; of the signals whose default action is harmless, SIGURG is sent by launchers written in Go without any
reason (their runtime uses it), and the others have a meaning for gunicorn already. So each master holds a small memfd
open. A command opens it under /proc/<pid>/fd, where the kernel lets in the master's user and root, the same that may
send it SIGUSR2.

The number is that of the SIGUSR2 on the board (`Header.upgrade_number`). The master reads it before it begins an
upgrade and at each turn of its loop while one is under way. So it also reaches an upgrade that a master which hangs has
not begun yet: its SIGUSR2 is queued, and is refused when the master runs again. A number that has passed means nothing.

The master never maps this memory: a process that truncates it cannot end the master by SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import struct

#: Commands write into nothing else.
MEMFD_NAME = "zdd_web-cancel"

#: The number of the upgrade, and the pid of the process that asks.
_FIELDS = struct.Struct("=QQ")


class CancelRequest:
    """The master's end.

    >>> request = CancelRequest()
    >>> request.asked_by(3) is None
    True
    >>> write(request.fd, 3, pid=4711)
    >>> request.asked_by(3), request.asked_by(4)
    (4711, None)
    >>> request.close()
    """

    def __init__(self) -> None:
        self.fd = -1
        if hasattr(os, "memfd_create"):
            with contextlib.suppress(OSError):  # no descriptor is left: the service matters more
                self.fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)

    def asked_by(self, number: int) -> int | None:
        """Return the pid of the process that asks, as it says itself; None when that upgrade is not to be cancelled."""
        return _read(self.fd, number) if self.fd >= 0 else None

    def clear(self) -> None:
        """Forget what was asked: an upgrade begins that no number was given to."""
        if self.fd >= 0:
            os.ftruncate(self.fd, 0)

    def close(self) -> None:
        """Close it, in a child that is not to hold it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write(fd: int, number: int, pid: int) -> None:
    """Ask for the upgrade with this number to be cancelled, 0 or more. Raises OSError."""
    os.pwrite(fd, _FIELDS.pack(number, pid), 0)


def take_back(fd: int, number: int) -> None:
    """Ask no more for that upgrade to be cancelled; a request for another one stands. Raises OSError."""
    if _read(fd, number) is not None:
        os.ftruncate(fd, 0)


def _read(fd: int, number: int) -> int | None:
    found = os.pread(fd, _FIELDS.size, 0)
    if len(found) < _FIELDS.size:
        return None
    asked, pid = _FIELDS.unpack(found)
    return pid if asked == number else None
