"""gevent, asgi and uvicorn: what test_stop, test_upgrade and test_workers show of sync and gthread."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes.harness import (
    APP,
    LEAVES_BY,
    PATIENCE,
    WORKER_CLASSES,
    Service,
    answered_from,
    generations_of,
    lost,
    outlives,
    serving_workers,
    settled,
    skip_unless_installed,
    until,
)
from zdd_web.board import WorkerState
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Outcome
from zdd_web.listeners.accept_queue import Admission, block_new_connections

#: As the harness's app. `/block` keeps the loop itself from turning; `/task` is background work in the loop.
ASGI_APP = """
    import asyncio, os, signal, sys, time
    import zdd_web

    VERSION = "1"
    HELD = set()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["type"] == "websocket":
            return await websocket(receive, send)
        path, query = scope["path"], scope["query_string"].decode()
        seconds = float(query.partition("=")[2] or 0)
        if path == "/slow":
            await asyncio.sleep(seconds)
        elif path == "/block":
            time.sleep(seconds)
        elif path == "/job":
            zdd_web.background.go(job, seconds, name="job")
        elif path == "/task":
            HELD.add(asyncio.create_task(task(seconds)))
            await asyncio.sleep(0)
        elif path == "/upload":
            while (await receive()).get("more_body"):
                pass
        body = f"{VERSION} {zdd_web.generation()} {os.getpid()}".encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def lifespan(receive, send):
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                print("startup begins", file=sys.stderr, flush=True)
                STARTUP
                await send({"type": "lifespan.startup.complete"})
            else:
                print("shutdown", file=sys.stderr, flush=True)
                return await send({"type": "lifespan.shutdown.complete"})

    async def websocket(receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    def job(seconds):
        time.sleep(seconds)
        print("job finished", file=sys.stderr, flush=True)

    async def task(seconds):
        with zdd_web.background.track("job"):
            await asyncio.sleep(seconds)
            print("job finished", file=sys.stderr, flush=True)
"""

UVICORN = WORKER_CLASSES[4]
LOOPS = WORKER_CLASSES[3:]


@pytest.fixture(params=WORKER_CLASSES[2:])
def worker_class(request: pytest.FixtureRequest) -> str:
    return skip_unless_installed(request.param)


@pytest.fixture
def service(make_service: Callable[..., Service], worker_class: str) -> Service:
    service = make_service(worker_class, generation_header="X-Zdd-Generation")
    deploy(service, "1")
    return service


def deploy(service: Service, version: str, *, startup: str = "pass", at_import: str = "") -> None:
    """Put code on disk; `startup` runs in the lifespan's start-up, where there is one, else when it is imported."""
    gevent = service.worker_class == "gevent"
    if gevent and startup != "pass":
        at_import = startup.replace("await asyncio.sleep", "__import__('time').sleep")
    text = APP if gevent else ASGI_APP.replace("STARTUP", startup)
    text = textwrap.dedent(text).replace('VERSION = "1"', f'VERSION = "{version}"\n{at_import}\n')
    (service.directory / "app.py").write_text(text)


@contextlib.contextmanager
def under_load(service: Service, clients: int = 12) -> Iterator[LoadThread]:
    """As `Service.under_load()`, and says how much it was."""
    with service.under_load(clients, may_lose=True) as load:
        yield load
    print(f"{service.worker_class}: {len(load.samples)} requests, {len(lost(load))} lost")
    assert lost(load) == [], service.log()


def connect(service: Service) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", service.port), PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


def ask(connection: socket.socket, path: str = "/") -> str:
    """Send a request on a connection that is kept, and return its reply."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    reply = b""
    while b"\r\n\r\n" not in reply or len(reply.partition(b"\r\n\r\n")[2]) < length_of(reply):
        data = connection.recv(65536)
        assert data, f"cut: {reply!r}"
        reply += data
    return reply.decode()


def length_of(reply: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", reply, re.IGNORECASE)
    return int(found[1]) if found else 0


def states(service: Service) -> list[str]:
    return sorted(worker.state.label for worker in service.generations()[0].snapshot().workers)


# -- the gate


def test_nobody_is_served_before_all_are_ready_and_those_who_wait_beat(service: Service):
    service.arguments = ["--timeout", "2"]
    once = "os.open('first', os.O_CREAT | os.O_EXCL)"
    deploy(
        service,
        "1",
        startup=f"""
                try:
                    {once}
                except FileExistsError:
                    while not os.path.exists("go"):
                        await asyncio.sleep(0.05)
        """.strip().replace("\n                ", "\n" if service.worker_class == "gevent" else "\n                "),
    )
    service.spawn()
    until("one at the gate", lambda: service.generations() and states(service) == ["booting", "ready"], service)
    service.learn_port()
    with connect(service) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        # Longer than gunicorn waits for a heartbeat.
        since = time.monotonic()
        until("time", lambda: time.monotonic() - since > 4)
        assert states(service) == ["booting", "ready"], service.log()
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(PATIENCE)
        (service.directory / "go").touch()
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert not service.matches("WORKER TIMEOUT")
    service.stop()


@pytest.mark.parametrize("worker_class", LOOPS, indirect=True)
def test_a_failed_lifespan_ends_the_start_and_refuses_an_upgrade(service: Service):
    failing = "return await send({'type': 'lifespan.startup.failed', 'message': 'no database'})"
    deploy(service, "1", startup=failing)
    process = service.spawn()
    assert process.wait(PATIENCE) == 3, service.log()
    service.log_file.unlink()
    deploy(service, "1")
    service.start()
    deploy(service, "2", startup=failing)
    assert "no database" in service.upgrade(expect="upgrade.failed")
    assert service.get().version == "1"
    service.stop()


@pytest.mark.parametrize("worker_class", LOOPS, indirect=True)
def test_warm_up_asks_an_asgi_app(service: Service):
    service.configure(warmup=["/slow?seconds=0"]).start()
    service.stop()
    service.log_file.unlink()
    deploy(service, "1", at_import="raised = True")
    text = (service.directory / "app.py").read_text()
    (service.directory / "app.py").write_text(text.replace('if path == "/slow":', 'if path == "/slow":\n        1 / 0'))
    assert service.spawn().wait(PATIENCE) == 3, service.log()
    assert "ZeroDivisionError" in service.wait_for("event=boot.failed")


# -- the way out


def test_requests_in_hand_are_answered_and_say_that_they_are_the_last(service: Service):
    service.start()
    with ThreadPoolExecutor(1) as pool, connect(service) as kept:
        assert "connection: close" not in ask(kept).lower()
        reply = pool.submit(service.get, "/slow?seconds=1.5")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.draining")
        # On a kept connection, before anybody could know.
        assert "connection: close" in ask(kept).lower()
        assert kept.recv(1) == b""
        assert reply.result().status == 200
        assert {name.lower(): value for name, value in reply.result().headers.items()}["connection"] == "close"
    service.ends()
    assert not service.is_open()
    assert not service.matches("Exception|Traceback|graceful timeout|Forcing close")
    assert service.worker_class == "gevent" or service.log().splitlines().count("shutdown") == 2


def test_a_leaving_worker_says_so_when_it_accepts_no_more(service: Service):
    service.start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=3")
        busy = until(
            "the request", lambda: [w.pid for w in service.snapshot().workers if w.in_flight] or None, service
        )[0]
        service.signal(signal.SIGTERM, busy)
        until(
            "leaving",
            lambda: [w.state for w in service.snapshot().workers if w.pid == busy] == [WorkerState.LEAVING],
            service,
        )
        assert not reply.done()
        assert service.get().pid != busy
        assert reply.result().pid == busy
    settled(service, 2, without=[busy])
    service.stop()


def test_an_upload_in_hand_is_finished(service: Service):
    service.start()
    with connect(service) as client:
        client.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + b"x" * 1000)
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.draining")
        client.sendall(b"x" * 2000)
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()
    service.ends()


@pytest.mark.parametrize("worker_class", WORKER_CLASSES[2:], indirect=True)
def test_a_request_whose_head_was_half_there_is_answered_at_an_upgrade_and_a_stop(service: Service):
    # On a new connection and on one that had a request before.
    service.workers = 1
    service.arguments = ["--keep-alive", "60"]
    service.configure(grace_period=30).start()
    with contextlib.ExitStack() as stack:
        generations: list[list[socket.socket]] = []
        for leave in (service.upgrade, lambda: service.signal(signal.SIGTERM)):
            clients = [stack.enter_context(connect(service)) for _ in range(2)]
            ask(clients[1])
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHo")
            generations.append(clients)
            # Answered after the halves were read, by the only worker.
            ask(stack.enter_context(connect(service)))
            leave()
        service.wait_for("event=phase.draining")
        # Longer than an idle connection is kept.
        with contextlib.suppress(AssertionError):
            until("nothing", lambda: None, patience=3)
        for generation, clients in enumerate(generations, 1):
            for client in clients:
                client.sendall(b"st: x\r\n\r\n")
                reply = received(client)
                assert reply.startswith(b"HTTP/1.1 200"), service.log()
                assert b"connection: close" in reply.lower()
                assert reply.partition(b"\r\n\r\n")[2].startswith(b"1 %d " % generation)
    service.ends()


def received(client: socket.socket) -> bytes:
    found = b""
    while data := client.recv(4096):
        found += data
    return found


def test_idle_connections_do_not_hold_a_stop_up(service: Service):
    service.arguments = ["--keep-alive", "120"]
    service.start()
    with connect(service) as kept:
        ask(kept)
        service.signal(signal.SIGTERM)
        service.ends()
        assert kept.recv(1) == b""


@pytest.mark.parametrize("cause", LEAVES_BY)
@pytest.mark.parametrize("path", ["/job", "/task"])
def test_background_work_is_finished(service: Service, cause: str, path: str):
    if path == "/task" and service.worker_class == "gevent":
        pytest.skip("gevent has no event loop to make tasks in")
    outlives(service, cause, path)


@pytest.mark.parametrize("path", ["/job", "/task"])
def test_background_work_past_the_deadline_is_named_and_the_status_tells(service: Service, path: str):
    if path == "/task" and service.worker_class == "gevent":
        pytest.skip("gevent has no event loop to make tasks in")
    service.configure(grace_period=3).start()
    service.get(f"{path}?seconds=600")
    service.signal(signal.SIGTERM)
    line = service.wait_for("event=background.abandoned")
    assert "name=job" in line
    service.ends(1)


def test_a_request_past_the_deadline_is_cut_and_the_status_tells(service: Service):
    service.configure(grace_period=8).start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=600")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        line = service.wait_for("event=drain.abandoned")
        if service.worker_class == UVICORN:
            assert reply.result().status == 500  # its answer for a request that it cancels
        else:
            with pytest.raises((ConnectionError, OSError)):
                reply.result()
    assert "requests=1" in line
    service.ends(1)


# -- signals


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("path", ["/slow", "/block"])
def test_int_and_quit_stop_now(service: Service, sig: signal.Signals, path: str):
    if service.worker_class == "gevent" and path == "/block":
        pytest.skip("what blocks a greenlet is not time.sleep()")
    service.configure(before="def worker_exit(server, worker): print('user hook', flush=True)\n").start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, f"{path}?seconds=600")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        before = time.monotonic()
        service.signal(sig)
        with pytest.raises((ConnectionError, OSError)):
            reply.result()
        service.ends(status=None)
    assert time.monotonic() - before < 5
    assert service.log().count("user hook") == 2
    assert not service.pid_file.exists()


def test_abort_ends_a_worker_that_does_not_beat(service: Service):
    service.arguments = ["--timeout", "1"]
    if service.worker_class == "gevent":
        deploy(service, "1")
        text = (service.directory / "app.py").read_text()
        busy = 'if path == "/block":\n        while True: pass\n    el'
        (service.directory / "app.py").write_text(text.replace('if path == "/slow"', busy + 'if path == "/slow"'))
    service.start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/block?seconds=600")
        stuck = until(
            "the request", lambda: [w.pid for w in service.snapshot().workers if w.in_flight] or None, service
        )[0]
        service.wait_for("WORKER TIMEOUT")
        with pytest.raises((ConnectionError, OSError)):
            reply.result()
    settled(service, 2, without=[stuck])
    assert service.is_active().board.header.workers_lost == 1
    service.stop()


def test_a_master_s_signals_mean_nothing_to_a_worker(service: Service):
    service.start()
    before = settled(service, 2)
    for pid in before:
        os.kill(pid, signal.SIGHUP)
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGWINCH)
    for _ in range(20):
        assert service.get().pid in before
    assert settled(service, 2) == before
    service.stop()


def test_a_killed_master_leaves_no_port_open_and_requests_are_finished(service: Service):
    service.start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=2.5")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGKILL)
        assert reply.result().status == 200
    service.ends(status=None)
    assert not service.is_open()


def test_a_killed_master_leaves_no_worker_that_hangs_at_startup(service: Service):
    deploy(service, "1", startup="await asyncio.sleep(600)")
    process = service.spawn()
    service.wait_for("Booting worker", times=2)
    until("boards", service.generations, service)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    service.ends(status=None)


def test_stop_while_booting_ends_soon(service: Service):
    deploy(service, "1", startup="await asyncio.sleep(600)")
    process = service.spawn()
    service.wait_for("Booting worker", times=2)
    os.kill(process.pid, signal.SIGTERM)
    service.wait_for("event=phase.draining")
    service.ends(status=None)


def test_a_worker_that_alone_is_signalled_leaves_and_is_replaced(service: Service):
    service.start()
    victim = service.get().pid
    with under_load(service) as load:
        os.kill(victim, signal.SIGTERM)
        until("the worker's end", lambda: victim not in service.processes(), service)
        answered_from(load, 50)
    settled(service, 2, without=[victim])
    service.stop()


# -- under load


def test_upgrades_lose_nothing(service: Service):
    service.start()
    with under_load(service) as load:
        for version in ("2", "3"):
            deploy(service, version)
            service.upgrade()
            until(f"version {version}", lambda version=version: service.get().version == version, service)
            service.until_one_generation()
            answered_from(load, 50)
    assert generations_of(load) == {1, 2, 3}
    service.stop()


def test_a_failed_upgrade_costs_nothing(service: Service):
    service.start()
    before = settled(service, 2)
    with under_load(service) as load:
        deploy(service, "2", at_import="raise RuntimeError('boom at import')")
        assert "boom at import" in service.upgrade(expect="upgrade.failed")
        answered_from(load, 50)
    assert settled(service, 2) == before
    service.stop()


def test_workers_that_come_and_go_lose_nothing(service: Service):
    service.arguments = ["--max-requests", "100"]
    service.start()
    with under_load(service) as load:
        for change, count in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2)):
            service.signal(change)
            until(f"{count} workers", lambda count=count: len(serving_workers(service)) == count, service)
        deploy(service, "2")
        service.signal(signal.SIGHUP)
        until("version 2", lambda: service.get().version == "2", service)
        until("recycled workers", lambda: len(service.matches("event=worker.recycled")) >= 4, service)
        answered_from(load, 50)
    service.stop()


def test_a_lame_duck_accepts_everything(service: Service):
    service.configure(drain_delay=20, grace_period=40).start()
    with under_load(service) as load:
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.lame_duck")
        answered_from(load, 100)
        headers = {name.lower(): value for name, value in service.get("/").headers.items()}
        assert headers["connection"] == "close"
    # The second one skips the rest.
    service.signal(signal.SIGTERM)
    service.ends()


def may_close_the_door() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return block_new_connections(server) is Admission.BLOCKED


@pytest.mark.skipif(not may_close_the_door(), reason="needs CAP_NET_ADMIN for a filter on a listener")
def test_a_stop_under_load_resets_nobody(service: Service):
    # No lame duck, and clients that do not leave.
    service.start()
    load = LoadThread(Load("127.0.0.1", service.port, ("/slow?seconds=0.02",), 40, 0.5, 0.02, 20.0))
    with load:
        answered_from(load, 200)
        service.signal(signal.SIGTERM)
        service.ends()
        # Whoever comes now is told at once that there is nobody, which every client may retry.
        until("a refusal", lambda: any(each.outcome is Outcome.REFUSED for each in list(load.samples)), service)
    found = Counter(sample.outcome for sample in load.samples)
    print(f"{service.worker_class}: {dict(found)}")
    assert set(found) <= {Outcome.OK, Outcome.STALE, Outcome.REFUSED}, found


# -- websockets


@pytest.mark.parametrize("worker_class", LOOPS[:1], indirect=True)
def test_websockets_are_closed_with_1012_at_the_end(service: Service):
    service.start()
    with connect(service) as client:
        key = base64.b64encode(os.urandom(16)).decode()
        client.sendall(
            f"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 101")
        service.signal(signal.SIGTERM)
        assert client.recv(4096) == b"\x88\x02" + (1012).to_bytes(2, "big")
        client.sendall(b"\x88\x82\0\0\0\0" + (1012).to_bytes(2, "big"))
        assert client.recv(1) == b""
    service.ends()
