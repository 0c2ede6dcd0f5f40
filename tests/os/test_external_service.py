"""`rehearse --url --do` on servers that this test makes: what it reports is what they did."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner, Result

from tests.helpers.certificates import self_signed
from zdd_web.cli import main
from zdd_web.cli.rehearse import external_service, rehearsal
from zdd_web.cli.rehearse.external_service import address_of

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789"

#: Longer than --timeout in these tests.
STALL = 1.5


class Treacherous(socketserver.ThreadingTCPServer):
    """Resets each hundredth connection, cuts each hundredth reply, and stalls each hundredth request; counts them."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, every: int = 100, tls: ssl.SSLContext | None = None, mark: Path | None = None) -> None:
        """`mark` is made once it has done all three."""
        self.tls, self.mark = tls, mark
        super().__init__(("127.0.0.1", 0), Handler)
        self.every, self.lock, self.did = every, threading.Lock(), Counter[str]()
        self.over = threading.Event()

    def turn(self, what: str) -> bool:
        with self.lock:
            self.did[what] += 1
            return self.did[what] % self.every == 0

    def note(self, what: str) -> None:
        with self.lock:
            self.did[what] += 1
            if self.mark is not None and all(self.did[each] for each in ("reset", "cut", "stalled")):
                self.mark.touch()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(socketserver.BaseRequestHandler):
    server: Treacherous

    def setup(self) -> None:
        if self.server.tls is not None:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)

    def handle(self) -> None:
        if self.server.turn("connections"):
            self.reset()
            return
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                try:
                    chunk = self.request.recv(65536)
                except OSError:
                    return
                if not chunk:
                    return
                data += chunk
            head, _, data = data.partition(b"\r\n\r\n")
            # One fault a request: a request that stalls is not one whose reply is cut.
            if self.server.turn("requests"):
                self.server.note("stalled")
                self.server.over.wait(STALL)
                return
            if self.server.turn("replies"):
                self.server.note("cut")
                self.request.sendall(REPLY[:-4])
                return
            self.request.sendall(REPLY)
            if b"connection: close" in head.lower():
                return

    def reset(self) -> None:
        self.server.note("reset")
        self.request.recv(65536)  # its request has come, so the client has connected
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()

    def finish(self) -> None:
        # Else socketserver would shut down what was reset.
        self.request.close()


@contextmanager
def serving(server: Treacherous) -> Iterator[Treacherous]:
    server.shutdown_request = server.close_request  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def rehearse(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["rehearse", *arguments])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "SETTLE", 0.3)


@pytest.mark.parametrize(
    ("scheme", "how"),
    [
        ("http", ["--clients", "12"]),
        ("http", ["--clients", "40", "--rate", "300"]),
        ("https", ["--clients", "12", "--insecure"]),
    ],
    ids=["closed", "open", "TLS"],
)
def test_what_is_reported_is_what_the_server_did(scheme: str, how: list[str], tmp_path: Path) -> None:
    file, mark = tmp_path / "report.json", tmp_path / "did-all"
    tls = self_signed(tmp_path).server() if scheme == "https" else None
    with serving(Treacherous(tls=tls, mark=mark)) as server:
        url = f"{scheme}://127.0.0.1:{server.port}/"
        until_all = f"for i in $(seq 600); do [ -e {mark} ] && break; sleep 0.05; done"
        done = rehearse("--url", url, "--do", until_all, "--timeout", "1", "--json", str(file), *how)
        did = dict(server.did)
    assert done.exit_code == 1, done.output
    outcomes = json.loads(file.read_text())["outcomes"]
    assert did["reset"] > 0
    assert did["cut"] > 0
    assert did["stalled"] > 0
    wrong = {name: count for name, count in outcomes.items() if count and name not in ("ok", "stale")}
    assert wrong == {"reset": did["reset"], "truncated": did["cut"], "timeout": did["stalled"]}
    # All that arrived was counted, and the one request that comes before the load.
    assert sum(outcomes.values()) - outcomes["stale"] == did["requests"] + did["reset"] - 1


