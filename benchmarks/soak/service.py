"""The service under test: how it is started, deployed with good and with broken releases, and stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import deployed
from benchmarks.servers import ROOT, ServerError, without_control_socket
from benchmarks.soak.app import VERSION_PATH
from benchmarks.soak.clients import fetch
from tests.helpers.ports import free_port
from zdd_web import service as finder
from zdd_web.system import proc

MODES = ("fd", "reuseport", "systemd")
ACTIVATE = "systemd-socket-activate"

#: Every broken release, in the order in which they come; all of them leave the old generation serving.
FAULTS = ("import_error", "worker_crash", "never_ready", "master_crash")

#: Seconds. No good release takes as long to boot, one that never gets ready costs as much.
UPGRADE_TIMEOUT = 12.0
SETTLE_WITHIN = 60.0

_CONF = """\
from zdd_web.gunicorn import install

install(globals(), name={name!r}, listener={mode!r}, upgrade_timeout={timeout!r})
"""

_RELEASE = """\
from benchmarks.soak import app as soak

soak.break_as({fault!r})
app = soak.{interface}({version!r})
"""


@dataclass(frozen=True)
class Outcome:
    """How one upgrade ended: whether as expected, and what was unexpected."""

    expected: bool
    seconds: float
    detail: str = ""


@dataclass
class Service:
    """A gunicorn with zdd_web in a directory of its own; `generation` is the one that is active."""

    mode: str
    worker_class: str
    workers: int
    directory: Path
    log: Path
    port: int = field(default_factory=free_port)
    version: int = 1
    _process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """What the commands call it."""
        return f"soak-{self.mode}-{os.getpid()}"

    @property
    def session(self) -> int:
        """The session of all its processes."""
        assert self._process is not None
        return self._process.pid

    @property
    def master(self) -> int:
        """The pid of the active master, as the pid file has it."""
        return int(self._pid_file.read_text())

    @property
    def _pid_file(self) -> Path:
        return self.directory / "pid"

    def generation(self) -> finder.Generation:
        """Return the active generation. Raises `ServerError` when there is none."""
        return deployed.generation(self._pid_file)

    def log_end(self) -> str:
        """Return the end of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 3000))
            return file.read().decode(errors="replace")

    # -- start and stop

    def start(self) -> None:
        """Start it, and wait until it answers. Raises `ServerError`."""
        conf = _CONF.format(name=self.name, mode=self.mode, timeout=UPGRADE_TIMEOUT)
        (self.directory / "gunicorn.conf.py").write_text(conf)
        self._put("")
        environ = {name: value for name, value in os.environ.items() if name != "GUNICORN_CMD_ARGS"}
        environ |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(environ), cwd=self.directory, env=environ, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self._until("the service to start", lambda: self._answers("1") or self._process_ended())
        if self._process_ended():
            raise ServerError(f"it did not start; the end of its log:\n{self.log_end()}")

    def _command(self, environ: dict[str, str]) -> list[str]:
        spelled = "uvicorn_worker.UvicornWorker" if self.worker_class == "uvicorn" else self.worker_class
        command = [sys.executable, "-m", "gunicorn", "release:app", "--worker-class", spelled]
        command += ["--workers", str(self.workers), "--pid", str(self._pid_file), "--keep-alive", "75"]
        command += without_control_socket()
        command += ["--threads", "4"] if self.worker_class == "gthread" else []
        address = f"127.0.0.1:{self.port}"
        if self.mode != "systemd":
            return [*command, "--bind", address]
        # It passes no variable on that is not named.
        passed = [word for name in environ for word in ("-E", name)]
        return [ACTIVATE, "-l", address, *passed, *command]

    def stop(self) -> str:
        """Stop it with SIGTERM; return what was left of it, "" for nothing."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(self.master, signal.SIGTERM)
        try:
            self._until("the end of all its processes", lambda: not self.processes())
        except ServerError as error:
            return f"{error}: {self.processes()} were left"
        left = [entry.name for entry in self.directory.iterdir() if entry.name in ("pid", "pid.2")]
        return f"{left} were left" if left else ""

    def end(self) -> None:
        """Kill what is left."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.session, signal.SIGKILL)
            self._process.wait()

    def processes(self) -> list[int]:
        """Return the pids of its session; zombies are none."""
        if self._process is not None:
            self._process.poll()
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if os.getsid(int(entry)) == self.session and proc.state(int(entry)) not in ("", "Z"):
                        found.append(int(entry))
        return found

    def _process_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    # -- deploys

    def _put(self, fault: str) -> None:
        interface = "asgi" if self.worker_class in ("asgi", "uvicorn") else "wsgi"
        new = self.directory / "release.new"
        new.write_text(_RELEASE.format(fault=fault, interface=interface, version=str(self.version)))
        new.replace(self.directory / "release.py")

    def upgrade(self, fault: str = "") -> Outcome:
        """Deploy a release, and compare what becomes of it with what must. Raises `ServerError`."""
        before, serving = self.generation(), self.version
        self.version += 1
        self._put(fault)
        began = time.monotonic()
        command = deployed.upgrade_command(self._pid_file)
        done = subprocess.run(command, capture_output=True, text=True, timeout=UPGRADE_TIMEOUT + 120, check=False)
        seconds = time.monotonic() - began
        detail = ""
        if bool(done.returncode) is not bool(fault):
            detail = f"`zdd-web upgrade` ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}"
        if done.returncode == 0:
            self._until("the old master's end", lambda: not before.alive)
            serving = self.version
        elif not before.alive:
            raise ServerError(f"the old generation has ended; the end of its log:\n{self.log_end()}")
        before.close()
        self._until("one generation with all its workers", self.is_settled)
        if not self._answers(str(serving)):
            detail = detail or f"version {serving} was to answer"
        return Outcome(not detail, seconds, detail)

    def is_settled(self) -> bool:
        """Whether all workers of the active generation serve, and no other process is left."""
        return deployed.all_serve(self._pid_file, self.workers) and len(self.processes()) == 1 + self.workers

    def _answers(self, version: str) -> bool:
        return fetch(self.port, VERSION_PATH) == version.encode()

    def _until(self, what: str, fact: Callable[[], object]) -> None:
        try:
            deployed.until(what, fact, SETTLE_WITHIN)
        except ServerError as error:
            raise ServerError(f"{error}; the end of its log:\n{self.log_end()}") from None


@contextlib.contextmanager
def running(mode: str, worker_class: str, workers: int, directory: Path, log: Path) -> Iterator[Service]:
    """Run a service; what is left of it at the end is killed. Raises `ServerError`."""
    service = Service(mode, worker_class, workers, directory, log)
    try:
        service.start()
        yield service
    finally:
        service.end()


def missing(mode: str) -> str:
    """Return why there can be no chain in this mode, "" when there can."""
    return f"{ACTIVATE} is not installed" if mode == "systemd" and shutil.which(ACTIVATE) is None else ""
