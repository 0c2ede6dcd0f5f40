"""Connections that are being closed: the client has its last reply, and may still be sending.

`close()` on a socket with unread bytes makes the kernel send a reset and drop what it has not sent yet: the rest of
the reply. So the sending side is closed first, and what arrives is discarded until the client closes too (RFC 9112,
section 9.6). gunicorn 26 and later do this as well, but wait up to two seconds for each client in the loop that serves
all others (test_graceful_close_waits_for_two_seconds); earlier ones close at once.

All of these connections are registered with one epoll of their own. Its descriptor becomes readable as soon as one of
them does, so that a worker's loop has a single descriptor more to watch.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

#: A client that has sent nothing for so long is not waited for any longer, seconds; as in gunicorn.
QUIET = 2.0

#: Nor is one that goes on sending for so long, or so much: seconds and bytes.
AT_MOST = 10.0
MOST_BYTES = 64 << 20

#: More than these at a time, and the one that has been quiet longest is closed.
MOST = 1024

#: Read from one connection, and read from so many, before the loop's other work has its turn.
CHUNK = 65_536
IN_A_TURN = 32


class _Closing:
    """One connection, since when, and what has arrived on it."""

    __slots__ = ("discarded", "quiet_since", "since", "socket")

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.socket = connection
        self.since = self.quiet_since = now
        self.discarded = 0


class ClosingConnections:
    """Those of one worker. `add()` may be called in any thread, the rest in the worker's main thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        #: By descriptor, and in the order in which they have become quiet.
        self._closing: dict[int, _Closing] = {}
        self._lock = threading.Lock()
        self._buffer = bytearray(CHUNK)

    def __len__(self) -> int:
        return len(self._closing)

    def fileno(self) -> int:
        """Return a descriptor that is readable when `turn()` has something to do."""
        return self._epoll.fileno()

    def add(self, connection: socket.socket) -> None:
        """Send the end of the stream, and close the connection when its client has; the socket object is spent.

        One that is closed already is left alone.

        >>> closing = ClosingConnections()
        >>> server, client = socket.socketpair()
        >>> closing.add(server)
        >>> client.recv(1), len(closing)
        (b'', 1)
        >>> client.close()
        >>> closing.turn()
        >>> len(closing)
        0
        """
        if connection.fileno() < 0:
            return
        try:
            # For TLS too, which it ends without a closing alert, as gunicorn does.
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            # The client has reset it, or closed it before it sent anything.
            connection.close()
            return
        # An object of our own: gunicorn may close the given one again.
        ours = socket.socket(connection.family, connection.type, connection.proto, fileno=connection.detach())
        ours.setblocking(False)
        with self._lock:
            self._closing[ours.fileno()] = _Closing(ours, time.monotonic())
            self._epoll.register(ours, select.EPOLLIN)
            if len(self._closing) > MOST:
                self._close(next(iter(self._closing.values())))

    def turn(self, wait: float = 0.0) -> None:
        """Discard what has arrived, and close what has come to its end or was waited for long enough.

        Waits at most `wait` seconds for something to arrive.
        """
        if not self._closing:
            return
        ready = self._epoll.poll(wait, IN_A_TURN)
        now = time.monotonic()
        with self._lock:
            for fd, _ in ready:
                closing = self._closing.get(fd)
                if closing is not None and self._discard(closing, now):
                    self._close(closing)
            while self._closing:
                oldest = next(iter(self._closing.values()))
                if now - oldest.quiet_since < QUIET:
                    break
                self._close(oldest)

    def next_timeout(self) -> float | None:
        """Return the seconds until `turn()` has something to do although nothing arrives; None for never."""
        with self._lock:
            for oldest in self._closing.values():
                return max(0.0, oldest.quiet_since + QUIET - time.monotonic())
        return None

    def finish(self, beat: Callable[[], None], remaining: Callable[[], float | None]) -> None:
        """Wait for what is left, within the usual limits and `remaining()` seconds, and close all of it."""
        while (timeout := self.next_timeout()) is not None:
            left = remaining()
            if left is not None and left <= 0:
                break
            beat()
            self.turn(min(timeout, 0.5, timeout if left is None else left))
        with self._lock:
            for closing in list(self._closing.values()):
                self._close(closing)

    def _discard(self, closing: _Closing, now: float) -> bool:
        """Read once; tell whether that was the end."""
        try:
            count = closing.socket.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError:
            return True
        closing.discarded += count
        if not count or closing.discarded > MOST_BYTES or now - closing.since > AT_MOST:
            return True
        closing.quiet_since = now
        fd = closing.socket.fileno()
        self._closing[fd] = self._closing.pop(fd)
        return False

    def _close(self, closing: _Closing) -> None:
        del self._closing[closing.socket.fileno()]
        with contextlib.suppress(OSError):
            # By hand: a child of the app may have a copy, with which epoll would go on reporting the descriptor.
            self._epoll.unregister(closing.socket)
        closing.socket.close()
