"""What systemd is told: the exact datagrams, played by a socket that the kernel tells who has sent each."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.processes.harness import APP, Held, Service, successor, until
from zdd_web.lifecycle import Phase

CREDENTIALS = struct.Struct("3i")

#: The loop turns as often as under load, and the commit window is short.
QUICK = """
import os
import zdd_web.gunicorn.master.master as loop
loop.IDLE_TICK, os.environ["ZDD_WEB_COMMIT_WINDOW"] = 0.02, "0"
"""

#: Alive unless there is a file; asked often.
APP_THAT_DIES = (
    APP
    + """
    @zdd_web.check("pulse", kind="liveness", interval=0.02)
    def pulse():
        return not os.path.exists("dead")
"""
)

WATCHDOG_SECONDS = 0.4


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self) -> None:
        name = f"zdd_web-test-{uuid.uuid4().hex}"
        self.address = f"@{name}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(f"\0{name}")
        self._socket.settimeout(0.05)
        self._heard: list[tuple[int, str]] = []
        self._closed = threading.Event()
        # The kernel keeps ten for whoever does not read.
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Systemd:
        self._reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                data, (found,), _, _ = self._socket.recvmsg(8192, socket.CMSG_SPACE(CREDENTIALS.size))
                self._heard.append((CREDENTIALS.unpack(found[2])[0], data.decode()))

    def hear(self) -> list[tuple[int, str]]:
        """Return who has said what so far: what the service's log told when this is called is there."""
        until("the queue's end", lambda: not select.select([self._socket], [], [], 0)[0])
        return list(self._heard)

    def transcript(self, service: Service, *, watchdog: bool = False) -> list[str]:
        """Return each datagram with the generation that sent it, and what differs from run to run taken out."""
        assert service.process is not None
        pids = {str(service.process.pid): "1"}
        for generation, pid in re.findall(r"generation=(\d+) event=boot\.started pid=(\d+)", service.log()):
            pids[pid] = generation
        said = []
        for pid, text in self.hear():
            if text == "WATCHDOG=1" and not watchdog:
                continue
            text = re.sub(r"^MAINPID=(\d+)$", lambda found: f"MAINPID={pids[found[1]]}", text, flags=re.MULTILINE)
            text = re.sub(r"^(MONOTONIC_USEC|EXTEND_TIMEOUT_USEC)=\d+$", r"\1=µs", text, flags=re.MULTILINE)
            said.append(f"{pids[str(pid)]}: {text}".replace("\n", " | "))
        return said

    def microseconds(self, name: str) -> list[int]:
        """Return the values of such lines."""
        return [int(value) for _, text in self.hear() for value in re.findall(rf"^{name}=(\d+)$", text, re.MULTILINE)]


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    with Systemd() as systemd:
        yield systemd


@pytest.fixture
def make(make_service: Callable[..., Service], systemd: Systemd) -> Callable[..., Service]:
    """Make a service below it."""

    def make(**settings: object) -> Service:
        service = make_service("gthread", workers=1, **settings)
        service.environ["NOTIFY_SOCKET"] = systemd.address
        return service.configure(QUICK)

    return make


STOPS = [
    "{0}: STOPPING=1 | STATUS=generation {0}: {1}, 0 requests and 0 background tasks in hand | EXTEND_TIMEOUT_USEC=µs",
]


def stops(generation: int, *phases: str) -> list[str]:
    return [STOPS[0].format(generation, phase) for phase in phases]


def begins(generation: int, what: str) -> str:
    return f"{generation}: RELOADING=1 | MONOTONIC_USEC=µs | STATUS=generation {generation}: {what}"


def is_ready(generation: int, what: str) -> str:
    return f"{generation}: READY=1 | STATUS=generation {generation}: {what}"


FIRST_UPGRADE = [
    is_ready(1, "serving, 1 worker"),
    begins(1, "upgrading to generation 2"),
    "1: MAINPID=2 | READY=1 | STATUS=generation 2: serving, 1 worker",
]


