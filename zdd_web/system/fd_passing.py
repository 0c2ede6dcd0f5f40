"""Descriptors that one process sends to another that is not its child or parent: a Unix socket and SCM_RIGHTS.

They meet at a SOCK_SEQPACKET socket, which is abstract (the kernel forgets it with the process that has it) or a path
with mode 0600. The kernel names the process at the other end (SO_PEERCRED), and neither can forge it.

What does not fit into one message goes in pieces, each marked as the last one or not: the kernel takes 253 descriptors
at a time, and with a sender that must not wait only as many bytes as its buffer holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

PREFIX = "zdd_web.takeover:"

#: An abstract name or a path; the kernel's own limit, less the byte before or behind it.
MOST_NAME_BYTES = 107

PIECE_BYTES, PIECE_DESCRIPTORS = 16_384, 200
#: More of either than any service has.
MOST_BYTES, MOST_DESCRIPTORS = 1 << 20, 1024

_MORE, _LAST = b"+", b"."

#: The kernel takes 0 for "no limit", seconds.
MIN_WAIT = 0.001

_FD = struct.Struct("i")


def address(name: str, path: str) -> str:
    r"""Return where a service is met: at a path, or at an abstract address named after the service.

    >>> address("shop", ""), address("shop", "/run/shop/takeover")
    ('\x00zdd_web.takeover:shop', '/run/shop/takeover')
    """
    if path:
        return path
    text = PREFIX + name
    if len(text.encode()) > MOST_NAME_BYTES:
        import hashlib  # loads OpenSSL

        text = PREFIX + hashlib.sha256(name.encode()).hexdigest()
    return f"\0{text}"


def spell(where: str) -> str:
    """Spell an address as `ss -x` does."""
    return where.replace("\0", "@")


class Credentials(NamedTuple):
    """Who made the other end. `pid` is 0 for one whose pid namespace cannot be seen from here."""

    pid: int
    uid: int


def credentials(end: socket.socket) -> Credentials:
    """Return what the kernel knows of the other end: the process that has connected, or that listens there."""
    pid, uid, _ = struct.unpack("iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Credentials(pid, uid)


class Rendezvous:
    """A listening socket at which others meet this process."""

    def __init__(self, where: str, backlog: int) -> None:
        """Bind and listen; a path at which no process listens any more is replaced.

        Raises OSError: EADDRINUSE when a process listens there, or something else is in the path's place.
        """
        self.where = where
        self._file: tuple[int, int] | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if not where.startswith("\0"):
                # Before the file is made: the kernel gives it the socket's own mode, less the umask.
                os.fchmod(self._listener.fileno(), 0o600)
                _remove_if_stale(where)
            self._listener.bind(where)
            if not where.startswith("\0"):
                self._file = _identity(where)
            self._listener.listen(backlog)
            self._listener.setblocking(False)
        except OSError:
            self.close()
            raise

    def accept(self) -> socket.socket | None:
        """Return the next connection, never blocking; None when no connection waits, or none can be let in just now."""
        try:
            end, _ = self._listener.accept()
        except OSError:
            return None  # EAGAIN; also EMFILE, and the client goes on waiting
        end.setblocking(False)
        return end

    def close(self) -> None:
        """Listen no more, and remove the path if it is still this socket's."""
        # The path first: a process that finds no listener behind it takes it for stale, and has put its own there.
        # Nor is its inode's number given to another file while this socket is open.
        if self._file is not None:
            with contextlib.suppress(OSError):
                if _identity(self.where) == self._file:
                    os.unlink(self.where)
        self.close_inherited_copy()

    def close_inherited_copy(self) -> None:
        """Close this process's copy of the socket, in a child of the one that listens."""
        self._listener.close()


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _remove_if_stale(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if is_socket:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)
                return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def connect(where: str, until: float) -> socket.socket | None:
    """Connect, and wait for a place in a queue that is full; None when no process listens there.

    `until` is a time of `time.monotonic()`. Raises TimeoutError, or OSError for what is not such a socket.
    """
    while True:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # In the kernel, which wakes one waiter at each accept, the longest-waiting first. A process that tries again
        # and again comes too late each time beside others that do so faster, and any user may do so.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(max(MIN_WAIT, until - time.monotonic())))
        found = end.connect_ex(where)
        # Python takes an interrupted connect() for one under way, and reports success.
        if found == 0 and _is_connected(end):
            end.setblocking(False)
            return end
        end.close()
        if found in (errno.ENOENT, errno.ECONNREFUSED):
            return None
        if found not in (0, errno.EAGAIN):
            raise OSError(found, os.strerror(found))
        if time.monotonic() > until:
            raise TimeoutError("others wait there, and no connection is accepted")


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _is_connected(end: socket.socket) -> bool:
    try:
        end.getpeername()
    except OSError:
        return False
    return True


