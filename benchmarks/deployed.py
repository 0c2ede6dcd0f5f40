"""A service behind a pid file: its active generation, whether all of its workers serve, and its upgrades."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.servers import ServerError
from zdd_web import service
from zdd_web.board import WorkerState
from zdd_web.lifecycle import Phase


def upgrade_command(pid_file: Path) -> list[str]:
    """Return the command that upgrades it.

    >>> upgrade_command(Path("pid"))[1:]
    ['-m', 'zdd_web.cli', 'upgrade', '--pid-file', 'pid']
    """
    return [sys.executable, "-m", "zdd_web.cli", "upgrade", "--pid-file", str(pid_file)]


def upgrade(pid_file: Path, timeout: float = 120.0) -> None:
    """Upgrade it. Raises `ServerError` when the old generation goes on."""
    done = subprocess.run(upgrade_command(pid_file), capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise ServerError(f"the upgrade failed: {done.stdout}{done.stderr}")


def generation(pid_file: Path) -> service.Generation:
    """Return the active generation. Raises `ServerError` when there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = service.generation_of(int(pid_file.read_text()))
        if found is not None:
            return found
    raise ServerError(f"no master with a board behind {pid_file}")


def all_serve(pid_file: Path, workers: int) -> bool:
    """Whether the active generation has so many workers, and all of them serve."""
    try:
        found = generation(pid_file)
    except ServerError:
        return False
    with contextlib.closing(found):
        snapshot = found.snapshot()
    states = [worker.state for worker in snapshot.workers]
    return snapshot.phase is Phase.SERVING and states == [WorkerState.SERVING] * workers


def until(what: str, fact: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a fact. Raises `ServerError` when it does not become one."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise ServerError(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)