def test_start_upgrade_reload_and_what_fails_of_them_and_a_stop(make, systemd: Systemd):
    began = time.monotonic_ns() // 1000
    service = make(grace_period=20).start()
    service.upgrade()
    service.until_alone()
    service.deploy("3", at_import="raise RuntimeError('boom\\nMAINPID=1\\nSTOPPING=1')")
    service.upgrade(expect="upgrade.failed")
    service.signal(signal.SIGHUP)
    service.wait_for("event=refused signal=HUP")
    service.deploy("4")
    service.signal(signal.SIGHUP)
    service.wait_for("event=reload.done")
    until("the new worker alone", lambda: len(service.snapshot().workers) == 1, service)
    service.stop()
    said = systemd.transcript(service)
    assert said[: len(FIRST_UPGRADE)] == FIRST_UPGRADE
    failed = said[4]
    assert failed.startswith(is_ready(2, "the upgrade failed: worker "))
    # One line: nothing that a release says can be taken for a message of its own.
    assert failed.count(" | ") == 1
    assert said[3:] == [
        begins(2, "upgrading to generation 3"),
        failed,
        begins(2, "reloading"),
        is_ready(2, "the reload failed: " + said[6].partition("the reload failed: ")[2]),
        begins(2, "reloading"),
        is_ready(2, "reloaded"),
        *stops(2, "lame_duck", "draining", "stopped"),
    ]
    # It is the kernel's monotonic clock, without which systemd waits for ever.
    assert all(began <= each <= time.monotonic_ns() // 1000 for each in systemd.microseconds("MONOTONIC_USEC"))
    # What is left of GRACE_PERIOD, and some more; the last one has only that.
    first, second, _ = systemd.microseconds("EXTEND_TIMEOUT_USEC")
    assert 5_000_000 < second <= first <= 25_000_000


def test_a_stop_ends_an_upgrade_under_way_and_says_so(make, systemd: Systemd):
    service = make().start()
    service.deploy("2", at_import="import time; time.sleep(600)")
    service.signal(signal.SIGUSR2)
    service.wait_for("event=upgrade.started")
    service.stop()
    assert systemd.transcript(service) == [
        *FIRST_UPGRADE[:2],
        is_ready(1, "the upgrade was cancelled: the service was stopped"),
        *stops(1, "lame_duck", "draining", "stopped"),
    ]


def test_an_old_generation_says_nothing_unless_it_returns(make, systemd: Systemd):
    service = make().start()
    first = service.pid
    held = Held(service)
    service.upgrade()
    # The deadline of a retirement is no end of the service.
    service.signal(signal.SIGTERM, first)
    held.finish()
    service.until_alone()
    assert systemd.transcript(service) == FIRST_UPGRADE
    second = service.pid
    held = Held(service)
    service.upgrade()
    os.kill(successor(service, 2), signal.SIGKILL)
    service.wait_for("event=successor.lost")
    until("its return", lambda: service.snapshot().phase is Phase.SERVING, service)
    assert service.pid == second
    held.finish()
    service.signal(signal.SIGINT)
    service.ends()
    assert systemd.transcript(service)[3:] == [
        begins(2, "upgrading to generation 3"),
        "2: MAINPID=3 | READY=1 | STATUS=generation 3: serving, 1 worker",
        "2: MAINPID=2 | READY=1 | STATUS=generation 2: serving again, 1 worker",
        "2: STOPPING=1 | STATUS=generation 2: stopping now | EXTEND_TIMEOUT_USEC=µs",
    ]


def test_a_pid_that_stays_is_not_named(make, systemd: Systemd):
    service = make(keep_pid=True).start()
    service.upgrade()
    service.wait_for("event=keeper.started")
    service.signal(signal.SIGTERM)
    service.ends()
    assert systemd.transcript(service) == [
        *FIRST_UPGRADE[:2],
        "1: READY=1 | STATUS=generation 2: serving, 1 worker",
        *stops(2, "lame_duck", "draining", "stopped"),
    ]


def test_what_is_refused_is_answered_so_that_nobody_waits(make, systemd: Systemd):
    service = make()
    service.arguments = ["--preload"]
    service.start()
    service.signal(signal.SIGHUP)
    service.wait_for("event=refused signal=HUP")
    service.stop()
    reason = "the reload was refused: preload_app: the master has loaded the app, and SIGHUP would start workers with"
    assert [line.partition(" that code")[0] for line in systemd.transcript(service)[1:3]] == [
        begins(1, reason),
        is_ready(1, reason),
    ]


def test_the_watchdog_is_fed_by_whoever_is_in_office_while_the_service_lives(make, systemd: Systemd):
    service = make()
    service.write_app(APP_THAT_DIES)
    # As systemd has it: only the process that it has started is meant.
    service.launcher = ["sh", "-c", 'export WATCHDOG_PID=$$; exec "$@"', "sh", *service.launcher]
    service.environ["WATCHDOG_USEC"] = str(int(WATCHDOG_SECONDS * 1e6))
    service.configure(QUICK.replace("0.02", "1.0")).start()

    def fed(generation: int, times: int) -> Callable[[], bool]:
        line = f"{generation}: WATCHDOG=1"
        return lambda: systemd.transcript(service, watchdog=True).count(line) >= times

    until("the watchdog's food", fed(1, 5), service)
    service.upgrade()
    until("the new one's", fed(2, 5), service)
    service.until_alone()
    said = systemd.transcript(service, watchdog=True)
    handed_over = said.index(FIRST_UPGRADE[2])
    assert {line[0] for line in said[:handed_over]} == {"1"}
    assert {line[0] for line in said[handed_over + 1 :]} == {"2"}

    (service.directory / "dead").touch()
    service.wait_for(r'event=watchdog\.withheld reason="pulse: .*" watchdog=0\.4')
    length, withheld = len(systemd.hear()), service.snapshot().tick_at
    until("turns", lambda: service.snapshot().tick_at - withheld > 3 * WATCHDOG_SECONDS * 1e9, service)
    assert systemd.hear()[length:] == []
    (service.directory / "dead").unlink()
    until("food again", lambda: len(systemd.hear()) > length, service)
    service.stop()


def test_a_watchdog_of_another_process_is_not_fed(make, systemd: Systemd):
    service = make()
    service.environ.update(WATCHDOG_USEC="100000", WATCHDOG_PID="1")
    service.start()
    ticks = service.snapshot().tick_at
    until("turns", lambda: service.snapshot().tick_at - ticks > 3e8, service)
    service.stop()
    assert systemd.transcript(service, watchdog=True)[1:] == stops(1, "lame_duck", "draining", "stopped")


def test_a_socket_that_is_not_there_costs_a_line(make):
    service = make()
    service.environ["NOTIFY_SOCKET"] = str(service.directory / "nowhere")
    service.start()
    service.upgrade()
    service.until_alone()
    service.stop()
    # One for each master.
    lines = service.matches(r"event=notify\.failed")
    assert [line.partition(" event=")[0][-1] for line in lines] == ["1", "2"], lines
    assert 'message="READY=1 STATUS=generation 1: serving, 1 worker" error="No such file or directory"' in lines[0]


def test_a_full_socket_costs_a_line_and_no_service(make):
    service = make()
    address = f"zdd_web-test-{uuid.uuid4().hex}"
    service.environ["NOTIFY_SOCKET"] = f"@{address}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
    ):
        deaf.bind(f"\0{address}")
        sender.connect(f"\0{address}")
        with contextlib.suppress(BlockingIOError):
            while True:
                sender.send(b"FULL=1")
        service.start()
        line = service.upgrade(expect="upgrade.failed")
        # systemd would have ended the service with the old master, of which it has not heard that it is replaced.
        assert "systemd does not hear MAINPID=" in line
        service.until_alone()
        assert service.get().generation == 1
        service.stop()
    assert len(service.matches(r"event=notify\.failed")) == 1