def send(end: socket.socket, fields: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send fields and descriptors. Raises OSError, also when the other end's queue has no room."""
    data, left = json.dumps(fields).encode(), list(descriptors)
    while True:
        piece, data = data[:PIECE_BYTES], data[PIECE_BYTES:]
        batch, left = left[:PIECE_DESCRIPTORS], left[PIECE_DESCRIPTORS:]
        message = (_MORE if data or left else _LAST) + piece
        if batch:
            socket.send_fds(end, [message], batch)
        else:
            end.send(message)
        if not data and not left:
            return


def receive(end: socket.socket, until: float) -> tuple[dict[str, Any], list[int]]:
    """Wait for what `send()` sends; the descriptors are not inheritable.

    `until` is a time of `time.monotonic()`. Raises EOFError when the other end is gone, TimeoutError, and ValueError
    for anything that `send()` has not sent.
    """
    data, given = b"", []
    try:
        while True:
            end.settimeout(max(0.001, until - time.monotonic()))
            try:
                piece, fds, flags = _receive_piece(end)
            except ConnectionResetError:
                raise EOFError from None
            given += fds
            if flags & socket.MSG_CTRUNC:
                raise ValueError("descriptors were lost on the way: raise this process's limit of open files (nofile)")
            if not piece:
                raise EOFError
            data += piece[1:]
            if piece[:1] not in (_MORE, _LAST) or len(piece) > PIECE_BYTES + 1:
                raise ValueError("no message of zdd_web")
            if len(data) > MOST_BYTES or len(given) > MOST_DESCRIPTORS:
                raise ValueError("too much")
            if piece[:1] == _LAST:
                return _fields(data), given
    except BaseException:
        for fd in given:
            os.close(fd)
        raise


def _receive_piece(end: socket.socket) -> tuple[bytes, list[int], int]:
    # Not `socket.recv_fds()`, which takes flags and forgets them: the descriptors would be inherited.
    room = socket.CMSG_SPACE(PIECE_DESCRIPTORS * _FD.size)
    # One byte for the mark, and one that must not come.
    try:
        piece, ancillary, flags, _ = end.recvmsg(PIECE_BYTES + 2, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # It has closed with something of ours unread: said once, and before what it had told us.
        piece, ancillary, flags, _ = end.recvmsg(PIECE_BYTES + 2, room, socket.MSG_CMSG_CLOEXEC)
    given: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            given += [fd for (fd,) in _FD.iter_unpack(data[: len(data) - len(data) % _FD.size])]
    return piece, given, flags


def receive_now(end: socket.socket) -> dict[str, Any] | None:
    """Return the fields of a short message that came without descriptors; None while there is none. Never blocks.

    Raises EOFError when the other end is gone, and ValueError for anything else than such a message.
    """
    try:
        # No room for descriptors: the kernel drops what comes with it.
        data, _, flags, _ = end.recvmsg(PIECE_BYTES, 0, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        raise EOFError from None
    if not data:
        raise EOFError
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or data[:1] != _LAST:
        raise ValueError("no message of zdd_web")
    return _fields(data[1:])


def _fields(data: bytes) -> dict[str, Any]:
    # RecursionError: a thousand brackets.
    try:
        fields = json.loads(data)
    except RecursionError:
        raise ValueError("no message of zdd_web") from None
    if not isinstance(fields, dict):
        raise ValueError("no message of zdd_web")
    return fields
