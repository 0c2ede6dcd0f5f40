"""The clients, in a process of their own: `python -m benchmarks.soak.clients PORT CLIENTS KEPT`.

Half of the clients open a connection for each request, the others share a pool of kept ones and ask on a random one, as
a load balancer does. GETs for replies of up to 60,000 bytes, and POSTs whose body comes back. Every reply is compared
with the one that belongs to the request.

What the controller writes to stdin, a line each, is what is happening just now: losses and latencies are counted under
it. At the end of stdin every client finishes its request, and the process ends. To stdout it writes a line of JSON
each half second: what was counted so far, and the losses since the line before.
"""

from __future__ import annotations

import errno
import heapq
import http.client
import itertools
import json
import os
import random
import selectors
import socket
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.soak.app import pattern
from zdd_web.cli.rehearse.latencies import Latencies

#: Seconds: until a request without a complete reply is lost, between two requests of a client, between two lines.
TIMEOUT, PACE, REPORT = 20.0, 0.01, 0.5

#: Losses that are told of one by one; all are counted.
MOST_LOSSES = 1000

#: Bytes of a reply, or of an upload.
SIZES = (10, 10, 300, 300, 5_000, 60_000)

_OURS = (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def fetch(port: int, path: str) -> bytes:
    """Return the body of a reply on a new connection; b"" when there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        reply = connection.getresponse()
        return reply.read() if reply.status == 200 else b""
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()


@dataclass(frozen=True)
class Loss:
    """One lost request; `at` is wall-clock time, `then` and `now` what was happening when it began and was lost."""

    at: float
    kind: str
    method: str
    connection: str
    then: str
    now: str


@dataclass
class Counts:
    """What the clients have seen. `closed` are kept connections that the server has closed, `unsent` is our fault."""

    requests: int = 0
    posts: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    closed: int = 0
    opened: int = 0
    unsent: int = 0


class Lost(Exception):
    """Why a request counts as lost."""


@dataclass
class Request:
    """A request in hand: what is to be sent, what must come back, and what has."""

    method: str
    data: bytes
    wanted: bytes
    began: float
    then: str
    sock: socket.socket
    place: int | None
    received: bytearray = field(default_factory=bytearray)

    def is_answered(self) -> bool:
        """Tell whether the reply is there. Raises `Lost` when it is not the right one."""
        head, found, body = bytes(self.received).partition(b"\r\n\r\n")
        if not found:
            return False
        if not head.startswith(b"HTTP/1.1 200"):
            raise Lost(f"status {head[9:12].decode(errors='replace')}")
        if len(body) < len(self.wanted) and self.wanted.startswith(body):
            return False
        if body != self.wanted:
            raise Lost("another reply")
        return True

    @property
    def ends_connection(self) -> bool:
        """Whether the server has announced that it closes."""
        return b"connection: close" in bytes(self.received).partition(b"\r\n\r\n")[0].lower()


class Clients:
    """All clients, in one loop."""

    def __init__(self, port: int, clients: int, kept: int, choose: random.Random) -> None:
        self._port, self._choose = port, choose
        self.counts, self.losses = Counts(), list[Loss]()
        self.doing = "start"
        self.latencies = {"steady": Latencies(), "upgrade": Latencies()}
        self._pool: list[socket.socket | None] = [None] * kept
        self._busy: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._requests: dict[socket.socket, Request] = {}
        self._numbers = itertools.count(os.getpid() * 10_000_000)
        #: When the next request of each client is due; the even ones keep their connections.
        self._due = [(time.monotonic() + PACE * number, number) for number in range(clients)]
        self._clients: dict[socket.socket, int] = {}

    @property
    def in_hand(self) -> int:
        """How many requests have no reply yet."""
        return len(self._requests)

    def watch(self, fd: int) -> None:
        """Have `turn()` tell when a descriptor can be read."""
        self._selector.register(fd, selectors.EVENT_READ)

    def turn(self, *, begin: bool) -> list[int]:
        """Begin what is due, if anything is to begin, and see to what has arrived; return the watched descriptors."""
        now = time.monotonic()
        while begin and self._due and self._due[0][0] <= now:
            self._begin(heapq.heappop(self._due)[1])
        wait = min(0.1, max(0.0, self._due[0][0] - now)) if begin and self._due else 0.1
        others = []
        for key, events in self._selector.select(wait):
            if isinstance(key.fileobj, int):
                others.append(key.fileobj)
            else:
                self._see(key.fileobj, events)  # type: ignore[arg-type]
        return others

    def give_up(self) -> None:
        """Count what has waited for too long as lost."""
        now = time.monotonic()
        for request in [each for each in self._requests.values() if now - each.began > TIMEOUT]:
            self._end(request, "timeout")

    def close(self) -> None:
        """Look at the kept connections for the last time, and close them."""
        for sock in self._pool:
            if sock is not None:
                self.counts.closed += _is_closed(sock)
                sock.close()

    # -- one request

    def _begin(self, client: int) -> None:
        place = None
        if client % 2 == 0 and self._pool:
            place = self._choose.randrange(len(self._pool))
            while place in self._busy:
                place = self._choose.randrange(len(self._pool))
        sock = self._pool[place] if place is not None else None
        if sock is not None and _is_closed(sock):
            # Nothing was sent: any client opens another.
            self.counts.closed += 1
            sock.close()
            sock = None
        is_fresh = sock is None
        if sock is None:
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.counts.opened += 1
        request = self._make(sock, place)
        self._requests[sock], self._clients[sock] = request, client
        if place is not None:
            self._pool[place] = sock
            self._busy.add(place)
        self._selector.register(sock, selectors.EVENT_WRITE)
        if is_fresh:
            failed = sock.connect_ex(("127.0.0.1", self._port))
            if failed not in (0, errno.EINPROGRESS):
                self._end(request, errno.errorcode.get(failed, str(failed)), is_ours=failed in _OURS)
        else:
            # In the same step as the look whether it was closed.
            self._see(sock, selectors.EVENT_WRITE)

    def _make(self, sock: socket.socket, place: int | None) -> Request:
        number, size = str(next(self._numbers)), self._choose.choice(SIZES)
        method = self._choose.choice(("GET", "POST"))
        wanted = pattern(number, size)
        # Whichever end closes first: both are to be met.
        close = "Connection: close\r\n" if place is None and self._choose.random() < 0.5 else ""
        if method == "GET":
            data = f"GET /{number}/{size} HTTP/1.1\r\nHost: soak\r\n{close}\r\n".encode()
        else:
            data = f"POST / HTTP/1.1\r\nHost: soak\r\n{close}Content-Length: {size}\r\n\r\n".encode() + wanted
        return Request(method, data, wanted, time.monotonic(), self.doing, sock, place)

    def _see(self, sock: socket.socket, events: int) -> None:
        request = self._requests[sock]
        try:
            if events & selectors.EVENT_WRITE:
                request.data = request.data[sock.send(request.data) :]
                if not request.data:
                    self._selector.modify(sock, selectors.EVENT_READ)
                return
            data = sock.recv(1 << 18)
            request.received += data
            if request.is_answered():
                self._end(request)
            elif not data:
                self._end(request, "truncated" if request.received else "closed")
        except BlockingIOError:
            return
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            self._end(request, f"truncated, {name}" if request.received else name, is_ours=error.errno in _OURS)
        except Lost as lost:
            self._end(request, str(lost))

    def _end(self, request: Request, lost: str = "", *, is_ours: bool = False) -> None:
        sock, counts, now = request.sock, self.counts, time.monotonic()
        self._selector.unregister(sock)
        del self._requests[sock]
        client = self._clients.pop(sock)
        ends = request.ends_connection
        if request.place is not None:
            self._busy.discard(request.place)
            counts.closed += ends and not lost
        if request.place is None or lost or ends:
            sock.close()
            if request.place is not None:
                self._pool[request.place] = None
        if is_ours:
            counts.unsent += 1
        else:
            counts.requests += 1
            counts.posts += request.method == "POST"
            if lost:
                self._lose(request, lost)
            else:
                near = "steady" if request.then == self.doing == "steady" else "upgrade"
                self.latencies[near].add((now - request.began) * 1000)
        pause = 0.05 if lost else PACE * (0.5 + self._choose.random())
        heapq.heappush(self._due, (now + pause, client))

    def _lose(self, request: Request, kind: str) -> None:
        connection = "kept" if request.place is not None else "new"
        self.counts.lost[f"{kind} ({request.method}, {connection} connection)"] += 1
        if sum(self.counts.lost.values()) <= MOST_LOSSES:
            self.losses.append(Loss(time.time(), kind, request.method, connection, request.then, self.doing))

    def line(self) -> dict[str, Any]:
        """Return what the controller is told, and forget the losses that it has been told of."""
        losses, self.losses = self.losses, []
        latencies = {
            name: [each.count, each.percentile(0.5), each.percentile(0.99), each.max]
            for name, each in self.latencies.items()
        }
        # Not `asdict()`: it copies a Counter wrongly.
        counts = {**vars(self.counts), "lost": dict(self.counts.lost)}
        return {"counts": counts, "losses": [asdict(each) for each in losses], "latencies": latencies}


def _is_closed(sock: socket.socket) -> bool:
    """Tell whether an idle connection was closed. Bytes that nobody asked for are a reply's: that shows later."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def main(port: int, clients: int, kept: int) -> None:
    """Ask until stdin ends."""
    load = Clients(port, clients, kept, random.Random(0))
    os.set_blocking(0, False)
    load.watch(0)
    next_line, ends, rest = 0.0, False, b""
    while not ends or load.in_hand:
        if 0 in load.turn(begin=not ends) and not ends:
            data = os.read(0, 65536)
            ends = not data
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                load.doing = lines[-1].decode()
        if time.monotonic() >= next_line:
            load.give_up()
            print(json.dumps(load.line()), flush=True)
            next_line = time.monotonic() + REPORT
    load.close()
    print(json.dumps(load.line()), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
