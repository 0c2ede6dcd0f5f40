"""The units of the docs under a real systemd: reload, restart and stop lose nothing, and what fails is reported."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.processes import systemd_box
from tests.processes.harness import APP, PATIENCE, _knows_control_socket, answered_from, lost, until
from tests.processes.systemd_box import Box, CannotBoot, booted
from zdd_web.cli.rehearse.load import Load, LoadThread

GRACE_PERIOD = 20

CONF = """
from zdd_web.gunicorn import install
install(globals(), name={name!r}, listener="systemd", commit_window=0, grace_period={grace_period})
"""

SERVICE = """
[Service]
Type={type}
NotifyAccess=all
WorkingDirectory={directory}
ExecStart={python} -m gunicorn app:app --workers 1 --worker-class gthread --threads 16 {options}
{reload}
KillMode={kill_mode}
TimeoutStopSec={stop_timeout}
StandardError=append:{directory}/log
Environment=PYTHONDONTWRITEBYTECODE=1
{more}
"""

SOCKET = """
[Socket]
ListenStream=127.0.0.1:{port}
"""

RELOAD = "ExecReload={python} -m zdd_web.cli upgrade --pid $MAINPID"
#: After an upgrade the main process is not systemd's child, and in `mixed` mode systemd does not wait for such a one.
DRAIN = f"ExecStop={sys.executable} -m zdd_web.cli drain --pid $MAINPID"


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    reason = systemd_box.describe_bind_error()
    if reason:
        pytest.skip(f"no systemd can be booted here: {reason}")
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(booted())
        except (CannotBoot, OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no systemd can be booted here: {error}")
        yield found


class Unit:
    """A service, and the socket unit that holds its queue."""

    def __init__(self, box: Box, name: str, *, kind: str = "notify", kill_mode: str = "mixed", reload: str = RELOAD,
                 more: str = "") -> None:  # fmt: skip
        self.box, self.name = box, name
        self.service, self.socket = f"{name}.service", f"{name}.socket"
        self.directory = box.directory / name
        self.directory.mkdir()
        self.port = free_port()
        self.deploy("1")
        (self.directory / "gunicorn.conf.py").write_text(CONF.format(name=name, grace_period=GRACE_PERIOD))
        box.write_unit(self.socket, SOCKET.format(port=self.port))
        box.write_unit(self.service, SERVICE.format(
            type=kind, directory=self.directory, python=sys.executable, kill_mode=kill_mode, more=more,
            reload=reload.format(python=sys.executable), stop_timeout=GRACE_PERIOD + 5,
            options="--no-control-socket" if _knows_control_socket() else "",
        ))  # fmt: skip
        box.systemctl("daemon-reload")
        started = box.systemctl("start", self.socket)
        assert started.returncode == 0, started.stderr

    def deploy(self, version: str, at_import: str = "") -> None:
        text = textwrap.dedent(APP).replace('VERSION = "1"', f'VERSION = "{version}"\n{at_import}')
        (self.directory / "app.py").write_text(text)

    def log(self) -> str:
        log = self.directory / "log"
        return (log.read_text() if log.exists() else "") + self.box.journal(self.service)

    def get(self, target: str = "/") -> list[str]:
        """Return version, generation and pid."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", target)
            response = connection.getresponse()
            assert response.status == 200
            return response.read().decode().split()
        finally:
            connection.close()

    def does(self, verb: str, *, fails: bool = False) -> None:
        done = self.box.systemctl(verb, self.service)
        assert (done.returncode != 0) == fails, (verb, done, self.log())

    def show(self, name: str) -> str:
        return self.box.show(self.service, name)

    def is_active_with(self, pid: str = "") -> str:
        """Return the main process, of a service that is active; "" while it is not, or has another."""
        state, main = self.show("ActiveState"), self.show("MainPID")
        return main if state == "active" and pid in ("", main) else ""

    @contextlib.contextmanager
    def under_load(self) -> Iterator[LoadThread]:
        load = LoadThread(Load("127.0.0.1", self.port, ("/",), 8, 0.5, 0.1, 20.0, pace=0.1))
        with load:
            answered_from(load, 50)
            yield load
            answered_from(load, 50)
        assert lost(load) == [], self.log()

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[Callable[[], list[str]]]:
        """Have a request in hand until what is returned is called, which returns its answer."""
        answers: list[list[str]] = []
        thread = threading.Thread(target=lambda: answers.append(self.get(f"/hold?{name}")))
        thread.start()

        def finish() -> list[str]:
            (self.directory / name).touch()
            thread.join()
            assert answers, self.log()
            return answers[0]

        try:
            until("the held request", lambda: list(self.directory.glob(f"{name}.held-by-*")))
            yield finish
        finally:
            (self.directory / name).touch()
            thread.join()


@pytest.fixture
def make_unit(box: Box, request: pytest.FixtureRequest) -> Iterator[Callable[..., Unit]]:
    made: list[Unit] = []

    def make(**options: str) -> Unit:
        name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_"))[:40].strip("-")
        made.append(Unit(box, name, **options))
        return made[-1]

    yield make
    for unit in made:
        if getattr(request.node, "failed", False):
            print(unit.log())
        box.systemctl("stop", unit.socket, unit.service)
        shutil.rmtree(unit.directory)


