"""Start a gunicorn on a free port of 127.0.0.1, wait until it answers, and leave nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0


class ServerError(Exception):
    """The server under test did not start."""


def cores() -> tuple[set[int], set[int]]:
    """Return the cores of the server and those of the client: the first two, or all for both where there is one."""
    usable = sorted(os.sched_getaffinity(0))
    return ({usable[0]}, {usable[1]}) if len(usable) > 1 else (set(usable), set(usable))


@dataclass(frozen=True)
class Server:
    """A running gunicorn."""

    port: int
    pid: int
    log: Path

    def cpu_seconds(self) -> float:
        """Return the CPU time that the master and the workers that live now have used."""
        ticks = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                # After the command in parentheses: state, ppid, pgrp, session, and further on utime and stime.
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.pid:
                        ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def pinned(cpus: set[int] | None) -> Iterator[None]:
    """Run on `cpus` in the block; what is started there inherits it and keeps it."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def gunicorn(
    arguments: Sequence[str],
    *,
    cpus: set[int] | None = None,
    through: Sequence[str] = (),
    port: int = 0,
    environ: Mapping[str, str] | None = None,
    start_within: float = START_TIMEOUT,
) -> Iterator[Server]:
    """Run gunicorn with `arguments` from the root of the project; `through` is a command that starts it.

    `port` is one that another may have too, 0 for a free one; `environ` is added to the environment. It is given
    `start_within` seconds to answer.

    Raises `ServerError` with the end of its log when it does not start.
    """
    # `timeout 300 python -m benchmarks...` sends it: Python would end without a word to the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-") as directory:
        log_path = Path(directory, "log")
        # Not `--bind :0`, since with --reuse-port every worker would get a port of its own.
        port = port or free_port()
        # Not `-m gunicorn`: at its own USR2 gunicorn runs that module's file by its path, beside which a package called
        # `http` hides Python's.
        script = Path(sys.executable).with_name("gunicorn")
        command = [*through, sys.executable, str(script), *arguments, "--bind", f"127.0.0.1:{port}"]
        command += without_control_socket()
        inherited = {name: value for name, value in os.environ.items() if name != "GUNICORN_CMD_ARGS"}
        environ = {**inherited, **(environ or {})}
        with log_path.open("wb") as log, pinned(cpus):
            # A session of its own: whatever it leaves behind can be ended as one group.
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        try:
            _wait_until_it_answers(process, port, log_path, start_within)
            yield Server(port, process.pid, log_path)
        finally:
            _end(process)


def without_control_socket() -> list[str]:
    """Return the option that keeps gunicorn from opening a control socket, where it has one."""
    from gunicorn.config import make_settings

    return ["--no-control-socket"] if "control_socket_disable" in make_settings() else []


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log_path: Path, within: float) -> None:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/", headers={"Connection": "close"})
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    raise ServerError(f"gunicorn did not start; the end of its log:\n{log_path.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
