"""The controller's side of the clients' process: what is happening goes in, what was counted comes out."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

from benchmarks.servers import ROOT, ServerError

#: What clients are told while nothing is under way.
STEADY = "steady"

#: Losses that are kept whole, the first ones.
MOST_KEPT = 200

#: Until the clients have finished what they have in hand, seconds; more than their timeout.
END_WITHIN = 40.0

_NOTHING: dict[str, Any] = {
    "counts": {"requests": 0, "posts": 0, "lost": {}, "closed": 0, "opened": 0, "unsent": 0},
    "latencies": {},
}


class LoadProcess:
    """Clients that ask from entry to exit."""

    def __init__(self, port: int, clients: int, kept: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.soak.clients", str(port), str(clients), str(kept)]
        self._latest = _NOTHING
        #: The first losses, whole.
        self.losses: list[dict[str, Any]] = []
        #: Of all losses: how many were begun or lost while this was happening.
        self.lost_while: Counter[str] = Counter()

    def __enter__(self) -> LoadProcess:
        # A session of its own: Ctrl-C at a terminal is the controller's.
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.doing(STEADY)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def doing(self, what: str) -> None:
        """Tell the clients what is happening from now on. Raises `ServerError` when they have ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except OSError:
            raise ServerError("the process of the clients has ended") from None

    def end(self) -> None:
        """Let every client finish its request, and end. Raises `ServerError` when they ended otherwise."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(END_WITHIN)
        if self._process.returncode:
            raise ServerError(f"the process of the clients ended with status {self._process.returncode}")

    @property
    def pid(self) -> int:
        """The clients' process."""
        return self._process.pid

    @property
    def counts(self) -> dict[str, Any]:
        """What was counted so far."""
        found: dict[str, Any] = self._latest["counts"]
        return found

    @property
    def latencies(self) -> dict[str, list[float | None]]:
        """Count, p50, p99 and maximum in milliseconds, of "steady" and of "upgrade"."""
        found: dict[str, list[float | None]] = self._latest["latencies"]
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            latest = json.loads(line)
            for loss in latest.pop("losses"):
                self.lost_while[loss["then"] if loss["then"] != STEADY else loss["now"]] += 1
                if len(self.losses) < MOST_KEPT:
                    self.losses.append(loss)
            self._latest = latest
