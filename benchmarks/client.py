"""A load generator for where there is no `wrk`: `python -m benchmarks.client PORT SECONDS CONNECTIONS`.

One thread, a few kept connections, the next request as soon as the reply is complete. Prints requests per second.
It reads no more of a reply than its length, so that it is not the slower of the two.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
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


def requests_per_second(port: int, seconds: float, connections: int) -> float:
    """Ask for `seconds` over `connections` kept connections; a connection that the server closes is an error."""
    selector = selectors.DefaultSelector()
    pending: dict[socket.socket, bytes] = {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(REQUEST)
        pending[sock] = b""
        selector.register(sock, selectors.EVENT_READ)
    count = 0
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        for key, _ in selector.select(1.0):
            sock = key.fileobj  # type: ignore[assignment]
            data = sock.recv(4096)
            if not data:
                raise ConnectionError("the server closed a kept connection")
            pending[sock] += data
            length = reply_length(pending[sock])
            if length and len(pending[sock]) >= length:
                count += 1
                pending[sock] = b""
                sock.sendall(REQUEST)
    for sock in pending:
        sock.close()
    return count / (now - began)


if __name__ == "__main__":
    print(requests_per_second(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