def test_a_stall_shows_as_latency_in_an_open_loop(tmp_path: Path) -> None:
    """A closed loop of one client sees one slow request; in an open one all that were due meanwhile waited."""
    slow = {}
    for name, how in {"closed": ["--clients", "1"], "open": ["--clients", "1", "--rate", "50"]}.items():
        file = tmp_path / name
        with serving(Treacherous(every=40)) as server:
            url = f"http://127.0.0.1:{server.port}/"
            rehearse("--url", url, "--do", "sleep 1.5", "--timeout", "0.6", "--json", str(file), *how)
        report = json.loads(file.read_text())
        slow[name] = report["latency_ms"]["steady"]["p99"]
        if name == "open":
            assert report["generator"]["asked"] == 50
            assert report["generator"]["waited"] > 0
    # The reply to a request that timed out never came; those behind it did, late, and an open loop says so.
    assert slow["open"] > max(100, slow["closed"])


def test_command_that_fails_is_named_and_all_files_are_written(tmp_path: Path) -> None:
    page, junit = tmp_path / "report.html", tmp_path / "report.xml"
    with serving(Treacherous(every=10**9)) as server:
        url = f"http://127.0.0.1:{server.port}/"
        done = rehearse("--url", url, "--do", "exit 3", "--html", str(page), "--junit", str(junit), "--clients", "2")
    assert done.exit_code == 1
    assert "FAILED: the command: it ended with status 3" in done.output
    assert "requests lost in a command" in done.output
    suite = ET.parse(junit).getroot()[0]
    assert {case.get("name"): [each.get("message") for each in case] for case in suite.iter("testcase")} == {
        "no request is lost": [],
        "no reply differs": [],
        "command": ["it ended with status 3"],
    }
    assert "it ended with status 3" in page.read_text()


def test_sigterm_reports_what_was_measured_and_ends_the_command(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with serving(Treacherous(every=10**9)) as server:

        def terminate() -> None:
            deadline = time.monotonic() + 20
            while not (mark.exists() and mark.read_text().strip()) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=terminate)
        thread.start()
        done = rehearse("--url", f"http://127.0.0.1:{server.port}/", "--do", f"echo $$ > {mark}; exec sleep 600")
        thread.join()
    assert done.exit_code == 1
    assert "0 of " in done.output
    assert "INTERRUPTED: by SIGTERM; this is what was measured" in done.output
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_command_that_was_only_just_started_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            # Between fork() and the moment at which the caller has the process.
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(external_service.subprocess, "Popen", Interrupted)
    with serving(Treacherous(every=10**9)) as server:
        done = rehearse("--url", f"http://127.0.0.1:{server.port}/", "--do", "exec sleep 600", "--clients", "2")
    status = started[0].poll()
    started[0].kill()
    started[0].wait()
    assert status == -signal.SIGTERM
    assert "INTERRUPTED: by SIGTERM" in done.output


def test_signal_that_does_not_interrupt_the_wait_for_the_command_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Waiting(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                # Another thread takes it, so that waitpid() goes on: as it does when the signal comes right before.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGTERM)).start()
            return super().wait(timeout)

    monkeypatch.setattr(external_service.subprocess, "Popen", Waiting)
    try:
        with serving(Treacherous(every=10**9)) as server:
            done = rehearse("--url", f"http://127.0.0.1:{server.port}/", "--do", "exec sleep 8", "--clients", "2")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert started[0].wait() == -signal.SIGTERM
    assert "INTERRUPTED: by SIGTERM" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give APP_DIR_OR_CONF or --url"),
        (["app", "--url", "http://127.0.0.1:1/"], "give APP_DIR_OR_CONF or --url, not both"),
        (["app", "--do", "true"], "--do is run for a service that is measured from outside: give --url too"),
        (["--url", "http://127.0.0.1:1/", "--scenario", "reload"], "--scenario and --listener are for a service"),
        (["--url", "ftp://127.0.0.1/"], "not a URL such as http://127.0.0.1:8000/ or https://shop.example/"),
        (["--url", "127.0.0.1:8000"], "not a URL such as http://127.0.0.1:8000/"),
        (["--url", "http://127.0.0.1:1/"], "GET / before any upgrade: [Errno 111] Connection refused"),
        (["--url", "http://127.0.0.1:1/", "--path", "0:/"], "weight 0 in '0:/' must be from 1 to 1000"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str) -> None:
    done = rehearse(*arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_address_without_a_path() -> None:
    assert address_of("http://localhost") == address_of("http://localhost:80/")
