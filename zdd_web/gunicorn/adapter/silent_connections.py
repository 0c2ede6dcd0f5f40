"""Connections that have sent nothing yet: a browser opens some in advance, and may never use them.

gunicorn reads from them in the thread that is to serve the request, gthread for five seconds and sync until its
`timeout` ends the worker. A gthread worker has them wait in its loop instead (gthread.py). A sync worker waits while
the service serves; once it is leaving, and in a lame duck, it gives them up after a second.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable

#: How old a silent connection is when a leaving worker gives it up, seconds: a handshake, and a long round trip.
PATIENCE = 1.0

#: How often a thread that waits for a first byte looks whether the worker is leaving, seconds.
LOOK = 0.1

#: Where the kernel has how long ago a connection has received something, milliseconds, in struct tcp_info: since its
#: handshake if it has received nothing.
_LAST_DATA_RECV = 52


def await_first_byte(
    connection: socket.socket,
    is_leaving: Callable[[], bool],
    beat: Callable[[], None] = lambda: None,
    timeout: float | None = None,
    waits: Callable[[], None] = lambda: None,
    patience: Callable[[], float] = lambda: PATIENCE,
) -> bool:
    """Wait until a connection can be read; return False once it is not worth waiting for any longer.

    That is after `timeout` seconds, or when `is_leaving()` and the connection has been silent for `patience()` seconds;
    the last look comes after that. `beat()` is called about ten times a second while `is_leaving()`, `waits()` always.

    >>> server, client = socket.socketpair()
    >>> with server, client:
    ...     silent = await_first_byte(server, lambda: False, timeout=0.1)
    ...     client.sendall(b"GET / HTTP/1.1")
    ...     silent, await_first_byte(server, lambda: True)
    (False, True)
    """
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    began = time.monotonic()
    ends = None if timeout is None else began + timeout
    wait = 0.0
    while not poller.poll(wait * 1000):
        now = time.monotonic()
        waits()
        if is_leaving():
            beat()
            if silent_for(connection, began) >= patience():
                break
        if ends is not None and now >= ends:
            break
        wait = LOOK if ends is None else min(LOOK, ends - now)
    else:
        return True
    return bool(poller.poll(0))


def silent_for(connection: socket.socket, since: float) -> float:
    """Return for how many seconds a connection has sent nothing: since its handshake, which the kernel knows for TCP.

    Where it does not, `since` is when the wait began, as `time.monotonic()` has it. Of several that have waited in the
    accept queue none is then younger than it is.
    """
    waited = time.monotonic() - since
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return waited
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
        milliseconds: int = struct.unpack_from("I", info, _LAST_DATA_RECV)[0]
    except (OSError, struct.error):
        return waited
    return max(waited, milliseconds / 1000)
