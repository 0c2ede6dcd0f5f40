"""gunicorn.sock, gunicorn.pidfile, gunicorn.app.base and gunicorn.util."""

from __future__ import annotations

import gc
import inspect
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn import sock, util
from gunicorn.app.base import Application
from gunicorn.config import Config
from gunicorn.pidfile import Pidfile
from gunicorn.workers.workertmp import WorkerTmp

from tests.contract.stock import Calls, Checked, Os, in_order

LOG = SimpleNamespace(**dict.fromkeys(("debug", "info", "error", "warning"), lambda *arguments: None))


def a_config(**settings: Any) -> Config:
    cfg = Config()
    for name, value in settings.items():
        cfg.set(name, value)
    return cfg


# -- sockets


@pytest.mark.parametrize("name", ["certfile", "keyfile"])
def test_create_sockets_looks_for_certificates(name: str) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        sock.create_sockets(a_config(bind="127.0.0.1:0", **{name: "/nowhere/x.pem"}), LOG)


def test_constructor_of_a_socket_listens_and_makes_it_inheritable() -> None:
    listener = sock.TCPSocket(("127.0.0.1", 0), a_config(), LOG)
    assert listener.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert listener.sock.get_inheritable()
    assert not listener.sock.getblocking()
    # All of its attributes that a socket is given which was made in another way.
    assert vars(listener).keys() == {"log", "conf", "cfg_addr", "sock"}
    listener.close()
    assert listener.sock is None
    listener.close()


def test_constructor_listens_on_a_socket_that_was_only_bound() -> None:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    listener = sock.TCPSocket(bound.getsockname(), a_config(), LOG, fd=bound.detach())
    assert listener.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    listener.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_create_sockets_adopts_the_number_of_a_bind_too() -> None:
    numbers = [socket.create_server(("127.0.0.1", 0)).detach() for _ in range(2)]
    # The numbers of `bind` and those that are passed are one list: a successor would adopt the same socket twice.
    listeners = sock.create_sockets(a_config(bind=f"fd://{numbers[0]}"), LOG, numbers[1:])
    assert len(listeners) == 2
    sock.close_sockets(listeners)
    # gunicorn leaves the objects by which it has looked at them.
    gc.collect()


def test_type_of_a_socket_goes_by_its_address() -> None:
    assert sock._sock_type(("127.0.0.1", 80)) is sock.TCPSocket
    assert sock._sock_type(("::1", 80)) is sock.TCP6Socket
    assert sock._sock_type("/run/x.sock") is sock.UnixSocket
    assert sock._sock_type("\0x") is sock.UnixSocket


def test_unix_socket_removes_the_file_that_is_there(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    serving = socket.socket(socket.AF_UNIX)
    serving.bind(path)
    serving.listen()
    before = os.stat(path).st_ino
    listener = sock.UnixSocket(path, a_config(), LOG)
    assert os.path.exists(path)
    assert os.stat(path).st_ino != before or serving.getsockname() == path
    listener.close()
    serving.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_create_sockets_tries_five_times_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    slept: list[float] = []
    monkeypatch.setattr(sock.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as end:
        sock.create_sockets(a_config(bind=f"127.0.0.1:{taken.getsockname()[1]}"), LOG)
    assert end.value.code == 1
    assert len(slept) == 5
    taken.close()
    del end
    gc.collect()


def test_asking_a_listener_for_its_name_asks_its_socket() -> None:
    listener = sock.TCPSocket(("127.0.0.1", 0), a_config(), LOG)
    listener.close()
    with pytest.raises(AttributeError):
        listener.getsockname()


# -- the pid file


def test_pid_file_is_renamed_by_removing_it_first() -> None:
    assert in_order(Pidfile.rename, "self.unlink()", "self.create(")


def test_pid_file_of_any_process_that_exists_stops_a_start(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{os.getppid()}\n")
    with pytest.raises(RuntimeError, match="Already running"):
        Pidfile(str(path)).create(os.getpid())


# -- the app


def test_check_config_loads_the_app_and_calls_no_hook() -> None:
    calls: list[str] = []
    app = Checked(calls, check_config=True)
    app.cfg.set("on_starting", lambda server: calls.append("on_starting"))
    app.cfg.set("nworkers_changed", lambda server, new, old: calls.append("nworkers_changed"))
    with pytest.raises(SystemExit) as end:
        app.run()
    assert end.value.code == 0
    assert calls == ["load"]


def test_configuration_file_that_raises_ends_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gunicorn.conf.py"
    path.write_text("raise RuntimeError('in the file')\n")
    with pytest.raises(SystemExit) as end:
        Application.get_config_from_filename(Checked([]), str(path))
    assert end.value.code == 1
    assert "in the file" in capsys.readouterr().err
    sys.modules.pop("__config__", None)


def test_app_is_loaded_once_and_kept_as_callable() -> None:
    calls: list[str] = []
    app = Checked(calls)
    app.wsgi()
    app.wsgi()
    assert calls == ["load"]
    app.callable = None
    app.wsgi()
    assert calls == ["load", "load"]


# -- util


def test_daemon_does_not_detach_where_gunicorn_fd_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(util, "os", Os(fork=calls.noting("fork", OSError()), umask=lambda mask: 0))
    monkeypatch.setenv("GUNICORN_FD", "5")
    util.daemonize(enable_stdio_inheritance=True)
    assert calls == []


def test_graceful_close_waits_for_two_seconds() -> None:
    if not hasattr(util, "close_graceful"):
        pytest.skip("this gunicorn closes at once")
    assert inspect.signature(util.close_graceful).parameters["timeout"].default == 2.0
    server, client = socket.socketpair()
    began = time.monotonic()
    util.close_graceful(server, timeout=0.2)
    assert time.monotonic() - began >= 0.2
    client.close()


def test_change_of_the_user_takes_these_arguments() -> None:
    assert [*inspect.signature(util.set_owner_process).parameters] == ["uid", "gid", "initgroups"]
    assert [*inspect.signature(util._setproctitle).parameters] == ["title"]


# -- the heartbeat


def test_new_heartbeat_is_ahead_of_the_monotonic_clock() -> None:
    tmp = WorkerTmp(a_config())
    # Wall-clock time until the first beat, and time since boot from then on.
    assert abs(tmp.last_update() - time.time()) < 60
    tmp.notify()
    assert abs(tmp.last_update() - time.monotonic()) < 60
    tmp.close()
