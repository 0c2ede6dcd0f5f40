"""Listeners across upgrades, in `fd` mode: what they are bound to, and a list of them that changes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.certificates import self_signed
from tests.helpers.ports import free_port
from tests.processes.harness import PATIENCE, Held, Service, ask_unix, successor, until


def bound_to(service: Service, *binds: str) -> Service:
    """Write a configuration with these binds; the first that is a port is the one that the harness asks."""
    service.bind = None
    service.configure(f"bind = {list(binds)!r}\n")
    ports = [int(bind.rpartition(":")[2]) for bind in binds if bind.rpartition(":")[2].isdigit()]
    service.port = service.port or (ports[0] if ports else 0)
    return service


def start(service: Service) -> Service:
    """Start a service that may have no TCP port for the harness to learn."""
    process = service.spawn()
    until("phase.serving", lambda: service.matches(r"event=phase\.serving") or process.poll() is not None, service)
    assert process.poll() is None, service.log()
    return service


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_binds_in_another_order_are_the_same_listeners(service: Service, tmp_path: Path):
    one, two, path = free_port(), free_port(), tmp_path / "app.sock"
    start(bound_to(service, f"127.0.0.1:{one}", f"unix:{path}", f"127.0.0.1:{two}"))
    with service.under_load(4):
        bound_to(service, f"127.0.0.1:{two}", f"127.0.0.1:{one}", f"unix:{path}")
        service.upgrade()
        assert ask_unix(path).generation == 2
        assert service.get().generation == 2
    service.port = two
    assert service.get().generation == 2
    assert not service.matches("event=listener")
    service.stop()
    assert not path.exists()


def test_a_bind_that_is_new_listens_when_the_new_generation_serves(service: Service, tmp_path: Path):
    one, two, path = free_port(), free_port(), tmp_path / "new.sock"
    start(bound_to(service, f"127.0.0.1:{one}"))
    bound_to(service, f"127.0.0.1:{one}", f"127.0.0.1:{two}", f"unix:{path}")
    early = f"import socket\nassert socket.socket().connect_ex(('127.0.0.1', {two})), 'early'"
    service.deploy("2", at_import=early)
    with service.under_load(4):
        service.upgrade()
    assert ask_unix(path).generation == 2
    service.port = two
    assert service.get().generation == 2
    assert len(service.matches("event=listener.added")) == 2
    service.stop()
    assert not path.exists()


def test_a_new_generation_that_fails_takes_its_new_binds_with_it(service: Service, tmp_path: Path):
    one, two, path = free_port(), free_port(), tmp_path / "new.sock"
    start(bound_to(service, f"127.0.0.1:{one}"))
    bound_to(service, f"127.0.0.1:{one}", f"127.0.0.1:{two}", f"unix:{path}")
    service.deploy("2", at_import="import no_such_module_here")
    with service.under_load(4):
        service.upgrade(expect="upgrade.failed")
    assert not path.exists()
    assert refuses(two)
    service.deploy("3")
    service.upgrade()
    assert ask_unix(path).version == "3"
    service.stop()


@pytest.mark.parametrize("listener", ["fd", "reuseport"])
def test_a_stop_in_the_commit_window_answers_who_waits_at_a_new_bind(make_service, listener: str):
    service = make_service("sync", workers=1)
    one, two = free_port(), free_port()
    service.bind = None
    service.port = one
    commit = """
