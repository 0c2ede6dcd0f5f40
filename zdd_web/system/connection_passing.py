"""Established connections that one process gives to another over a socket pair: one message each, with SCM_RIGHTS.

The pair is SOCK_SEQPACKET and has no name: a process has an end of it because it was forked by one that has, or was
given it. Messages stay whole, any number of processes may send and receive, and each message reaches one of them. Bytes
that the kernel has received for a connection travel with it. A message that no process has taken stays in the pair for
as long as a process holds the receiving end, also when its sender, or the receiver that was expected, has ended.

The kernel bounds the pair by the sender's buffer, and by the number of descriptors that one user may have on the way
(RLIMIT_NOFILE). Nothing here waits.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import termios
from typing import Any, NamedTuple

#: Bytes of a message beside the descriptor; what is longer is not one of ours. A path of 108 bytes is spelled in JSON.
MOST_BYTES = 2048

#: Asked of the kernel, which gives less: about a hundred connections for each 100 kB.
BUFFER_BYTES = 1 << 20

_FD_BYTES = array.array("i").itemsize

#: The pair, or this user's share of descriptors on the way, is full (ETOOMANYREFS).
_FULL = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})

#: No descriptor is left.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})


class Handed(NamedTuple):
    """What a connection's next process must know of it.

    `left` is for how long it may stay idle, in seconds; `requests` how many it has had; `server` the address that it
    was accepted at, as `getsockname()` returns it.
    """

    left: float
    requests: int
    server: Any


class MessageError(ValueError):
    """A message that no process of the service has sent."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the sending and the receiving end, neither of which blocks. Raises OSError."""
    give, take = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    give.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    give.setblocking(False)
    take.setblocking(False)
    return give, take


def adopt(give: int, take: int) -> tuple[socket.socket, socket.socket]:
    """Make sockets of two inherited descriptors. Raises OSError, and ValueError for what cannot be such a pair."""
    ends = socket.socket(fileno=give), socket.socket(fileno=take)
    for end in ends:
        is_one = (end.family, end.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not is_one or end.getsockname() or end.getpeername():
            for each in ends:
                each.detach()
            raise ValueError(f"descriptors {give} and {take} are not a socket pair without a name")
        end.setblocking(False)
    return ends


def send(end: socket.socket, fd: int, handed: Handed) -> bool:
    """Send a connection; the sender's own descriptor stays open. Return False when the pair is full.

    Raises OSError for any other reason, such as a pair of which the receiving end is gone.

    >>> give, take = pair()
    >>> server, client = socket.socketpair()
    >>> client.send(b"GET ")
    4
    >>> send(give, server.fileno(), Handed(left=2.0, requests=3, server="/run/app.sock"))
    True
    >>> server.close()
    >>> received, handed = receive(take)
    >>> received.recv(10), handed
    (b'GET ', Handed(left=2.0, requests=3, server='/run/app.sock'))
    >>> receive(take) is None
    True
    >>> for each in (give, take, client, received):
    ...     each.close()
    """
    fields = {"left": handed.left, "requests": handed.requests, "server": handed.server}
    if isinstance(handed.server, bytes):
        # An abstract address.
        fields |= {"server": "", "abstract": handed.server.hex()}
    data = json.dumps(fields).encode()
    try:
        end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))], socket.MSG_DONTWAIT)
    except OSError as error:
        if error.errno in _FULL:
            return False
        raise
    return True


def receive(end: socket.socket) -> tuple[socket.socket, Handed] | None:
    """Take a connection; None when there is none.

    Raises `MessageError` for a message that `send()` has not sent, whose descriptors are closed, and OSError: with one
    of `EXHAUSTED`, the connection that this process has no descriptor for stays in the pair.
    """
    # Without one the kernel would drop the connection.
    _look_for_a_free_descriptor()
    room = socket.CMSG_SPACE(4 * _FD_BYTES)
    try:
        data, ancillary, _, _ = end.recvmsg(MOST_BYTES, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except (BlockingIOError, InterruptedError):
        return None
    given: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            given += array.array("i", content[: len(content) - len(content) % _FD_BYTES])
    try:
        if not data and not given:
            return None
        handed = _handed(data)
        return _connection(given), handed
    except BaseException:
        for fd in given:
            os.close(fd)
        raise


def _look_for_a_free_descriptor() -> None:
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    # Not os.close(): gevent's closes in a later turn of its loop, and the last descriptor would be in use.
    os.closerange(fd, fd + 1)


def _handed(data: bytes) -> Handed:
    try:
        # What was cut off is not JSON any more.
        fields = json.loads(data)
        left, requests, server = fields["left"], fields["requests"], fields["server"]
        # bool is an int; NaN is not at least 0.
        right = type(left) in (int, float) and 0 <= left <= 1e9 and type(requests) is int and 0 <= requests < 1 << 60
        if abstract := fields.get("abstract", ""):
            server = bytes.fromhex(abstract)
        if right and isinstance(server, (str, list, bytes)):
            return Handed(float(left), requests, tuple(server) if isinstance(server, list) else server)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise MessageError(f"not a message about a connection: {data[:80]!r}")


def _connection(given: list[int]) -> socket.socket:
    if len(given) != 1:
        raise MessageError(f"a message about a connection has {len(given)} descriptors: it must have one")
    try:
        connection = socket.socket(fileno=given[0])
    except OSError:
        raise MessageError("a message about a connection has a descriptor that is not a socket") from None
    known = connection.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    is_stream = known and connection.type == socket.SOCK_STREAM
    if is_stream and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return connection
    # The caller closes the descriptor.
    connection.detach()
    raise MessageError("a message about a connection has a socket that is not a connection")


def waiting_bytes(end: Any) -> int:
    """Return how many bytes have arrived on a socket or descriptor and are not read; 0 for one that is closed.

    By ioctl(): gevent replaces `select`, and what asks must not be switched away from.

    >>> server, client = socket.socketpair()
    >>> client.send(b"GET ")
    4
    >>> waiting_bytes(server), waiting_bytes(client)
    (4, 0)
    >>> server.close()
    >>> client.close()
    """
    count = array.array("i", [0])
    with contextlib.suppress(OSError, ValueError):
        fcntl.ioctl(end, termios.FIONREAD, count)
    return count[0]
