"""The pid file names a living main master at every instant; and what else there is one of: the control socket."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.processes.harness import (
    Held,
    Service,
    answered_from,
    ask_unix,
    command_line,
    generations_of,
    serving,
    until,
)  # fmt: skip
from zdd_web.system import proc

HAS_CONTROL_SOCKET = importlib.util.find_spec("gunicorn.ctl") is not None
HAS_DIRTY_APPS = importlib.util.find_spec("gunicorn.dirty") is not None


@dataclass
class Reader:
    """What a monitoring system sees that reads the pid file all the time."""

    path: Path
    pids: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    reads: int = 0

    def look(self) -> None:
        self.reads += 1
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            self.wrong.append("there was no pid file")
            return
        if not text.endswith("\n") or not text.strip().isdigit():
            self.wrong.append(f"the pid file said {text!r}")
            return
        pid = int(text)
        if not self.pids or self.pids[-1] != pid:
            self.pids.append(pid)
        # A process that ended after the file was read, and named another since, was alive when it was named.
        if proc.state(pid) in ("", "Z", "X") and self.path.read_text() == text:
            self.wrong.append(f"the pid file named {pid}, which was gone")


@contextlib.contextmanager
def read_all_the_time(path: Path) -> Iterator[Reader]:
    reader, over = Reader(path), threading.Event()

    def loop() -> None:
        while not over.is_set():
            reader.look()
            time.sleep(0)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield reader
    finally:
        over.set()
        thread.join()


def test_pid_file_names_a_living_master_at_every_instant_of_five_upgrades(make_service):
    service = make_service()
    service.start()
    masters = [service.pid]
    with read_all_the_time(service.pid_file) as reader, service.under_load(clients=4) as load:
        for number in range(2, 7):
            service.upgrade()
            masters.append(serving(service, number))
            until("the pid file", lambda: service.pid_file.read_text() == f"{masters[-1]}\n", service)
        answered_from(load, 50)
    assert reader.wrong == []
    assert reader.pids == masters
    assert reader.reads > 1000
    service.stop()
    assert not service.pid_file.exists()


def test_pid_file_names_a_living_master_while_an_upgrade_fails(make_service):
    service = make_service()
    service.start()
    before = service.pid
    service.deploy("2", at_import="raise RuntimeError('boom')")
    with read_all_the_time(service.pid_file) as reader:
        service.upgrade(expect="upgrade.failed")
    assert reader.wrong == []
    assert reader.pids == [before]


def test_pid_file_is_not_taken_away_by_a_predecessor_that_ends_late(make_service):
    service = make_service()
    service.start()
    with Held(service) as held:
        service.upgrade()
        with read_all_the_time(service.pid_file) as reader:
            assert held.finish().generation == 1
            service.wait_for("generation=1 event=phase.stopped")
            service.until_one_generation()
    assert reader.wrong == []
    assert reader.pids[-1] == service.pid


# -- a file from another life


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A running process that has nothing to do with the service."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_pid_that_was_used_again_since_does_not_keep_the_service_from_starting(make_service, stranger):
    service = make_service()
    service.pid_file.write_text(f"{stranger.pid}\n")
    an_hour_ago = time.time() - 3600
    os.utime(service.pid_file, (an_hour_ago, an_hour_ago))
    service.start()
    assert service.pid_file.read_text() == f"{service.pid}\n"
    assert stranger.poll() is None


def test_pid_of_a_process_that_may_have_written_the_file_is_respected(make_service):
    other, service = make_service(), make_service()
    other.start()
    service.pid_file.write_text(f"{other.pid}\n")
    process = service.spawn()
    assert process.wait(timeout=30) != 0
    assert "Already running" in service.log()
    assert str(other.pid) in service.log()
    assert service.pid_file.read_text() == f"{other.pid}\n"
    assert other.get().generation == 1


def test_second_start_by_mistake_after_a_step_of_the_clock_leaves_the_pid_file_alone(make_service):
    service, second = make_service(), make_service()
    service.start()
    # What a forward step by an hour does: the start of a process seems an hour later, a file's time stays.
    an_hour_ago = time.time() - 3600
    os.utime(service.pid_file, (an_hour_ago, an_hour_ago))
    second.pid_file = service.pid_file
    assert second.spawn().wait(timeout=30) != 0
    assert f"Already running on PID {service.pid} " in second.log()
    assert service.pid_file.read_text() == f"{service.pid}\n"
    assert service.get().generation == 1
    service.stop()


def test_predecessor_that_is_an_unreaped_zombie_does_not_keep_the_service_from_starting(make_service):
    first, service = make_service(), make_service()
    service.pid_file = first.pid_file
    first.start()
    zombie = first.pid
    os.kill(zombie, signal.SIGKILL)
    # Not `processes()`, which would reap it.
    until("the zombie", lambda: proc.state(zombie) == "Z")
    assert first.pid_file.read_text() == f"{zombie}\n"
    service.start()
    assert proc.state(zombie) == "Z"
    assert service.pid_file.read_text() == f"{service.pid}\n"
    service.upgrade()


@pytest.mark.parametrize("text", ["", "no number\n", "999999999\n"])
def test_file_that_names_nobody_does_not_keep_the_service_from_starting(make_service, text: str):
    service = make_service()
    service.pid_file.write_text(text)
    service.start()
    assert service.pid_file.read_text() == f"{service.pid}\n"


def test_reload_moves_the_pid_file_and_the_next_generation_finds_it(make_service):
    service = make_service()
    old, new = service.directory / "old.pid", service.directory / "new.pid"
    service.pid_file = old
    service.pid_option = False
    service.configure(f"pidfile = {str(old)!r}\n").start()
    assert old.read_text() == f"{service.pid}\n"
    service.configure(f"pidfile = {str(new)!r}\n")
    service.signal(signal.SIGHUP)
    service.wait_for(r"event=reload\.done")
    assert new.read_text() == f"{service.pid}\n"
    assert not old.exists()
    service.upgrade()
    until("the successor's pid", lambda: new.read_text() == f"{service.pid}\n", service)
    assert serving(service, 2) == service.pid
    service.stop()
    assert not new.exists()
    assert not old.exists()


def test_upgrade_to_a_release_with_another_pid_file_leaves_the_new_one_alone(make_service):
    service = make_service()
    old, new = service.directory / "old.pid", service.directory / "new.pid"
    service.pid_option = False
    service.configure(f"pidfile = {str(old)!r}\n").start()
    service.configure(f"pidfile = {str(new)!r}\n")
    service.upgrade()
    service.wait_for("generation=1 event=phase.stopped")
    service.until_one_generation()
    assert new.read_text() == f"{service.pid}\n"
    assert not old.exists()


WITHOUT_INSTALL = "timeout = 30\n"

FAILURES = {
    "broken app": lambda service: service.deploy("2", at_import="raise RuntimeError('boom')"),
    "broken configuration": lambda service: (service.directory / "gunicorn.conf.py").write_text("1/0\n"),
    "no install()": lambda service: (service.directory / "gunicorn.conf.py").write_text(WITHOUT_INSTALL),
    "no install(), with preload": lambda service: (service.directory / "gunicorn.conf.py").write_text(
        "preload_app = True\n"
    ),
    "on_starting raises": lambda service: (service.directory / "gunicorn.conf.py").write_text(
        "def on_starting(server):\n    raise ValueError('no database')\n"
        "from zdd_web.gunicorn import install\ninstall(globals())\n"
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_upgrade_leaves_no_file_behind(make_service, failure: str):
    service = make_service()
    service.start()
    before = sorted(path.name for path in service.directory.iterdir())
    FAILURES[failure](service)
    service.upgrade(expect="upgrade.failed")
    assert sorted(path.name for path in service.directory.iterdir()) == before
    assert service.pid_file.read_text() == f"{service.pid}\n"
    assert service.get().generation == 1


def test_pid_file_that_cannot_be_replaced_fails_the_upgrade_before_it_answers(make_service, tmp_path):
    service = make_service(generation_header="X-Zdd-Generation")
    place = tmp_path / "run"
    place.mkdir()
    service.pid_file = place / "service.pid"
    service.start()
    with service.under_load(clients=4) as load:
        place.rename(tmp_path / "gone")
        line = service.upgrade(expect="upgrade.failed")
        answered_from(load, 50)
    assert "cannot be replaced" in line
    assert generations_of(load) == {1}


# -- gunicorn's control socket


def control(path: Path, command: str) -> str:
    """Ask by gunicorn's own client."""
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn.ctl.cli", "-s", str(path), "-c", command, "-j"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout if done.returncode == 0 else f"failed: {done.stdout}{done.stderr}"


