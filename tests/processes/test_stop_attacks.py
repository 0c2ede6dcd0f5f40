"""Attacks on the promises of a stop: sockets that others hold, work that nobody names, ends that do not come."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes.harness import APP, Service, answered_from, ask_unix, connections, successor, until
from tests.processes.test_stop import may_close_the_door
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.lifecycle import Phase

NEEDS_NET_ADMIN = pytest.mark.skipif(not may_close_the_door(), reason="needs CAP_NET_ADMIN, to have it or to drop it")
WITHOUT_NET_ADMIN = ["setpriv", "--bounding-set=-net_admin", "--"]


def knock(address: object, family: int = socket.AF_INET, patience: float = 2.0) -> str:
    """Connect and ask for `/`; tell what became of it."""
    with socket.socket(family) as client:
        client.settimeout(patience)
        try:
            client.connect(address)
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "no handshake"
        try:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return "answered" if client.recv(4096) else "closed"
        except TimeoutError:
            return "left in the queue"
        except ConnectionError:
            return "reset"


def refused_soon(service: Service, patience: float = 5.0) -> None:
    """Wait until a new connection is refused; fail with what happens to it instead."""
    seen: list[str] = []

    def refused() -> bool:
        seen.append(knock(("127.0.0.1", service.port)))
        return seen[-1] == "refused"

    try:
        until("a refusal", refused, patience=patience)
    except AssertionError:
        raise AssertionError(f"a new connection was never refused: {seen}\n{service.log()}") from None


@contextlib.contextmanager
def held(service: Service, name: str, generation: int) -> Iterator[None]:
    """Keep a request in hand meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, f"/hold?{name}")
        mark = service.directory / f"{name}.held-by-{generation}"
        until("the request", mark.exists, service)
        try:
            yield
        finally:
            (service.directory / name).touch()
            with contextlib.suppress(OSError):
                reply.result()


def upgraded(service: Service) -> None:
    """Upgrade, and wait until nobody of the old generation accepts any more."""
    old = service.is_active()
    service.signal(signal.SIGUSR2)
    header = old.board.header
    until("the last accepts", lambda: header.upgrades_done or header.upgrades_failed, service)
    assert header.upgrades_done, service.log()


# -- the port, while the last requests are finished


@pytest.mark.parametrize(
    "worker_class",
    [
        "sync",
        "gthread",
    ],
)
def test_a_stop_refuses_new_connections_while_a_worker_is_busy(service: Service):
    service.configure(grace_period=30).start()
    with held(service, "busy", 1):
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.draining")
        refused_soon(service)
    service.ends()


@NEEDS_NET_ADMIN
@pytest.mark.parametrize(
    "worker_class",
    [
        "sync",
        "gthread",
    ],
)
def test_without_the_privilege_a_stop_refuses_new_connections_while_a_worker_is_busy(service: Service):
    service.launcher = [*WITHOUT_NET_ADMIN, *service.launcher]
    service.configure(grace_period=30).start()
    with held(service, "busy", 1):
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.draining")
        refused_soon(service)
    service.ends()


def test_a_stop_while_a_predecessor_retires_refuses_new_connections(service: Service):
    service.configure(grace_period=30).start()
    with held(service, "old", 1):
        upgraded(service)
        with held(service, "new", 2):
            os.kill(successor(service), signal.SIGTERM)
            service.wait_for("generation=2 event=phase.draining")
            refused_soon(service)
    service.ends()


def test_a_stop_right_after_the_handover_is_the_whole_service_s(make_service):
    # The new master may not have read yet that it is the service; whoever sends the signal has seen it.
    for count in range(4):
        service = make_service(grace_period=30).start()
        with held(service, f"old{count}", 1):
            header = service.is_active().board.header
            service.signal(signal.SIGUSR2)
            new = successor(service)
            give_up = time.monotonic() + 30
            while header.phase != Phase.RETIRING and time.monotonic() < give_up:
                time.sleep(0.0001)
            os.kill(new, signal.SIGTERM)
            until("the predecessor's deadline", lambda header=header: header.deadline, service)
        service.ends()


@pytest.mark.parametrize(
    "worker_class",
    [
        "sync",
        "gthread",
    ],
)
def test_a_predecessor_that_outlives_its_stopped_successor_holds_no_port(service: Service):
    service.configure(grace_period=30).start()
    with held(service, "old", 1):
        upgraded(service)
        os.kill(successor(service), signal.SIGTERM)
        service.wait_for("generation=2 event=phase.stopped")
        refused_soon(service)
    service.ends()


