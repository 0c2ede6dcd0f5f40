"""Whether the file of a Unix socket still leads to it: clients connect by path, and the socket outlives its file."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct

#: struct ucred: pid, uid, gid.
_UCRED = struct.Struct("iII")


def leads_to(path: str, listener: socket.socket) -> bool:
    """Tell whether a client that connects to `path` reaches this listener. True where that cannot be told.

    The file's inode is not the socket's, and neither says to which socket it belongs. So this connects, and closes at
    once. The kernel gives a client the credentials of the process that called listen(), and the listener has the same.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except OSError as error:
            # Anything else, such as a full queue or a permission, tells nothing of which socket it is.
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED, errno.EPROTOTYPE)
        return _who_listens(client) == _who_listens(listener)


def identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a socket's file; None when there is none.

    While the socket is open no other file has them.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


def _who_listens(end: socket.socket) -> tuple[int, ...]:
    return _UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