def master_by_control(path: Path) -> int:
    try:
        return int(json.loads(control(path, "show all"))["arbiter"]["pid"])
    except (ValueError, KeyError, TypeError):
        return 0


@pytest.fixture
def controlled(make_service, tmp_path) -> tuple[Service, Path]:
    """A service with a control socket, and where that is."""
    if not HAS_CONTROL_SOCKET:
        pytest.skip("this gunicorn has no control socket")
    service = make_service()
    service.control_socket = tmp_path / "c.sock"
    return service, service.control_socket


def test_control_socket_belongs_to_the_new_master_after_an_upgrade(controlled):
    service, path = controlled
    service.start()
    until("the control socket", lambda: master_by_control(path) == service.pid, service)
    for number in (2, 3):
        service.upgrade()
        service.wait_for(rf"generation={number - 1} event=phase\.stopped")
        service.until_one_generation()
        assert serving(service, number) == service.pid
        until("the new master's answer", lambda: master_by_control(path) == service.pid, service)
    service.stop()
    assert not path.exists()


def test_control_socket_is_the_old_masters_still_after_a_failed_upgrade(controlled):
    service, path = controlled
    service.start()
    until("the control socket", lambda: master_by_control(path) == service.pid, service)
    service.deploy("2", at_import="raise RuntimeError('boom')")
    service.upgrade(expect="upgrade.failed")
    assert master_by_control(path) == service.pid