def test_a_stop_in_the_commit_window_refuses_new_connections(make_service):
    service = make_service("gthread")
    service.configure(grace_period=30).start()
    first = service.pid
    os.kill(first, signal.SIGUSR2)
    service.wait_for("generation=2 event=phase.serving")
    os.kill(first, signal.SIGTERM)
    service.wait_for("event=upgrade.cancelled")
    service.ends(status=None)
    assert knock(("127.0.0.1", service.port)) == "refused"


# -- a socket that somebody else holds


def start_with(service: Service, listener: socket.socket, **variables: str) -> None:
    """Start the service with a socket of somebody else's as its descriptor 3, as systemd does."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ.update(LISTEN_PID=str(os.getpid())) if 'LISTEN_FDS' in os.environ else None; "
        "os.execvp(sys.argv[2], sys.argv[2:])"
    )
    service.launcher = [sys.executable, "-c", code, str(listener.fileno()), *service.launcher]
    environ = {**os.environ, "ZDD_TEST_MARKER": service.marker, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    environ.pop("PWD", None)
    with service.log_file.open("ab") as log:
        service.process = subprocess.Popen(
            service.command(), cwd=service.directory, env=environ, pass_fds=[listener.fileno()], stdout=log, stderr=log
        )
    process = service.process
    until("phase.serving", lambda: service.matches(r"event=phase\.serving") or process.poll() is not None, service)
    assert process.poll() is None, service.log()
    service.port = listener.getsockname()[1]


def still_lets_in(listener: socket.socket, count: int = 5) -> bool:
    """Tell whether so many can connect at once."""
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(count):
                stack.enter_context(socket.create_connection(listener.getsockname(), timeout=3))
        except TimeoutError:
            return False
    return True


@pytest.mark.parametrize(
    ("how", "generation"),
    [
        ("systemd", 1),
        ("systemd", 2),
        ("fd", 1),
        ("fd", 2),
    ],
)
@pytest.mark.parametrize("launcher", ["with", pytest.param("without", marks=NEEDS_NET_ADMIN)])
def test_a_socket_that_somebody_else_holds_is_as_good_as_before(make_service, launcher, generation, how):
    service = make_service("gthread")
    if launcher == "without":
        service.launcher = [*WITHOUT_NET_ADMIN, *service.launcher]
    service.bind = "fd://3" if how == "fd" else None
    service.configure()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        start_with(service, listener, **({"LISTEN_FDS": "1"} if how == "systemd" else {}))
        if generation == 2:
            upgraded(service)
            service.until_one_generation()
        service.stop(status=None)
        assert still_lets_in(listener), service.log()


@pytest.mark.parametrize("launcher", ["with", pytest.param("without", marks=NEEDS_NET_ADMIN)])
def test_nor_is_it_shut_when_an_upgrade_does_not_want_it_any_more(make_service, tmp_path, launcher):
    service = make_service("gthread")
    if launcher == "without":
        service.launcher = [*WITHOUT_NET_ADMIN, *service.launcher]
    theirs = tmp_path / "theirs.sock"
    service.bind = None
    service.configure("bind = ['127.0.0.1:0', 'fd://3']\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(theirs))
        listener.listen(64)
        start_with(service, listener)
        service.learn_port()
        service.configure("bind = ['127.0.0.1:0']\n")
        service.upgrade()
        service.until_one_generation()
        assert theirs.exists()
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(theirs))
    service.stop()


@pytest.mark.parametrize("generation", [1, 2])
def test_what_is_ours_beside_it_is_shut_and_its_path_removed(make_service, tmp_path, generation):
    service = make_service("gthread", workers=1)
    ours = tmp_path / "ours.sock"
    service.bind = None
    service.configure(f"bind = ['fd://3', 'unix:{ours}']\n")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        start_with(service, listener)
        if generation == 2:
            upgraded(service)
            service.until_one_generation()
        assert ask_unix(ours).generation == generation
        service.stop(status=None)
        assert not ours.exists()
        assert still_lets_in(listener), service.log()


@pytest.mark.parametrize(
    "worker_class",
    [
        "sync",
        "gthread",
    ],
)
def test_a_stop_under_load_ends_before_its_deadline_where_somebody_else_holds_the_socket(service: Service):
    service.bind = "fd://3"
    service.workers = 1
    service.configure(grace_period=20)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        start_with(service, listener)
        load = LoadThread(Load("127.0.0.1", service.port, ("/slow?seconds=0.02",), 40, 0.5, 0.02, 20.0))
        with load:
            answered_from(load, 100)
            service.signal(signal.SIGTERM)
            service.ends(patience=8)


@NEEDS_NET_ADMIN
def test_a_rollback_to_a_plain_gunicorn_leaves_it_its_port(make_service):
    """The first release with zdd_web is brought by SIGUSR2 to a gunicorn without, and taken back by SIGTERM."""
    service = make_service("gthread")
    conf = service.directory / "gunicorn.conf.py"
    conf.write_text("")
    old = service.spawn()
    service.wait_for("Booting worker", times=2)
    service.learn_port()
    until("an answer", lambda: service.get().status == 200, service)
    service.configure()
    os.kill(old.pid, signal.SIGUSR2)
    service.wait_for(r"event=phase\.serving")
    service.signal(signal.SIGTERM)
    service.wait_for(r"event=phase\.stopped")
    until("the old ones alone", lambda: len(service.processes()) == 3, service)
    assert [knock(("127.0.0.1", service.port)) for _ in range(3)] == ["answered"] * 3, service.log()


# -- the end, in time and with its reason


@pytest.mark.parametrize("place", ["directory", "pipe", "full", "missing"])
def test_a_termination_log_that_cannot_be_written_does_not_hold_the_end_up(make_service, place: str):
    service = make_service("gthread")
    path = service.directory / "message"
    if place == "directory":
        path.mkdir()
    elif place == "pipe":
        os.mkfifo(path)
    service.configure(grace_period=2, abandon_status=77, termination_log="/dev/full" if place == "full" else str(path))
    service.start()
    service.get("/job?seconds=600")
    service.signal(signal.SIGTERM)
    service.ends(status=77, patience=10)


def test_an_abandon_status_of_zero_still_leaves_the_message(make_service):
    service = make_service("gthread")
    message = service.directory / "message"
    message.touch()
    service.configure(grace_period=2, abandon_status=0, termination_log=str(message)).start()
    service.get("/job?seconds=600")
    service.stop(status=0)
    assert "1 background tasks were abandoned" in message.read_text()
    assert service.matches("event=drain.abandoned")


def handed_back(extra: str = "") -> str:
    return (
        APP.replace('name="job")', 'name="job", on_abandon=hand_back)')
        + """
    def hand_back(entry):
        """
        + extra
        + """
        print("handed back", file=sys.stderr, flush=True)
