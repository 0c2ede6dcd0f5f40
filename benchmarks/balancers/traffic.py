"""Clients of a balancer: half of the requests are POSTs, half of the clients keep their connection."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable

#: Seconds between two requests of a client, and until one counts as lost.
PACE, TIMEOUT = 0.02, 15.0


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    number: str,
    *,
    keep: bool,
    came_by: Callable[[str], object] = lambda port: None,
) -> str:
    """Send one request that is echoed; return why its reply is a loss, empty for a good one.

    `came_by` is called with the port from which the balancer had connected.
    """
    headers = {} if keep else {"Connection": "close"}
    try:
        connection.request(method, f"/{number}", body=number if method == "POST" else None, headers=headers)
        reply = connection.getresponse()
        body = reply.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return type(error).__name__
    if reply.status != 200:
        return str(reply.status)
    came_by(reply.headers.get("X-Upstream-Port", ""))
    return "" if body.decode("latin-1") == number else "another's reply"


class Traffic:
    """Clients in threads; also a context manager. `lost` counts losses by method and reason."""

    def __init__(self, port: int, clients: int) -> None:
        self.requests = 0
        self.lost: Counter[str] = Counter()
        #: The balancer's ends of its connections to the instances, of all replies since this was emptied.
        self.upstream_ports: set[str] = set()
        self._port = port
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._drive, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _drive(self, client: int) -> None:
        keep = client % 2 == 0
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        for number in itertools.count():
            if self._over.wait(PACE):
                break
            method = "POST" if number % 2 else "GET"
            reason = ask(connection, method, f"{client}-{number}", keep=keep, came_by=self.upstream_ports.add)
            with self._lock:
                self.requests += 1
                if reason:
                    self.lost[f"{method} {reason}"] += 1
        connection.close()


def answers(port: int) -> bool:
    """Whether a balancer answers four requests in a row: with both instances, where it takes turns."""
    for number in range(4):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
        failed = ask(connection, "GET", str(number), keep=False)
        connection.close()
        if failed:
            return False
        time.sleep(0.01)
    return True
