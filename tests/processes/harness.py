"""A real gunicorn with zdd_web, in a directory of its own, for one test.

Nothing here sleeps in order to synchronise: every wait polls for a fact (a log line, a board, a port, a process's end)
and gives up at a deadline with the server's log.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from zdd_web import service as finder
from zdd_web.board import Snapshot, WorkerState
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Sample
from zdd_web.system import proc

T = TypeVar("T")

#: Generous, for a noisy machine; nothing waits this long when all is well.
PATIENCE = 30.0

APP = """
    import os, signal, sys, time
    import zdd_web
    from zdd_web.wsgi import ProbeMiddleware

    VERSION = "1"

    def app(environ, start_response):
        path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        seconds = float(query.partition("=")[2] or 0)
        if path == "/slow":
            time.sleep(seconds)
        elif path == "/hold":
            open(f"{query}.held-by-{zdd_web.generation()}", "w").close()
            while not os.path.exists(query):
                time.sleep(0.02)
        elif path == "/job":
            zdd_web.background.go(job, seconds, name="job")
        elif path == "/crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif path == "/upload":
            size = 0
            while chunk := environ["wsgi.input"].read(1024):
                size += len(chunk)
        elif path == "/stream":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return stream(seconds)
        body = f"{VERSION} {zdd_web.generation()} {os.getpid()}".encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def stream(seconds):
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.1)
            yield b"tick "
        yield b"done"

    def job(seconds):
        time.sleep(seconds)
        print("job finished", file=sys.stderr, flush=True)

    app = ProbeMiddleware(app)
"""

#: Every family of worker classes.
WORKER_CLASSES = ["sync", "gthread", "gevent", "asgi", "uvicorn_worker.UvicornWorker"]

#: The parent of the kernel's threads, whose environment is empty too; 0 in a pid namespace without them.
KTHREADD = 2 if proc.name(2) == "kthreadd" else 0

#: A process that gets it writes down what its threads are doing.
SHOW_STACKS = signal.SIGRTMIN + 5

CONF = f"""
import faulthandler
faulthandler.register({int(SHOW_STACKS)})
from zdd_web.gunicorn import install
install(globals(), {{settings}})
"""


def skip_unless_installed(worker_class: str) -> str:
    """Return a worker class that is there."""
    module = {"gevent": "gevent", "asgi": "gunicorn.asgi"}.get(worker_class, worker_class.partition(".")[0])
    if worker_class not in ("sync", "gthread") and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    return worker_class


#: A pattern that may match over the end of a line, or asks where the text begins or ends.
_BEYOND_A_LINE = re.compile(r"\n|\\[nsWDAZ]|\[\^|[\^$]")


def lines_that_match(pattern: str, text: str) -> list[str]:
    """Return the lines in which a pattern is found, or its group of each, if it has one."""
    whole = f".*{pattern}.*"
    if _BEYOND_A_LINE.search(pattern):
        return re.findall(whole, text)
    # Only where it is found: in any other line the expression is tried from each character, through to the end.
    is_in = re.compile(pattern).search
    return [found for line in text.split("\n") if is_in(line) for found in re.findall(whole, line)]


def until(what: str, probe: Callable[[], T | None], service: Service | None = None, patience: float = PATIENCE) -> T:
    """Return the first true value of `probe()`; fail with the server's log at the deadline."""
    deadline = time.monotonic() + patience
    while True:
        began = time.thread_time()
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience:g} s for {what}\n{service.describe() if service else ''}")
        # To look through /proc takes milliseconds: tests that wait would keep the machine busy, and each other waiting.
        time.sleep(min(0.2, max(0.01, 20 * (time.thread_time() - began))))


