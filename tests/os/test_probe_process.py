"""The master's side of the probe port: where it listens, and what it does when its process dies."""

from __future__ import annotations

import os
import signal
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.generations import a_generation
from zdd_web.board import Board
from zdd_web.errors import ListenerError, SettingsError
from zdd_web.gunicorn.master import probe_process
from zdd_web.gunicorn.master.probe_process import ProbePort, listen, refuse_if_taken
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings
from zdd_web.system import clock


@pytest.mark.parametrize(
    ("bind", "app", "refused"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000), True),
        ("0.0.0.0:8000", ("127.0.0.1", 8000), True),
        (":8000", ("127.0.0.1", 8000), True),
        ("127.0.0.1:8000", ("0.0.0.0", 8000), True),
        ("[::]:8000", ("::1", 8000), True),
        ("127.0.0.2:8000", ("127.0.0.1", 8000), False),
        ("127.0.0.1:8001", ("127.0.0.1", 8000), False),
        ("127.0.0.1:0", ("127.0.0.1", 0), False),
        ("127.0.0.1:8000", "/run/app.sock", False),
        ("127.0.0.1:8000", 3, False),
    ],
)
def test_the_apps_own_address_is_refused(bind: str, app: Any, refused: bool) -> None:
    if refused:
        with pytest.raises(SettingsError, match="the app itself is served there"):
            refuse_if_taken(bind, [app])
    else:
        refuse_if_taken(bind, [app])


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:0", ":0", pytest.param("[::1]:0", id="IPv6")])
def test_it_listens_on_names_and_addresses(bind: str) -> None:
    try:
        listener = listen(bind)
    except ListenerError:
        if not bind.startswith("["):
            raise
        pytest.skip("no IPv6 here")
    with listener, socket.socket(listener.family) as client:
        assert client.connect_ex(listener.getsockname()) == 0
        assert not os.get_inheritable(listener.fileno())


@pytest.mark.parametrize(
    ("bind", "said"),
    [
        ("192.0.2.1:8081", "cannot assign requested address: no interface of this machine"),
        ("no-such-host.invalid:8081", "write an address of this machine"),
    ],
)
def test_an_address_that_cannot_be_had_is_named_with_the_reason(bind: str, said: str) -> None:
    with pytest.raises(ListenerError) as error:
        listen(bind)
    assert str(error.value).startswith(f"PROBE_BIND = {bind!r}: ")
    assert said in str(error.value)


def test_a_port_in_use_is_tried_for_a_moment() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ListenerError, match="address already in use: another process has this port"):
            listen(f"127.0.0.1:{taken.getsockname()[1]}", patience=0.1)


class Port(ProbePort):
    """With a process that exits at once, with the next of `statuses`; 0 lives."""

    statuses: list[int]

    def _become_the_process(self, master: int) -> Any:
        if self.statuses and self.statuses[0]:
            os._exit(self.statuses[0])
        while True:
            signal.pause()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Any:
    board = Board.create("probe-port", slots=1)
    server = SimpleNamespace(cfg=SimpleNamespace(address=[("127.0.0.1", 0)]))
    made = Port(server, board, Settings(probe_bind="127.0.0.1:0"), None)
    made.statuses = []
    yield made
    made._header.successor_pid = 0
    made.end()
    board.close()


def follow(port: ProbePort, phase: Phase = Phase.SERVING) -> None:
    port.follow(a_generation(port._board, phase), None, lambda: True)


def reaped(port: Port) -> None:
    while port._status is None:
        port.look()


def test_it_is_forked_once_and_named_on_the_board(port: Port) -> None:
    port.start(None)
    pid = port._header.probe_pid
    port.start(None)
    assert port._header.probe_pid == pid != 0
    assert port._header.probe_accepts == 1
    port.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_is_forked_again_at_once_and_later_each_time_after_that(port: Port, caplog: Any) -> None:
    port.statuses = [3]
    port.start(None)
    reaped(port)
    follow(port)  # at once
    reaped(port)
    before = port._header.probe_pid
    follow(port)
    assert port._header.probe_pid == before
    waits = []
    for _ in range(4):
        waits.append(clock.remaining(port._not_before))
        port._not_before = clock.now_ns()
        follow(port)
        reaped(port)
        follow(port)
    assert all(wait is not None and 0 < wait <= 30 for wait in waits)
    assert waits == sorted(waits)  # type: ignore[type-var]
    assert "exit status 3" in caplog.text


def test_one_that_has_lived_is_forked_again_at_once(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_process, "LIVED", 0.0)
    port.start(None)
    for _ in range(3):
        before = port._header.probe_pid
        os.kill(before, signal.SIGKILL)
        reaped(port)
        follow(port)
        assert port._header.probe_pid != before


def test_a_failed_fork_is_tried_again(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    port.start(None)
    os.kill(port._header.probe_pid, signal.SIGKILL)
    reaped(port)

    def no_fork() -> int:
        raise BlockingIOError("no process left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", no_fork)
        follow(port)
    before = port._header.probe_pid
    port._not_before = clock.NEVER
    follow(port)
    assert port._header.probe_pid != before


def test_a_first_fork_that_fails_ends_no_start_and_is_tried_again(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError("no process left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", no_fork)
        port.start(None)
    assert port._header.probe_pid == 0
    follow(port)
    assert port._header.probe_pid != 0


def test_nobody_is_forked_for_a_service_that_has_stopped(port: Port) -> None:
    port.start(None)
    before = port._header.probe_pid
    os.kill(before, signal.SIGKILL)
    reaped(port)
    follow(port, Phase.STOPPED)
    assert port._header.probe_pid == before


def test_a_retired_master_leaves_its_process_alone(port: Port) -> None:
    port.start(None)
    pid = port._header.probe_pid
    port._header.successor_pid, port._header.probe_accepts = 1, 0
    port.end()
    assert port._header.probe_pid == 0
    os.kill(pid, 0)
    port._kill(signal.SIGKILL)


def test_without_probe_bind_there_is_nothing() -> None:
    board = Board.create("probe-port", slots=1)
    made = ProbePort(SimpleNamespace(), board, Settings(), None)
    made.start(None)
    follow(made)
    made.look()
    made.reopen_logs()
    made.after_fork()
    made.end()
    assert made.inheritance == (-1, "")
    assert board.header.probe_pid == 0
    board.close()