"""
    )


@pytest.mark.parametrize(
    ("worker_class", "grace_period"),
    [
        ("sync", 2),
        ("sync", 10),
        ("gthread", 2),
        ("gthread", 10),
    ],
)
def test_work_is_named_and_handed_back_beside_a_request_that_does_not_end(service: Service, grace_period: int):
    service.workers = 1
    service.write_app(handed_back())
    service.configure(grace_period=grace_period).start()
    service.get("/job?seconds=600")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(service.get, "/slow?seconds=600")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.stop(status=1)
    assert service.matches("event=background.abandoned .*name=job"), service.log()
    assert service.matches("handed back"), service.log()


def test_on_abandon_has_half_a_second(make_service):
    """The margin is two seconds; the lame duck makes the test short."""
    service = make_service("gthread")
    service.write_app(handed_back("time.sleep(0.5)"))
    service.configure(grace_period=20, drain_delay=17).start()
    service.get("/job?seconds=600")
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    service.stop(status=1)
    assert service.matches("handed back"), service.log()


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_an_on_abandon_that_ends_the_process_does_not_make_the_stop_a_success(service: Service, end: str):
    service.write_app(handed_back(end))
    service.configure(grace_period=2).start()
    service.get("/job?seconds=600")
    service.stop(status=1)
    assert service.matches("event=drain.abandoned .*tasks=1")


def test_work_of_a_worker_that_is_killed_while_it_drains_is_not_forgotten(service: Service):
    service.workers = 1
    service.configure(grace_period=20).start()
    worker = service.get("/job?seconds=600").pid
    service.signal(signal.SIGTERM)
    service.wait_for("event=background.waiting")
    os.kill(worker, signal.SIGKILL)
    service.ends(status=1)
    assert service.matches("event=drain.abandoned .*tasks=1")


def test_a_hook_that_hangs_or_ends_the_process_does_not_hold_the_end_up(service: Service):
    service.write_app(
        APP
        + """
    @zdd_web.on_drained(timeout=0.2)
    def first():
        print("first hook", file=sys.stderr, flush=True)
        os._exit(0)

    @zdd_web.on_drained(timeout=0.2)
    def second():
        raise SystemExit(9)

    @zdd_web.on_drained(timeout=0.2)
    def third():
        time.sleep(600)
    """
    )
    service.configure(grace_period=10).start()
    service.stop(status=0)
    assert service.log().count("first hook") == service.workers
    assert len(service.matches("event=background.failed hook=on_drained name=third")) == service.workers
    assert len(service.matches("event=background.failed hook=on_drained name=second")) == service.workers


CHILDREN = """
    import subprocess

    def job(seconds):
        while not os.path.exists("go"):
            time.sleep(0.02)
        child = subprocess.Popen(["sleep", "600"])
        child.terminate()
        try:
            print("child ended", child.wait(3), file=sys.stderr, flush=True)
        except subprocess.TimeoutExpired:
            child.kill()
            print("child ignored SIGTERM", file=sys.stderr, flush=True)