@pytest.mark.parametrize(("kill_mode", "more"), [("mixed", DRAIN), ("control-group", "")], ids=["mixed", "group"])
def test_reload_restart_and_stop_lose_nothing(make_unit: Callable[..., Unit], kill_mode: str, more: str):
    unit = make_unit(kill_mode=kill_mode, more=more)
    # Nothing runs yet: the first request waits in the queue of the socket unit.
    assert unit.get()[:2] == ["1", "1"]
    first = unit.is_active_with()
    with unit.under_load():
        unit.deploy("2")
        unit.does("reload")
        second = unit.is_active_with()
        assert second != first
        until("the new code", lambda: unit.get() and unit.get()[:2] == ["2", "2"])
        assert re.fullmatch("generation 2: serving, 1 worker", unit.show("StatusText"))

        unit.deploy("3")
        unit.does("restart")
        third = unit.is_active_with()
        assert third not in ("", first, second)
        assert unit.get()[:2] == ["3", "1"]

    # To be stopped after an upgrade is the harder case: the main process is not systemd's child.
    unit.does("reload")
    with unit.holding("go") as finish:
        stop = threading.Thread(target=unit.does, args=("stop",))
        stop.start()
        until(
            "the stop", lambda: "event=phase.draining" in unit.log().rpartition("generation=2 event=phase.serving")[2]
        )
        assert finish()[:2] == ["3", "2"]
        stop.join()
    assert (unit.show("ActiveState"), unit.show("Result")) == ("inactive", "success")
    assert "SIGKILL" not in unit.log()


def test_a_reload_that_fails_is_reported_and_the_old_code_serves(make_unit: Callable[..., Unit]):
    unit = make_unit()
    unit.get()
    main = unit.is_active_with()
    unit.deploy("2", "raise RuntimeError('boom')")
    with unit.under_load():
        unit.does("reload", fails=True)
    assert unit.is_active_with() == main
    assert unit.get()[0] == "1"
    assert "RuntimeError: boom" in unit.show("StatusText")
    unit.deploy("3")
    unit.does("reload")
    assert unit.get()[0] == "3"


def test_a_generation_that_returns_to_office_is_the_main_process_again(make_unit: Callable[..., Unit]):
    unit = make_unit()
    unit.get()
    first = unit.is_active_with()
    with unit.holding("go") as finish:
        unit.does("reload")
        second = unit.is_active_with()
        unit.box.run("sh", "-c", f"kill -KILL {second}", check=True)
        until("its return", lambda: unit.is_active_with(first))
        assert finish()[1] == "1"
    # A worker of the killed master may answer until it has seen that.
    until("an answer of generation 1", lambda: unit.get()[1] == "1")
    unit.does("stop")
    assert unit.show("Result") == "success"


def test_a_master_that_stands_still_is_restarted_by_the_watchdog(make_unit: Callable[..., Unit]):
    unit = make_unit(more="WatchdogSec=1\nRestart=on-watchdog\nRestartSec=0")
    unit.get()
    unit.does("reload")
    main = unit.is_active_with()
    unit.box.run("sh", "-c", f"kill -STOP {main}", check=True)
    until("another", lambda: unit.is_active_with() not in ("", main))
    assert unit.show("NRestarts") == "1"
    assert unit.get()[:2] == ["1", "1"]


def test_notify_reload_is_an_upgrade(make_unit: Callable[..., Unit], box: Box):
    if box.version < 253:
        pytest.skip(f"Type=notify-reload came with systemd 253, and this is {box.version}")
    unit = make_unit(kind="notify-reload", reload="ReloadSignal=SIGUSR2")
    unit.get()
    first = unit.is_active_with()
    unit.deploy("2")
    with unit.under_load():
        unit.does("reload")
    assert unit.is_active_with() != first
    assert unit.get()[:2] == ["2", "2"]


@pytest.mark.parametrize("example", ["django", "flask"])
def test_the_examples_units_do_as_they_are(box: Box, example: str):
    files = systemd_box.ROOT / f"example_{example}" / "deploy"
    name = f"example-{example}"
    port = free_port()
    text = re.sub(r"/srv/[^ ]*/\.venv/bin", str(Path(sys.executable).parent), (files / f"{name}.service").read_text())
    text = text.replace(f"/srv/{name}/current", str(systemd_box.ROOT))
    # This machine's interpreter may be where only root may look.
    text = re.sub(r"^(User|ProtectHome)=.*\n", "", text, flags=re.MULTILINE)
    box.write_unit(f"{name}.service", text)
    box.write_unit(f"{name}.socket", (files / f"{name}.socket").read_text().replace("8000", str(port)))
    box.systemctl("daemon-reload")

    def generation() -> int:
        connection = http.client.HTTPConnection("localhost", port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return int(json.loads(connection.getresponse().read())["generation"])

    try:
        assert box.systemctl("start", f"{name}.socket").returncode == 0
        assert generation() == 1, box.journal(f"{name}.service")
        for verb, then in (("reload", 2), ("restart", 1)):
            done = box.systemctl(verb, f"{name}.service")
            assert done.returncode == 0, (done, box.journal(f"{name}.service"))
            assert generation() == then
    finally:
        box.systemctl("stop", f"{name}.socket", f"{name}.service")
    state = [box.show(f"{name}.service", each) for each in ("ActiveState", "Result")]
    assert state == ["inactive", "success"], box.journal(f"{name}.service")


def test_the_box_shares_no_more_than_its_directory(box: Box):
    assert box.run("sh", "-c", "ls -A /tmp").stdout == ""
    box.run("touch", "/etc/written-inside", check=True)
    assert not Path("/etc/written-inside").exists()
