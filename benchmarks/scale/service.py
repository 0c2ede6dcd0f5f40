"""The large service, and what its processes cost."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import deployed
from benchmarks.deployed import until
from benchmarks.scale.clients import require_descriptors
from benchmarks.servers import Server, ServerError, gunicorn
from tests.helpers.ports import free_port
from zdd_web import service as finder
from zdd_web.board import UpgradeState
from zdd_web.system import proc

#: A hundred of workers may have to be booted by two cores, seconds.
START_WITHIN = 300.0

#: The stages of an upgrade, as the clients are told them.
STAGES = ("boot", "window", "hand over")

#: Of a stop, seconds. Tasks that never end are named then.
GRACE_PERIOD = 15.0


@dataclass(frozen=True)
class Service:
    """A running service."""

    server: Server
    name: str
    workers: int
    pid_file: Path
    probe_port: int

    def generation(self) -> finder.Generation:
        """Return the active generation. Raises `ServerError`."""
        return deployed.generation(self.pid_file)

    def is_settled(self) -> bool:
        """Whether all workers of the active generation serve."""
        return deployed.all_serve(self.pid_file, self.workers)

    def upgrade(self, doing: Callable[[str], object]) -> float:
        """Upgrade it, and wait until the old generation is gone; return the seconds. Raises `ServerError`.

        `doing` is called with what begins: one of `STAGES`.
        """
        old, began = self.generation(), time.monotonic()
        doing(STAGES[0])
        command = deployed.upgrade_command(self.pid_file)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        states = {STAGES[1]: UpgradeState.COMMITTING, STAGES[2]: UpgradeState.DONE}
        for stage, state in states.items():
            while old.header.upgrade_state < state and process.poll() is None:
                time.sleep(0.01)
            doing(stage)
        out, _ = process.communicate(timeout=START_WITHIN)
        if process.returncode:
            raise ServerError(f"the upgrade failed: {out}")
        until("the old master's end", lambda: not old.alive, START_WITHIN)
        took = time.monotonic() - began
        old.close()
        until("all workers", self.is_settled, START_WITHIN)
        return took

    def scrape(self) -> float:
        """Return how long an answer to /metrics takes, seconds. Raises `ServerError`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.probe_port, timeout=30)
        began = time.monotonic()
        try:
            connection.request("GET", "/metrics")
            reply = connection.getresponse()
            body = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            raise ServerError(f"/metrics: {reply.status} {body[:200]!r}")
        return time.monotonic() - began

    def status(self) -> float:
        """Return the CPU time that `zdd-web status` takes, seconds. Raises `ServerError`."""
        before = os.times()
        command = [sys.executable, "-m", "zdd_web.cli", "status", "--json", "--name", self.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        after = os.times()
        if done.returncode or len(json.loads(done.stdout)["generations"]) != 1:
            raise ServerError(f"status: {done.stdout[:200]}{done.stderr}")
        return after.children_user - before.children_user + after.children_system - before.children_system


def cpu(pid: int) -> float:
    """Return the CPU time that a process has used, seconds; 0 of one that has ended.

    >>> cpu(os.getpid()) > 0
    True
    """
    try:
        # Nanoseconds, where /proc/PID/stat has hundredths of a second.
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


@contextlib.contextmanager
def running(worker_class: str, workers: int, environ: dict[str, str] | None = None) -> Iterator[Service]:
    """Run a service with so many workers. Raises `ServerError`."""
    # Workers inherit it.
    require_descriptors(1024)
    name, probe_port = f"scale-{os.getpid()}", free_port()
    with tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-") as directory:
        pid_file = Path(directory, "pid")
        arguments = ["-c", "benchmarks/with_zdd_web.py", "benchmarks.scale.app:app", "--worker-class", worker_class]
        arguments += ["--workers", str(workers), "--pid", str(pid_file), "--keep-alive", "3600", "--backlog", "4096"]
        arguments += ["--worker-connections", "20000", "--timeout", "120"]
        arguments += ["--threads", "1"] if worker_class == "gthread" else []
        settings = {"ZDD_WEB_NAME": name, "ZDD_WEB_PROBE_BIND": f"127.0.0.1:{probe_port}",
                    "ZDD_WEB_UPGRADE_TIMEOUT": f"{START_WITHIN:g}",
                    "ZDD_WEB_GRACE_PERIOD": f"{GRACE_PERIOD:g}", **(environ or {})}  # fmt: skip
        with gunicorn(arguments, environ=settings, start_within=START_WITHIN) as server:
            service = Service(server, name, workers, pid_file, probe_port)
            until("all workers", service.is_settled, START_WITHIN)
            yield service


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    return proc.state(pid) in ("", "Z")
