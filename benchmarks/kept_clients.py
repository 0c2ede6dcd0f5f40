"""Clients that keep many connections and ask on random ones, as a load balancer's pool does."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from zdd_web.cli.rehearse.latencies import Latencies

REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody",
)

#: Seconds.
TIMEOUT = 30.0


@dataclass
class Seen:
    """What clients have noticed.

    `lost` are requests that were written and had no complete reply; `closed` connections of which the server has
    announced the end, or that were found closed before a request was written; `stall` is the longest wait for a reply,
    in seconds. `latencies` are those of the replies, in milliseconds, by what was happening (`KeptClients.doing`).
    """

    asked: int = 0
    lost: int = 0
    closed: int = 0
    stall: float = 0.0
    reasons: list[str] = field(default_factory=list)
    latencies: dict[str, Latencies] = field(default_factory=dict)


def ask(connection: socket.socket, request: bytes = REQUESTS[0]) -> bytes:
    """Send a request and return the head of its complete reply. Raises OSError when there is none."""
    connection.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += _some(connection)
    return head


def _some(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    if not data:
        raise ConnectionError("closed without a complete reply")
    return data


def is_closed(connection: socket.socket) -> bool:
    """Tell whether the server has closed or reset an idle connection; it has where no other could be opened since."""
    if connection.fileno() < 0:
        return True
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(TIMEOUT)


class KeptClients:
    """`count` kept connections to a port of 127.0.0.1, on which threads ask from `start()` to `stop()`."""

    def __init__(self, port: int, count: int, threads: int = 2, pause: float = 0.0) -> None:
        self._port, self._pause = port, pause
        self._ends, self._lock = threading.Event(), threading.Lock()
        self.seen = Seen()
        #: What is happening just now.
        self.doing = ""
        self.connections: list[socket.socket] = []
        for _ in range(count):
            self.connections.append(self._connect())
            # At once: a connection that has sent nothing holds a thread of a gthread worker for five seconds.
            ask(self.connections[-1])
        share = [range(index, count, threads) for index in range(threads)]
        self._threads = [threading.Thread(target=self._run, args=(places, seed)) for seed, places in enumerate(share)]

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port), TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def start(self) -> KeptClients:
        """Begin to ask."""
        for each in self._threads:
            each.start()
        return self

    def stop(self) -> Seen:
        """End, look at every connection, and return what was seen."""
        self._ends.set()
        for each in self._threads:
            each.join()
        self.seen.closed += sum(map(is_closed, self.connections))
        for connection in self.connections:
            connection.close()
        return self.seen

    def until_asked(self, more: int, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until so many more requests were answered."""
        target = self.seen.asked + more
        while self.seen.asked < target and not give_up():
            time.sleep(0.01)

    def _run(self, places: range, seed: int) -> None:
        choose = random.Random(seed)
        while not self._ends.is_set():
            self._ask_one(choose.choice(places), choose.choice(REQUESTS))
            if self._pause:
                self._ends.wait(self._pause)

    def _ask_one(self, place: int, request: bytes) -> None:
        connection = self.connections[place]
        closed, lost, doing = is_closed(connection), "", self.doing
        if closed:
            opened = self._anew(place)
            if opened is None:
                return
            connection = opened
        began = time.monotonic()
        try:
            closing = b"connection: close" in ask(connection, request).lower()
        except (OSError, ValueError) as error:
            lost, closing = f"{type(error).__name__}: {error}", False
        waited = time.monotonic() - began
        with self._lock:
            seen = self.seen
            seen.asked += not lost
            seen.lost += bool(lost)
            seen.closed += closed or closing
            seen.stall = max(seen.stall, waited)
            if lost:
                seen.reasons.append(lost)
            else:
                # A request that was begun before is one of what has come since: it may have waited for that.
                seen.latencies.setdefault(self.doing or doing, Latencies()).add(waited * 1000)
        if lost or closing:
            self._anew(place)

    def _anew(self, place: int) -> socket.socket | None:
        self.connections[place].close()
        try:
            self.connections[place] = connection = self._connect()
        except OSError:
            # The service has stopped: what could not be connected was not lost.
            self._ends.wait(0.1)
            return None
        return connection