"""


def test_a_child_that_work_starts_during_the_drain_hears_sigterm(service: Service):
    service.write_app(APP + CHILDREN)
    service.configure(grace_period=20).start()
    service.get("/job")
    service.signal(signal.SIGTERM)
    service.wait_for("event=background.waiting")
    (service.directory / "go").touch()
    assert "child ended -15" in service.wait_for("child (?:ended|ignored)")
    service.ends()


def test_work_that_begins_more_work_while_draining_is_finished_or_named(service: Service):
    service.write_app(
        APP
        + """
    def job(left):
        while not os.path.exists("go"):
            time.sleep(0.02)
        if left:
            zdd_web.background.go(job, left - 1, name="job")
        else:
            print("the last one", file=sys.stderr, flush=True)
    """
    )
    service.configure(grace_period=20).start()
    service.get("/job?seconds=50")
    service.signal(signal.SIGTERM)
    service.wait_for("event=background.waiting")
    (service.directory / "go").touch()
    service.ends()
    assert service.matches("the last one")


def test_work_that_holds_the_interpreter_at_the_deadline_does_not_outlive_it(service: Service):
    # Deep in C with the lock held: no thread of Python's can name it, so the master counts it.
    service.write_app(APP + "    def job(seconds):\n        sum(range(10**12))\n")
    service.configure(grace_period=3).start()
    with contextlib.suppress(OSError):
        service.get("/job", timeout=1)
    service.stop(status=1)
    assert service.matches("event=drain.abandoned .*tasks=1")


# -- clients


@pytest.mark.parametrize(
    "worker_class",
    [
        "sync",
        "gthread",
    ],
)
def test_a_client_that_says_nothing_does_not_make_the_stop_a_failure(service: Service):
    service.workers = 1
    service.configure(grace_period=6).start()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        until("the connection", lambda: client.getpeername() and _taken(service), service)
        service.signal(signal.SIGTERM)
        service.ends(status=0)


def _taken(service: Service) -> bool:
    """Whether the worker holds a connection."""
    (worker,) = service.snapshot().workers
    return bool(connections(worker.pid))


def test_a_request_whose_head_was_half_there_is_answered(service: Service):
    service.workers = 1
    service.configure(grace_period=20).start()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHo")
        until("the connection", lambda: _taken(service), service)
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.draining")
        # Longer than an idle connection is kept.
        with contextlib.suppress(AssertionError):
            until("nothing", lambda: None, patience=3)
        client.sendall(b"st: x\r\n\r\n")
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    service.ends()


def test_probes_are_no_late_requests(service: Service):
    # A kubelet and a load balancer ask as long as the process is there, however long the lame duck is.
    service.configure(drain_delay=2, grace_period=10).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    while service.matches("event=phase.draining") == []:
        with contextlib.suppress(OSError):
            service.get("/readyz", timeout=5)
    service.ends()
    line = service.wait_for(r"event=phase\.stopped")
    assert " late=" not in line and "remedy=" not in line


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_several_binds_are_drained_and_closed_together(service: Service, tmp_path: Path):
    first, second = tmp_path / "first.sock", tmp_path / "second.sock"
    inside = "[::1]:0" if has_ipv6() else "127.0.0.2:0"
    service.arguments = ["--bind", inside, "--bind", f"unix:{first}", "--bind", f"unix:{second}"]
    service.configure(drain_delay=2, grace_period=20).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    client = socket.socket(socket.AF_UNIX)
    with client:
        # A peer with a name that is no UTF-8.
        client.bind(os.fsencode(tmp_path) + b"/\xff client\n")
        client.connect(str(second))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    service.ends()
    assert knock(("127.0.0.1", service.port)) == "refused"
    assert not first.exists() and not second.exists()
    assert service.matches(r"event=phase\.stopped .*late=1 late_by=[\d.]+ late_peer=\S")


def test_a_unix_socket_whose_neighbour_was_removed_is_removed_too(make_service, tmp_path: Path):
    service = make_service("gthread")
    first, second = tmp_path / "first.sock", tmp_path / "second.sock"
    service.arguments = ["--bind", f"unix:{first}", "--bind", f"unix:{second}"]
    service.configure().start()
    first.unlink()
    service.stop()
    assert not second.exists()
