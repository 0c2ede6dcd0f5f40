"""Clients of a large service, in a process of their own: `python -m benchmarks.scale.clients PORT COUNT THREADS`.

COUNT kept connections, on which THREADS threads ask at random. What is happening just now comes in on stdin, a line
each; at its end every connection is looked at, and what was seen goes to stdout as JSON. Before that, one line when all
connections are there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.kept_clients import KeptClients
from benchmarks.servers import ROOT, ServerError

#: Descriptors that are no connections.
OTHERS = 64
#: Between two requests of a thread, seconds.
PAUSE = 0.002


@dataclass(frozen=True)
class Seen:
    """What the clients have seen; latencies in milliseconds, (answered, p50, p99, longest), by what was happening."""

    asked: int
    lost: int
    closed: int
    reasons: list[str]
    latencies: dict[str, list[float]]


class ClientProcess:
    """The clients, from entry to `end()`."""

    def __init__(self, port: int, count: int, threads: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.scale.clients", str(port), str(count), str(threads)]

    def __enter__(self) -> ClientProcess:
        """Return once all are connected. Raises `ServerError`."""
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise ServerError("the clients could not connect")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def doing(self, what: str) -> None:
        """Tell them what is happening from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()

    def end(self) -> Seen:
        """End them, and return what they have seen."""
        out, _ = self._process.communicate(timeout=120)
        return Seen(**json.loads(out))


def require_descriptors(count: int) -> None:
    """Raise this process's limit of open files. Raises `ServerError` where it may not be that high."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (-1, resource.RLIM_INFINITY) and hard < count + OTHERS:
        raise ServerError(
            f"{count} connections need {count + OTHERS} descriptors, of which {hard} are allowed: ulimit -Hn"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(port: int, count: int, threads: int) -> None:
    """Connect, ask, and tell."""
    require_descriptors(count)
    clients = KeptClients(port, count, threads, PAUSE)
    print("connected", flush=True)
    clients.start()
    for line in sys.stdin:
        clients.doing = line.strip()
    seen = clients.stop()
    latencies = {
        name: [each.count, each.percentile(0.5), each.percentile(0.99), each.max]
        for name, each in seen.latencies.items()
    }
    told: dict[str, Any] = {"asked": seen.asked, "lost": seen.lost, "closed": seen.closed,
                            "reasons": seen.reasons[:5], "latencies": latencies}  # fmt: skip
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
