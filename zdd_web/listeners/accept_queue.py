"""The accept queue at the end: closing a listener resets every connection that waits in it.

So no new connection is let in, the workers accept what waits, and only then the last of them closes. A classic BPF
filter on the listener drops the segments that open a connection: the clients' kernels try again after a second, find
the port closed, and tell them "refused", which every client may retry. The kernel asks for CAP_NET_ADMIN to attach one
to a TCP socket; without it the queue is narrowed to a single place, so that few are caught in it.

The filter is the socket's, not the process's: never where another process goes on serving with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import struct
from collections.abc import Iterable

from zdd_web.board.admission import Admission

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27

#: Load the TCP flags; where SYN is set keep nothing of the segment, else all of it.
_DROP_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # ldb [13]
        (0x54, 0, 0, 0x02),  # and #SYN
        (0x15, 0, 1, 0x02),  # jeq #SYN, next, skip
        (0x06, 0, 0, 0),  # ret #0
        (0x06, 0, 0, 0xFFFF_FFFF),  # ret #-1
    )
)


def block_new_connections(listener: socket.socket) -> Admission:
    """Let no new connection into a listener's queue, as far as this process may. What waits there stays.

    >>> with socket.create_server(("127.0.0.1", 0)) as server:
    ...     block_new_connections(server) is not Admission.OPEN
    True
    """
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
        try:
            filter_ = struct.pack("HxxxxxxQ", len(_DROP_SYN) // 8, ctypes.addressof(program))
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
            return Admission.BLOCKED
        except OSError:
            pass  # EPERM without CAP_NET_ADMIN; a kernel without filters
    listener.listen(0)
    return Admission.LIMITED


def allow_new_connections(listener: socket.socket, backlog: int) -> None:
    """Undo `block_new_connections()`."""
    with contextlib.suppress(OSError):  # ENOENT: it was only narrowed
        listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    listener.listen(backlog)


def queue(listener: socket.socket) -> tuple[int, int]:
    """Return how many connections wait in a TCP listener's queue, and how many may; zeroes for other sockets.

    For a listener the kernel has them in two fields of TCP_INFO that mean something else otherwise (tcp_diag.c).

    >>> with socket.create_server(("127.0.0.1", 0), backlog=7) as server:
    ...     queue(server)
    (0, 7)
    """
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return 0, 0
    length, limit = struct.unpack_from("II", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64), 24)
    return length, limit


def is_full(listener: socket.socket) -> bool:
    """Tell whether a TCP listener's queue has no room: the kernel drops the ends of handshakes."""
    length, limit = queue(listener)
    return length > limit


def is_empty(listeners: Iterable[socket.socket | int]) -> bool:
    """Tell whether no connection waits in any of the queues: of sockets or descriptors."""
    poller = select.poll()
    for listener in listeners:
        poller.register(listener, select.POLLIN)
    return not poller.poll(0)
