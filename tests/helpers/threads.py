"""Threads that get into each other's way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from tests.helpers.forks import PATIENCE


def at_once(count: int, work: Callable[[], object]) -> None:
    """Run `work` in that many threads, which begin together and are switched as often as Python can."""
    together = threading.Barrier(count)

    def run() -> None:
        together.wait(PATIENCE)
        work()

    threads = [threading.Thread(target=run) for _ in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