@dataclass(frozen=True)
class Reply:
    """An answer of the harness's app: `version generation pid`."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def version(self) -> str:
        return self.body.split()[0]

    @property
    def generation(self) -> int:
        return int(self.body.split()[1])

    @property
    def pid(self) -> int:
        return int(self.body.split()[2])


class Service:
    """One gunicorn service; see the module's text."""

    made: ClassVar[weakref.WeakSet[Service]] = weakref.WeakSet()

    def __init__(self, directory: Path, worker_class: str = "gthread", workers: int = 2, **settings: Any) -> None:
        self.made.add(self)
        self.directory = directory
        self.marker = f"test-{uuid.uuid4().hex[:12]}"
        self.name = self.marker
        self.pid_file = directory / "service.pid"
        #: False: the configuration says where the pid file is.
        self.pid_option = True
        self.control_socket: Path | None = None
        self.log_file = directory / "log"
        self.worker_class, self.workers, self.settings = worker_class, workers, settings
        self.arguments: list[str] = []
        self.environ: dict[str, str] = {}
        self.launcher = [sys.executable, "-m", "gunicorn"]
        self.target = ["app:app"]
        self.bind: str | None = "127.0.0.1:0"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        #: Requests that a test keeps in hand, closed in `clean_up` at the latest.
        self.held: list[Held] = []
        self._needle = f"ZDD_TEST_MARKER={self.marker}".encode()
        #: Processes that are not the service's, by pid: to look at all in every poll would keep the machine busy.
        self._strangers: dict[int, int] = {}
        self._matched: dict[str, tuple[object, list[str]]] = {}
        self.write_app(APP)
        self.configure()

    # -- what runs

    def write_app(self, text: str) -> None:
        (self.directory / "app.py").write_text(textwrap.dedent(text))

    def deploy(self, version: str, *, at_import: str = "") -> None:
        """Put new code on disk; `at_import` is a statement that runs when it is imported."""
        text = textwrap.dedent(APP).replace('VERSION = "1"', f'VERSION = "{version}"\n{at_import}\n')
        (self.directory / "app.py").write_text(text)

    def write_conf(self, text: str) -> None:
        settings = ", ".join(f"{key}={value!r}" for key, value in {"name": self.name, **self.settings}.items())
        (self.directory / "gunicorn.conf.py").write_text(textwrap.dedent(text).replace("{settings}", settings))

    def configure(self, before: str = "", **settings: Any) -> Service:
        """Write the configuration: `before`, then install() with these settings and all that were given before."""
        self.settings.update(settings)
        self.write_conf(before + CONF)
        return self

    def command(self) -> list[str]:
        options = {
            "--bind": self.bind,
            "--workers": self.workers,
            "--worker-class": self.worker_class,
            "--threads": 4 if self.worker_class == "gthread" else None,
            "--pid": self.pid_file if self.pid_option else None,
            "--control-socket": self.control_socket,
        }
        words = [word for name, value in options.items() if value for word in (name, str(value))]
        if _knows_control_socket() and not self.control_socket:
            words.append("--no-control-socket")
        return [*self.launcher, *self.target, *words, *self.arguments]

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start gunicorn and return at once."""
        environ = {**os.environ, "ZDD_TEST_MARKER": self.marker, "PYTHONDONTWRITEBYTECODE": "1", **self.environ}
        environ.pop("PWD", None)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.directory, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self.process

    def start(self) -> Service:
        """Start gunicorn and wait until its first generation serves."""
        process = self.spawn()
        until("phase.serving", lambda: self.matches(r"event=phase\.serving") or process.poll() is not None, self)
        assert process.poll() is None, self.log()
        self.learn_port()
        # The line is logged when the gate opens; workers pass it one by one.
        until("a worker that serves", self._serves, self)
        return self

    def _serves(self) -> bool:
        boards = self.generations()
        # Some tests have services whose boards are not found by their names.
        return not boards or any(w.state is WorkerState.SERVING for each in boards for w in each.snapshot().workers)

    def learn_port(self) -> None:
        match = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", self.log())
        assert match, self.log()
        self.port = int(match[1])

    # -- what it says

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def matches(self, pattern: str) -> list[str]:
        try:
            status = self.log_file.stat()
        except FileNotFoundError:
            return []
        # Tests look for the same line again and again, in a log that has not grown.
        version = (status.st_ino, status.st_size, status.st_mtime_ns)
        before, found = self._matched.get(pattern, (None, []))
        if version != before:
            found = lines_that_match(pattern, self.log())
            self._matched[pattern] = (version, found)
        return list(found)

    def wait_for(self, pattern: str, times: int = 1, patience: float = PATIENCE) -> str:
        """Wait until that many log lines match; return the last one."""
        found = until(
            f"{times} x {pattern!r}",
            lambda: lines if len(lines := self.matches(pattern)) >= times else None,
            self,
            patience,
        )
        return found[times - 1]

    def generations(self) -> list[finder.Generation]:
        """Return the generations of this service, and of those that a test has given the same NAME; oldest first."""
        found = []
        for pid in [pid for each in list(self.made) if each.name == self.name for pid in each.processes()]:
            with contextlib.suppress(OSError):
                generation = finder.generation_of(pid)
                if generation is not None and generation.header.name == self.name:
                    found.append(generation)
        return sorted(found, key=lambda each: each.header.generation)

    def is_active(self) -> finder.Generation:
        return until("a generation in office", lambda: (found := self.generations()) and finder.is_active(found), self)

    def snapshot(self) -> Snapshot:
        return self.is_active().snapshot()

    @property
    def pid(self) -> int:
        """The pid of the master in office."""
        return self.is_active().pid

    # -- what is done to it

    def signal(self, sig: signal.Signals, pid: int | None = None) -> None:
        os.kill(pid or self.pid, sig)

    def upgrade(self, expect: str = "upgrade.committed") -> str:
        """Send SIGUSR2 and wait for the line that ends it; after a commit, until the old one accepts no more."""
        times = len(self.matches(rf"event={re.escape(expect)}")) + 1
        self.signal(signal.SIGUSR2)
        line = self.wait_for(rf"event={re.escape(expect)}", times)
        if expect == "upgrade.committed":
            until("old workers to leave", lambda: not self._old_ones_that_accept(), self)
        return line

    def _old_ones_that_accept(self) -> list[int]:
        older = [found.snapshot() for found in self.generations()[:-1]]
        # Not by the phase, which follows the log line by a moment.
        workers = [worker for snapshot in older if snapshot.successor_pid for worker in snapshot.workers]
        return [worker.pid for worker in workers if worker.state is not WorkerState.LEAVING]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `zdd-web`."""
        return subprocess.run(
            [sys.executable, "-m", "zdd_web.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
        )

    def get(self, path: str = "/", timeout: float = PATIENCE, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            connection.close()

    def is_open(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(PATIENCE)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @contextlib.contextmanager
    def under_load(self, clients: int = 8, *, may_lose: bool = False, pause: float = 0.1) -> Iterator[LoadThread]:
        """Load with new and kept connections, of which nothing may be lost; every sample is in `load.samples`.

        Each client rests for `pause` seconds after an answer: eight clients at 0.1 s take 0.15 of a core, server
        included, at 0.05 s 0.25. In tests that run side by side a shorter rest is no more load, but a wait for the CPU
        that the clients of all of them take.
        """
        load = LoadThread(Load("127.0.0.1", self.port, ("/",), clients, 0.5, think=pause, timeout=20.0, pace=pause))
        with load:
            answered_from(load, 50)
            yield load
        assert may_lose or lost(load) == [], self.log()

    def stop(self, status: int | None = 0) -> None:
        """Send SIGTERM to the master in office and wait until the service is gone."""
        self.signal(signal.SIGTERM)
        self.ends(status)

    def ends(self, status: int | None = 0, patience: float = PATIENCE) -> None:
        """Wait until the service is gone, with that exit status unless it is None."""
        until("the end of all processes", lambda: not self.processes(), self, patience)
        if status is not None and self.process is not None:
            assert self.process.wait() == status, self.log()

    def leaves_no_trace(self) -> None:
        """A service that has ended left no process, no port, no pid file, and nothing beside it."""
        assert self.processes() == []
        assert not self.is_open()
        assert not self.pid_file.exists(), self.pid_file.read_text()
        assert sorted(path.name for path in self.pid_file.parent.glob(".*.zdd_web")) == []

    def until_alone(self) -> None:
        """Wait until one master with its workers is all that runs."""
        until("the others' end", lambda: len(self.processes()) == 1 + self.workers, self)

    def until_one_generation(self) -> None:
        until("one generation", lambda: len(self.generations()) == 1, self)

    def processes(self) -> list[int]:
        """The pids of everything this service has started and that still runs; zombies do not."""
        if self.process is not None:
            self.process.poll()
        found = []
        with os.scandir("/proc") as entries:
            # The inode of its directory tells a process from another that had its pid before.
            present = {int(each.name): each.inode() for each in entries if each.name.isdigit()}
        for pid, inode in present.items():
            if self._strangers.get(pid) == inode or pid == os.getpid():
                continue
            environ = b""
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                environ = file.read()
            if self._needle in environ:
                found.append(pid)
            elif environ:
                # Only a child of this process may still become one of the service, by exec.
                if proc.parent(pid) != os.getpid():
                    self._strangers[pid] = inode
            # In the middle of an exec it is empty too: a successor must not be taken for a stranger for good.
            elif KTHREADD and KTHREADD in (pid, proc.parent(pid)):
                self._strangers[pid] = inode
        return found

    def describe(self) -> str:
        """Return the log, and what each process is doing: for a test that has waited in vain."""
        lines = []
        for pid in self.processes():
            self._show_stacks(pid)
            said = [f"process {pid} of {proc.parent(pid)} is {proc.state(pid)}"]
            for name in ("wchan", "syscall"):
                with contextlib.suppress(OSError):
                    said.append(f"{name} {Path(f'/proc/{pid}/{name}').read_text().strip()}")
            lines.append(", ".join(said))
        for each in self.generations():
            snapshot = each.snapshot()
            lines.append(f"generation {snapshot.generation} is {snapshot.phase.label}: {snapshot.workers}")
        return "\n".join([self.log(), *lines])

    def _show_stacks(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
            if caught and int(caught[1], 16) >> (SHOW_STACKS - 1) & 1:
                size = self.log_file.stat().st_size
                os.kill(pid, SHOW_STACKS)
                # Nobody is to wait for one that is stopped.
                give_up = time.monotonic() + 1
                while self.log_file.stat().st_size == size and time.monotonic() < give_up:
                    time.sleep(0.01)

    def clean_up(self) -> None:
        """Kill and close what is left."""
        for held in self.held:
            held.close()
        for _ in range(50):
            left = self.processes()
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self.process is not None:
            self.process.wait()


def answered_from(load: LoadThread, count: int) -> None:
    """Wait until the load has that many more answers."""
    target = len(load.samples) + count
    until(f"{count} answers", lambda: len(load.samples) >= target)


def lost(load: LoadThread) -> list[Sample]:
    """The requests that were not answered completely."""
    return [sample for sample in load.samples if sample.outcome.lost]


def generations_of(load: LoadThread) -> set[int | None]:
    """The generations that have answered; None is one that does not say which it is."""
    return {sample.generation for sample in load.samples if sample.outcome.answered}


def _knows_control_socket() -> bool:
    from gunicorn.config import make_settings

    return "control_socket" in make_settings()


def serving(service: Service, generation: int = 1) -> int:
    """Wait until a generation serves; return its master's pid as its own pid namespace has it."""
    line = service.wait_for(rf"generation={generation} event=phase\.serving")
    found = re.search(r" pid=(\d+)", line)
    assert found, line
    return int(found[1])


def seen_from_here(service: Service, inner: int) -> int:
    """Return the pid that a process of the service has here, which in a pid namespace of its own is `inner`."""

    def look() -> int | None:
        for pid in service.processes():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)[1] == str(inner):  # type: ignore[index]
                    return pid
        return None

    return until(f"the process {inner}", look, service)


def command_line(pid: int) -> list[str]:
    """Return a process's command line; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


def successor(service: Service, times: int = 1, event: str = "upgrade.started") -> int:
    """Wait until that many upgrades have been started, or whatever `event` is; return the last new master's pid."""
    match = re.search(r"successor=(\d+)", service.wait_for(f"event={re.escape(event)}", times))
    assert match, service.log()
    return int(match[1])


def serving_workers(service: Service) -> list[int]:
    """Return the pids of the workers in office that serve and have not been told to leave."""
    return [w.pid for w in service.snapshot().workers if w.state is WorkerState.SERVING and not w.retiring]


def settled(service: Service, count: int, without: Iterable[int] = ()) -> list[int]:
    """Wait until exactly that many workers exist, all of them serving and none of `without`; return their pids."""

    def found() -> list[int] | None:
        pids = serving_workers(service)
        whole = len(pids) == len(service.snapshot().workers) == count
        return pids if whole and not set(pids) & set(without) else None

    return until(f"{count} serving workers", found, service)


#: How long the background work of `outlives()` takes, seconds, and gunicorn's patience with a worker that is silent.
JOB_SECONDS = float(os.environ.get("JOB_SECONDS", "4"))
SILENCE = round(JOB_SECONDS * 0.4)

#: What makes a worker leave.
LEAVES_BY = ("TERM", "HUP", "TTOU", "max_requests")


def outlives(service: Service, cause: str, path: str = "/job") -> None:
    """Have a worker leave with background work in hand that takes longer than its heartbeat may be missed."""
    # The only one, or all have work: whoever is chosen has some.
    service.workers = 1 if cause == "max_requests" else 2
    service.arguments = ["--timeout", str(SILENCE)]
    if cause == "max_requests":
        service.arguments += ["--max-requests", "5"]
    service.configure(recycle_timeout=20, grace_period=JOB_SECONDS + 10).start()
    settled(service, service.workers)
    busy: set[int] = set()
    while len(busy) < service.workers:
        busy.add(service.get(f"{path}?seconds={JOB_SECONDS:g}").pid)
    if cause == "max_requests":
        while not service.matches("event=worker.recycled"):
            service.get()
    else:
        service.signal(signal.Signals[f"SIG{cause}"])
    service.wait_for("event=background.waiting")
    until("a worker's end", lambda: busy - set(service.processes()), service)
    assert "job finished" in service.log()
    if cause == "TERM":
        service.ends()
    else:
        assert service.get().status == 200
        service.stop()
    assert not service.matches("WORKER TIMEOUT")
    assert not service.matches("event=background.abandoned")


def children(pid: int) -> list[int]:
    """Return the pids of a process's children, zombies among them."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and proc.parent(int(entry)) == pid]


def zombies(pid: int) -> list[int]:
    """Return the pids of a process's children that nobody has waited for."""
    return [child for child in children(pid) if proc.state(child) == "Z"]


def descriptors(pid: int) -> dict[int, str]:
    """Return a process's open descriptors, and what is behind each."""
    found = {}
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(entry)] = os.readlink(f"/proc/{pid}/fd/{entry}")
    return found


def ask_unix(path: Path | str, target: str = "/", timeout: float = PATIENCE) -> Reply:
    """GET over a Unix socket."""
    connection = http.client.HTTPConnection("localhost", timeout=timeout)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(timeout)
    try:
        connection.sock.connect(str(path))
        connection.request("GET", target)
        response = connection.getresponse()
        return Reply(response.status, dict(response.getheaders()), response.read().decode())
    finally:
        connection.close()


def connections(pid: int) -> list[str]:
    """Return the TCP connections that a process has accepted, or opened."""
    table = Path("/proc/net/tcp").read_text()
    established = {line.split()[9] for line in table.splitlines()[1:] if line.split()[3] == "01"}
    sockets = [link[8:-1] for link in descriptors(pid).values() if link.startswith("socket:")]
    return [inode for inode in sockets if inode in established]


class Held:
    """A request that a worker has in hand until the test finishes it: an upload of which the end is missing."""

    def __init__(self, service: Service, path: Path | str | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        service.held.append(self)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path) if path else ("127.0.0.1", service.port))
        self._socket.sendall(b"POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nfirst")
        # During the commit window either generation may have accepted it.
        until("the held request", lambda: any(each.snapshot().in_flight for each in service.generations()), service)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def finish(self) -> Reply:
        """Send the rest and return the answer."""
        self._socket.sendall(b" half")
        response = http.client.HTTPResponse(self._socket)
        response.begin()
        return Reply(response.status, dict(response.getheaders()), response.read().decode())

    def is_answered(self) -> bool:
        """Send the rest and close; False when the connection was cut or closed before."""
        try:
            return self.finish().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            self.close()