import os
from zdd_web.gunicorn.upgrade import successor_process as upgrade
upgrade.Upgrade.committed = property(lambda self: os.path.exists("commit"))
"""
    start(service.configure(f"{commit}\nbind = '127.0.0.1:{one}'\n", listener=listener))
    service.configure(f"{commit}\nbind = ['127.0.0.1:{one}', '127.0.0.1:{two}']\n", listener=listener)
    service.signal(signal.SIGUSR2)
    service.wait_for("generation=2 event=phase.serving")
    service.port = two
    with Held(service) as held, ThreadPoolExecutor(6) as pool:
        waiting = [socket.create_connection(("127.0.0.1", two), PATIENCE) for _ in range(6)]
        for each in waiting:
            each.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM, pid=service.is_active().pid)
        service.wait_for("generation=2 event=phase.draining")
        assert held.is_answered()

        def status(client: socket.socket) -> bytes:
            with client:
                return client.recv(12)

        assert set(pool.map(status, waiting)) == {b"HTTP/1.1 200"}
    service.ends()


def test_a_new_bind_that_somebody_has_fails_the_upgrade_with_what_to_do(service: Service):
    start(bound_to(service, f"127.0.0.1:{free_port()}"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        theirs = f"127.0.0.1:{other.getsockname()[1]}"
        bound_to(service, f"127.0.0.1:{service.port}", theirs)
        line = service.upgrade(expect="upgrade.failed")
    assert f"bind = '{theirs}'" in line
    assert "address already in use" in line
    assert service.get().generation == 1
    service.stop()


def test_a_path_that_somebody_serves_is_not_taken_from_them(service: Service, tmp_path: Path):
    path = tmp_path / "theirs.sock"
    start(bound_to(service, f"127.0.0.1:{free_port()}"))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        bound_to(service, f"127.0.0.1:{service.port}", f"unix:{path}")
        assert "another process serves there" in service.upgrade(expect="upgrade.failed")
        assert path.exists()
    # Now it is stale.
    service.upgrade()
    assert ask_unix(path).generation == 2
    service.stop()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_bind_that_is_gone_finishes_what_waits_in_its_queue(
    make_service: Callable[..., Service], kind: str, tmp_path
):
    service = make_service("sync", workers=1)
    kept, path = free_port(), tmp_path / "old.sock"
    old = f"unix:{path}" if kind == "unix" else f"127.0.0.1:{free_port()}"
    start(bound_to(service, f"127.0.0.1:{kept}", old))
    held = Held(service, path) if kind == "unix" else Held(service)
    bound_to(service, f"127.0.0.1:{kept}")

    def ask() -> int:
        if kind == "unix":
            return ask_unix(path).generation
        connection = http.client.HTTPConnection("127.0.0.1", int(old.rpartition(":")[2]), timeout=PATIENCE)
        connection.request("GET", "/", headers={"Connection": "close"})
        return int(connection.getresponse().read().split()[1])

    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(ask) for _ in range(5)]
        until("a queue", lambda: kind == "unix" or service.snapshot().listeners[1].length == 5, service)
        service.signal(signal.SIGUSR2)
        service.wait_for("event=upgrade.committed")
        assert held.is_answered()
        assert [each.result() for each in waiting] == [1] * 5
    service.wait_for("event=listener.closed")
    assert not path.exists()
    service.until_one_generation()
    assert service.get().generation == 2
    service.stop()


def test_an_old_generation_that_must_serve_again_opens_what_was_dropped(make_service: Callable[..., Service]):
    service = make_service("gthread", workers=1)
    old, kept = free_port(), free_port()
    start(bound_to(service, f"127.0.0.1:{old}", f"127.0.0.1:{kept}"))
    first = service.pid
    with Held(service) as held:
        bound_to(service, f"127.0.0.1:{kept}")
        service.signal(signal.SIGUSR2)
        service.wait_for("event=listener.closed")
        second = until("the successor", lambda: service.pid != first and service.pid, service)
        os.kill(second, signal.SIGKILL)
        service.wait_for("event=successor.lost")
        until("an answer on the old port", lambda: not refuses(old), service)
        assert service.get().generation == 1
        assert held.is_answered()
    service.stop(status=None)


def test_what_cannot_be_bound_again_costs_the_rest_nothing(make_service: Callable[..., Service]):
    service = make_service("gthread", workers=1)
    kept, taken, free = free_port(), free_port(), free_port()
    start(bound_to(service, f"127.0.0.1:{kept}", f"127.0.0.1:{taken}", f"127.0.0.1:{free}"))
    held = Held(service)
    bound_to(service, f"127.0.0.1:{kept}")
    service.signal(signal.SIGUSR2)
    service.wait_for("event=listener.closed", times=2)
    with socket.create_server(("127.0.0.1", taken)):
        os.kill(successor(service), signal.SIGKILL)
        service.wait_for(f"event=listener.lost bind=127.0.0.1:{taken}")
        for port in (kept, free):
            service.port = port
            # A worker of the killed master may answer until it has seen that.
            until("an answer of generation 1", lambda: service.get().generation == 1, service)
    assert held.is_answered()
    service.stop(status=None)


def test_what_a_busy_worker_still_holds_is_taken_back_with_its_queue(make_service: Callable[..., Service]):
    service = make_service("sync", workers=1)
    old, kept = free_port(), free_port()
    # "Done" although it is busy.
    service.configure("import zdd_web.gunicorn.upgrade.coordinator as deploy\ndeploy.LAST_ACCEPTS_WITHIN = 0.0\n")
    start(bound_to(service, f"127.0.0.1:{kept}", f"127.0.0.1:{old}"))
    held = Held(service)
    with socket.create_connection(("127.0.0.1", old), PATIENCE) as waits:
        waits.sendall(b"GET / HTTP/1.0\r\n\r\n")
        bound_to(service, f"127.0.0.1:{kept}")
        service.signal(signal.SIGUSR2)
        until("done", lambda: service.generations()[0].snapshot().upgrades_done, service)
        os.kill(successor(service), signal.SIGKILL)
        service.wait_for("event=successor.lost")
        assert waits.recv(100).startswith(b"HTTP/1.0 200")
        assert held.is_answered()
    assert service.get().generation == 1
    service.port = old
    assert service.get().generation == 1
    assert not service.matches("internal.error|event=listener.lost")
    service.stop(status=None)


@pytest.mark.parametrize("how", ["cannot bind the next", "is stopped", "is stopped when it serves", "is lost"])
def test_the_path_of_a_new_bind_goes_with_its_generation(
    make_service: Callable[..., Service], tmp_path: Path, how: str
):
    service = make_service("gthread", workers=1)
    path, taken = tmp_path / "new.sock", tmp_path / "taken"
    start(bound_to(service, f"127.0.0.1:{free_port()}"))
    first, held = service.pid, Held(service)
    also = [f"unix:{taken}"] if how == "cannot bind the next" else []
    taken.touch()
    bound_to(service, f"127.0.0.1:{service.port}", f"unix:{path}", *also)
    if how == "is stopped":
        service.deploy("2", at_import="import time; time.sleep(600)")
    service.signal(signal.SIGUSR2)
    event = {"cannot bind the next": "upgrade.failed", "is lost": "upgrade.committed"}.get(how, "upgrade.started")
    service.wait_for(f"event={event}")
    if how == "is stopped when it serves":
        service.wait_for(r"generation=2 event=phase\.serving")
    elif how == "is stopped":
        # A moment after it has bound the path, the new master names it to the old one, and then forks.
        service.wait_for("Booting worker", times=2)
        assert path.exists()
    elif how == "is lost":
        os.kill(successor(service), signal.SIGKILL)
        service.wait_for("event=successor.lost")
    service.signal(signal.SIGTERM, first)
    assert held.is_answered()
    service.ends(None)
    assert not path.exists()


def test_another_spelling_is_the_same_listener(service: Service):
    port = free_port()
    start(bound_to(service, f"127.0.0.1:{port}"))
    bound_to(service, f"localhost:{port}")
    service.upgrade()
    assert service.get().generation == 2
    assert not service.matches("event=listener")
    service.stop()


def test_a_unix_socket_keeps_its_file_mode_and_owner(service: Service, tmp_path: Path):
    path = tmp_path / "app.sock"
    start(bound_to(service, f"unix:{path}"))
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, -1, 12345)
    before = path.stat()
    for generation in (2, 3):
        service.upgrade()
        assert ask_unix(path).generation == generation
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_gid) == (before.st_ino, before.st_mode, before.st_gid)
    assert stat.S_IMODE(after.st_mode) == 0o640
    service.stop()
    assert not path.exists()


@pytest.mark.parametrize("how", ["removed", "stale"])
def test_a_unix_socket_whose_file_is_gone_is_bound_again(service: Service, tmp_path: Path, how: str):
    path = tmp_path / "app.sock"
    start(bound_to(service, f"unix:{path}"))
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(path))
    path.unlink()
    if how == "stale":
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    service.signal(signal.SIGHUP)
    line = service.wait_for("event=refused signal=HUP")
    assert f"the file of a Unix socket is gone, or leads to another socket: {path}" in line
    assert "use an upgrade" in line
    # The second one finds two sockets of this bind, of which one is reached.
    for generation in (2, 3, 4):
        service.upgrade()
        assert ask_unix(path).generation == generation
        service.wait_for(rf"generation={generation - 1} event=phase\.stopped")
        assert ask_unix(path).generation == generation
    assert len(service.snapshot().listeners) == 1
    waiting.close()
    assert len(service.matches("event=listener.rebound")) == 1
    assert not service.matches("event=listener.dropped")
    service.stop()
    assert not path.exists()


def test_a_unix_socket_in_whose_place_another_serves_fails_the_upgrade_and_stays(service: Service, tmp_path: Path):
    path = tmp_path / "app.sock"
    start(bound_to(service, f"unix:{path}"))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        service.deploy("2")
        assert "another process serves there" in service.upgrade(expect="upgrade.failed")
        service.stop()
        assert path.exists()


def test_an_abstract_unix_socket_is_handed_over(service: Service):
    name = f"\0{service.name}"
    start(bound_to(service, f"unix:{name}"))
    service.upgrade()
    assert ask_unix(name).generation == 2
    assert service.snapshot().listeners[0].name == f"unix:@{service.name}"
    service.stop()
    assert not service.matches("Traceback|internal.error")


@pytest.mark.parametrize(("host", "asks"), [("[::1]", ["::1"]), ("[::]", ["::1", "127.0.0.1"])])
def test_ipv6_and_both_at_once(service: Service, host: str, asks: list[str]):
    port = free_port("::1")
    start(bound_to(service, f"{host}:{port}"))
    service.upgrade()
    for each in asks:
        connection = http.client.HTTPConnection(each, port, timeout=PATIENCE)
        connection.request("GET", "/")
        assert connection.getresponse().read().split()[1] == b"2"
        connection.close()
    service.stop()


def test_tls_is_handed_over(service: Service, tmp_path: Path):
    signed = self_signed(tmp_path)
    certificate = signed.certificate
    service.arguments = ["--certfile", str(certificate), "--keyfile", str(signed.key)]
    start(bound_to(service, f"127.0.0.1:{free_port()}"))
    context = ssl.create_default_context(cafile=str(certificate))

    def ask() -> str:
        raw = socket.create_connection(("127.0.0.1", service.port), PATIENCE)
        with context.wrap_socket(raw, server_hostname="localhost") as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.read().decode().split()[1]

    assert ask() == "1"
    service.upgrade()
    assert ask() == "2"
    # gunicorn reads it for each connection: no client is to be the first who finds out that it is gone.
    elsewhere = certificate.rename(tmp_path / "elsewhere.pem")
    assert f"certfile = '{certificate}'" in service.upgrade(expect="upgrade.failed")
    elsewhere.rename(certificate)
    assert ask() == "2"
    service.stop()


def test_a_mode_cannot_change_in_an_upgrade(service: Service):
    service.start()
    service.configure(listener="reuseport")
    line = service.upgrade(expect="upgrade.failed")
    assert "LISTENER is 'reuseport' in the new configuration and 'fd' in the running one" in line
    service.stop()


def refused(service: Service, process: subprocess.Popen[bytes] | None = None) -> str:
    """Start a service that cannot start, if it was not; return the line that says why."""
    process = process or service.spawn()
    until("the end", lambda: process.poll() is not None, service)
    assert process.returncode == 1, service.log()
    assert "Traceback" not in service.log()
    assert not service.pid_file.exists()
    return service.matches("event=settings.invalid")[0]


def test_a_second_start_takes_no_path_from_the_first(make_service: Callable[..., Service], tmp_path: Path):
    path = tmp_path / "app.sock"
    first = start(bound_to(make_service("sync"), f"unix:{path}"))
    made = path.stat()
    assert "another process serves there" in refused(bound_to(make_service("sync"), f"unix:{path}"))
    assert (path.stat().st_ino, path.stat().st_ctime_ns) == (made.st_ino, made.st_ctime_ns)
    assert ask_unix(path).generation == 1
    first.signal(signal.SIGKILL)
    first.ends(-signal.SIGKILL)
    # Now it is stale.
    second = start(bound_to(make_service("sync"), f"unix:{path}"))
    assert ask_unix(path).generation == 1
    second.stop()


def test_what_cannot_be_bound_at_a_start_is_named_with_what_to_do(make_service: Callable[..., Service], tmp_path: Path):
    (tmp_path / "file").write_text("no socket")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        scenes = [
            (taken, {}, "`ss -ltnp` shows which"),
            (taken, {"takeover": True}, "has found no master to take it from"),
            ("127.0.0.1:99999", {}, "choose one from 1 to 65535"),
            ("127.0.0.1:99999", {"listener": "reuseport"}, "choose one from 1 to 65535"),
            (f"unix:{tmp_path}/file", {}, "this is not a socket"),
            (f"unix:{tmp_path}/missing/a", {}, "make the directory first"),
        ]
        services = [make_service("sync").configure(f"bind = {bind!r}\n", **more) for bind, more, _ in scenes]
        for service in services:
            service.bind = None
        # Side by side: gunicorn tries each for five seconds.
        processes = [service.spawn() for service in services]
        for (bind, _, remedy), service, process in zip(scenes, services, processes, strict=True):
            line = refused(service, process)
            assert remedy in line
            assert f"bind = '{bind}'" in line
