"""A load generator that can be turned from one server to another many times a second.

One thread, a few kept connections to each server, the next request as soon as the reply is complete. It reads no more
of a reply than its length, so that it is not the slower of the two.
"""

from __future__ import annotations

import re
import selectors
import socket
import time

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def reply_length(head: bytes) -> int:
    """Return how many bytes a reply has whose head, and perhaps body, is given; 0 while the head is incomplete.

    >>> reply_length(b"HTTP/1.1 200 OK\\r\\nContent-Length: 3\\r\\n\\r\\nok\\n")
    41
    """
    end = head.find(b"\r\n\r\n")
    if end < 0:
        return 0
    found = re.search(rb"content-length:\s*(\d+)", head[:end], re.IGNORECASE)
    if not head.startswith(b"HTTP/1.1 200") or found is None:
        raise ValueError(f"not a reply of the trivial view: {head[:80]!r}")
    return end + 4 + int(found[1])


class Load:
    """Kept connections to one server."""

    def __init__(self, port: int, connections: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._received: dict[socket.socket, bytes] = {}
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._received[sock] = b""
            self._selector.register(sock, selectors.EVENT_READ)

    def ask(self, seconds: float) -> tuple[int, float]:
        """Ask for so long over all connections; return how many replies came, and the seconds until the last one.

        Raises ConnectionError when the server closes a connection.
        """
        began = time.monotonic()
        for sock in self._received:
            sock.sendall(REQUEST)
        asked, answered = len(self._received), 0
        while answered < asked:
            more = time.monotonic() < began + seconds
            for key, _ in self._selector.select(1.0):
                sock = key.fileobj  # type: ignore[assignment]
                if self._is_answered(sock):
                    answered += 1
                    if more:
                        sock.sendall(REQUEST)
                        asked += 1
        return answered, time.monotonic() - began

    def _is_answered(self, sock: socket.socket) -> bool:
        data = sock.recv(4096)
        if not data:
            raise ConnectionError("the server closed a kept connection")
        received = self._received[sock] + data
        length = reply_length(received)
        complete = 0 < length <= len(received)
        self._received[sock] = b"" if complete else received
        return complete

    def close(self) -> None:
        """Close all connections."""
        for sock in self._received:
            sock.close()
        self._selector.close()


class FreshLoad:
    """Clients that open a connection for each request, in one thread; the latency of every reply is kept."""

    def __init__(self, port: int, clients: int) -> None:
        self._address, self._clients = ("127.0.0.1", port), clients
        self._selector = selectors.DefaultSelector()
        self._began: dict[socket.socket, float] = {}
        self._received: dict[socket.socket, bytes] = {}
        #: Seconds from connect() to the end of the reply.
        self.latencies: list[float] = []

    def _connect(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        self._began[sock], self._received[sock] = time.monotonic(), b""
        sock.connect_ex(self._address)
        self._selector.register(sock, selectors.EVENT_WRITE)

    def ask(self, seconds: float) -> tuple[int, float]:
        """Ask for so long; return how many replies came, and the seconds until the last one.

        Raises OSError when a connection is refused, reset or closed without a reply.
        """
        began = time.monotonic()
        for _ in range(self._clients):
            self._connect()
        answered = 0
        while self._began:
            more = time.monotonic() < began + seconds
            for key, events in self._selector.select(1.0):
                sock: socket.socket = key.fileobj  # type: ignore[assignment]
                if events & selectors.EVENT_WRITE:
                    sock.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                    self._selector.modify(sock, selectors.EVENT_READ)
                elif self._is_answered(sock):
                    answered += 1
                    if more:
                        self._connect()
        return answered, time.monotonic() - began

    def _is_answered(self, sock: socket.socket) -> bool:
        data = sock.recv(4096)
        received = self._received[sock] = self._received[sock] + data
        length = reply_length(received)
        if not 0 < length <= len(received):
            if not data:
                raise ConnectionError("the server closed a connection without a reply")
            return False
        self.latencies.append(time.monotonic() - self._began.pop(sock))
        del self._received[sock]
        self._selector.unregister(sock)
        sock.close()
        return True

    def close(self) -> None:
        """Let go of everything."""
        for sock in self._began:
            sock.close()
        self._selector.close()