def test_control_socket_returns_with_the_old_master_when_the_new_one_is_killed(controlled):
    service, path = controlled
    service.start()
    first = service.pid
    with Held(service) as held:
        service.upgrade()
        second = serving(service, 2)
        until("the new master's answer", lambda: master_by_control(path) == second, service)
        service.signal(signal.SIGKILL, second)
        service.wait_for(r"event=successor\.lost")
        until("the old master's answer", lambda: master_by_control(path) == first, service)
        assert held.finish().generation == 1


# -- the listener that has a name in the file system


@pytest.fixture
def on_unix(make_service, tmp_path) -> tuple[Service, Path]:
    """A service on a Unix socket, started."""
    path = tmp_path / "s.sock"
    service = make_service()
    service.bind = f"unix:{path}"
    service.spawn()
    serving(service)
    return service, path


def test_unix_socket_leads_to_the_new_generation_and_is_gone_after_the_stop(on_unix):
    service, path = on_unix
    inode = path.stat().st_ino
    for number in (2, 3):
        service.upgrade()
        service.wait_for(rf"generation={number - 1} event=phase\.stopped")
        service.until_one_generation()
        assert ask_unix(path).generation == number
    assert path.stat().st_ino == inode
    service.stop()
    assert not path.exists()


def test_unix_socket_is_left_to_the_third_generation_when_the_first_ends_last(on_unix):
    service, path = on_unix
    with Held(service, path) as held:
        service.upgrade()
        service.upgrade()
        service.wait_for(r"generation=2 event=phase\.stopped")
        until("the second's end", lambda: [g.board.header.generation for g in service.generations()] == [1, 3], service)
        assert held.finish().generation == 1
    service.wait_for(r"generation=1 event=phase\.stopped")
    service.until_one_generation()
    assert path.exists()
    assert ask_unix(path).generation == 3


@pytest.mark.parametrize("failure", FAILURES)
def test_unix_socket_still_leads_to_the_old_generation_after_a_failed_upgrade(on_unix, failure: str):
    service, path = on_unix
    FAILURES[failure](service)
    service.upgrade(expect="upgrade.failed")
    assert ask_unix(path).generation == 1
    assert ask_unix(path).generation == 1
    service.until_alone()


def test_unix_socket_still_leads_to_the_old_generation_when_the_new_one_is_killed(on_unix):
    service, path = on_unix
    with Held(service, path) as held:
        service.upgrade()
        service.signal(signal.SIGKILL, serving(service, 2))
        service.wait_for(r"event=successor\.lost")
        assert held.finish().generation == 1
    until("the old generation's answer", lambda: ask_unix(path).generation == 1, service)
    service.stop()
    assert not path.exists()


# -- dirty apps

DIRTY = """
    from gunicorn.dirty.app import DirtyApp
    class Jobs(DirtyApp):
        def init(self):
            pass
        def __call__(self, action, *args, **kwargs):
            return action
        def close(self):
            pass
"""


def test_dirty_apps_are_a_reason_to_refuse(make_service):
    if not HAS_DIRTY_APPS:
        pytest.skip("this gunicorn has no dirty apps")
    service = make_service()
    (service.directory / "jobs.py").write_text(textwrap.dedent(DIRTY))
    service.configure("dirty_apps = ['jobs:Jobs']\ndirty_workers = 1\n").start()
    dirty = [pid for pid in service.processes() if pid != service.pid]
    service.signal(signal.SIGUSR2)
    line = service.wait_for(r"event=(?:refused|upgrade\.started)")
    assert "dirty_apps are set" in line
    assert "restart the service, or move them into a service of their own" in line
    assert service.get().generation == 1
    assert set(dirty) <= set(service.processes())
    assert all(command_line(pid) for pid in dirty)
    service.stop()
    assert service.processes() == []
