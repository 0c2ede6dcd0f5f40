"""Kept connections survive a deploy: they are handed to the workers that serve on."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from benchmarks.kept_clients import REQUESTS, KeptClients, ask, is_closed
from tests.processes.harness import PATIENCE, WORKER_CLASSES, Service, skip_unless_installed, until
from tests.processes.test_worker_classes import ASGI_APP
from zdd_web import metrics

KEEPERS = ["gthread", "gevent", "asgi", "uvicorn_worker.UvicornWorker"]

#: Connections that a test keeps.
MANY = 200

MakeService = Callable[..., Service]


def keeping(
    make_service: MakeService, worker_class: str = "gthread", *, max_requests: int = 0, **settings: object
) -> Service:
    """Start a service that keeps idle connections for longer than a test takes."""
    service = make_service(skip_unless_installed(worker_class), **settings)
    if worker_class not in WORKER_CLASSES[:3]:
        service.write_app(ASGI_APP.replace("STARTUP", "pass"))
    service.arguments += ["--keep-alive", "120", "--worker-connections", "2000", "--max-requests", str(max_requests)]
    return service.start()


@contextmanager
def asking(service: Service, count: int = MANY) -> Iterator[KeptClients]:
    clients = KeptClients(service.port, count, pause=0.005).start()
    try:
        clients.until_asked(50)
        yield clients
        clients.until_asked(50)
    finally:
        clients.stop()


@contextmanager
def idle_connections(service: Service, count: int) -> Iterator[list[socket.socket]]:
    """Connections that have had a reply each."""
    with ExitStack() as stack:
        idle = []
        for _ in range(count):
            idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", service.port), PATIENCE)))
            ask(idle[-1])
        yield idle


def handed_over(service: Service) -> int:
    """How many connections this service's workers have handed over since its first generation began."""
    active = service.is_active()
    return metrics.totals(active.board).connections_handed_over


def nothing_was_lost_or_closed(clients: KeptClients, service: Service) -> None:
    assert (clients.seen.lost, clients.seen.closed) == (0, 0), (clients.seen.reasons, service.log())


@pytest.mark.parametrize("worker_class", KEEPERS)
def test_clients_of_an_upgraded_service_keep_their_connections(make_service: MakeService, worker_class: str):
    service = keeping(make_service, worker_class)
    with asking(service) as clients:
        for _ in range(2):
            service.upgrade()
            service.until_one_generation()
    nothing_was_lost_or_closed(clients, service)
    snapshot = service.snapshot()
    assert (snapshot.generation, snapshot.connections_received) == (3, MANY)
    service.stop()


@pytest.mark.parametrize("worker_class", KEEPERS)
def test_clients_keep_their_connections_in_a_reload(make_service: MakeService, worker_class: str):
    service = keeping(make_service, worker_class)
    before = {worker.pid for worker in service.snapshot().workers}
    with asking(service) as clients:
        service.signal(signal.SIGHUP)
        until("new workers", lambda: not before & {worker.pid for worker in service.snapshot().workers}, service)
    nothing_was_lost_or_closed(clients, service)
    # A worker's count is nowhere for an instant when it has gone.
    until("the counts", lambda: handed_over(service) == service.snapshot().connections_received >= MANY, service)
    service.stop()


def test_nothing_waits_in_the_exchange_for_workers_that_a_reload_has_keep_no_connections(make_service: MakeService):
    service = make_service("gthread").configure("keepalive = 120").start()
    before = {worker.pid for worker in service.snapshot().workers}
    with idle_connections(service, 20) as idle:
        service.configure("keepalive = 0")
        service.signal(signal.SIGHUP)
        until("new workers", lambda: not before & {worker.pid for worker in service.snapshot().workers}, service)
        assert [client.recv(1) for client in idle] == [b""] * len(idle)
    assert not service.matches(r"event=connections\.taken_back")
    assert handed_over(service) == 0
    service.stop()


@pytest.mark.parametrize("worker_class", ["gthread", "asgi"])
def test_clients_keep_their_connections_while_workers_are_recycled(make_service: MakeService, worker_class: str):
    service = keeping(make_service, worker_class, max_requests=400)
    with asking(service, 100) as clients:
        service.wait_for(r"event=worker\.recycled", 3)
    nothing_was_lost_or_closed(clients, service)
    service.stop()


@pytest.mark.parametrize("listener", ["fd", "reuseport"])
def test_clients_keep_their_connections_when_a_worker_less_is_wanted(make_service: MakeService, listener: str):
    service = keeping(make_service, listener=listener)
    with asking(service) as clients:
        service.signal(signal.SIGTTOU)
        until("one worker", lambda: len(service.snapshot().workers) == 1, service)
        service.upgrade()
    nothing_was_lost_or_closed(clients, service)
    service.stop()


def test_a_successor_that_dies_in_the_commit_window_gives_back_what_it_took(make_service: MakeService):
    service = keeping(make_service, commit_window=5.0)
    with asking(service) as clients:
        service.signal(signal.SIGUSR2)
        serving = service.wait_for(r"generation=2 event=phase\.serving")
        found = re.search(r" pid=(\d+)", serving)
        assert found
        # It has connections of its own by then.
        with socket.create_connection(("127.0.0.1", service.port), PATIENCE) as one:
            ask(one)
            clients.until_asked(50)
            os.kill(int(found[1]), signal.SIGKILL)
            service.wait_for(r"event=upgrade\.failed")
            service.until_one_generation()
            until("the end of its workers", lambda: len(service.processes()) == 1 + service.workers, service)
            ask(one)
    nothing_was_lost_or_closed(clients, service)
    assert service.snapshot().generation == 1
    service.stop()


def test_clients_keep_their_connections_when_the_old_master_is_killed_in_the_commit_window(make_service: MakeService):
    service = keeping(make_service, commit_window=30.0)
    old = service.pid
    with asking(service) as clients:
        service.signal(signal.SIGUSR2)
        service.wait_for(r"generation=2 event=phase\.serving")
        service.signal(signal.SIGKILL, old)
        service.process.wait()
        service.wait_for(r"generation=2 event=predecessor\.lost")
        until("the end of the old workers", lambda: len(service.processes()) == 1 + service.workers, service)
    nothing_was_lost_or_closed(clients, service)
    assert service.snapshot().connections_received == MANY


def test_what_no_successor_took_is_answered_when_both_masters_were_killed(make_service: MakeService):
    service = keeping(make_service, commit_window=30.0, workers=1, grace_period=120)
    old, orphan = service.pid, service.snapshot().workers[0].pid
    with idle_connections(service, 2) as (asks, idle):
        service.signal(signal.SIGUSR2)
        service.wait_for(r"generation=2 event=phase\.serving")
        had = len(os.listdir(f"/proc/{orphan}/fd"))
        successors = [pid for pid in service.processes() if pid not in (old, orphan)]
        for pid in successors:
            os.kill(pid, signal.SIGSTOP)
        service.signal(signal.SIGKILL, old)
        service.process.wait()
        until("both in the exchange", lambda: len(os.listdir(f"/proc/{orphan}/fd")) <= had - 2, service)
        asks.sendall(REQUESTS[0])
        for pid in successors:
            os.kill(pid, signal.SIGKILL)
        assert b" 200 " in asks.recv(1 << 16)
        assert idle.recv(1) == b"", "it does not wait for as long as keepalive"
        until("the end of the worker", lambda: not service.processes(), service)
    assert service.matches(r"generation=1 event=connections\.taken_back .*connections=2 ")


def test_a_successor_that_does_not_take_connections_costs_no_request(make_service: MakeService):
    service = keeping(make_service)
    with asking(service) as clients:
        service.configure(hand_over_connections=False)
        service.upgrade()
        service.until_one_generation()
        assert clients.seen.lost == 0, clients.seen.reasons
        # ... and one that takes them again, from a predecessor that hands none over.
        service.configure(hand_over_connections=True)
        service.upgrade()
        service.until_one_generation()
    assert clients.seen.lost == 0, (clients.seen.reasons, service.log())
    assert clients.seen.closed >= MANY
    assert handed_over(service) == 0
    assert service.matches(r"event=connections\.taken_back") == []
    service.stop()


def test_connections_that_have_sent_nothing_yet_are_handed_over_too(make_service: MakeService):
    service = keeping(make_service)
    service.signal(signal.SIGUSR2)
    # gunicorn itself closes such a connection after five seconds: not before the successor is ready.
    service.wait_for(r"generation=1 event=upgrade\.ready")
    silent = [socket.create_connection(("127.0.0.1", service.port), PATIENCE) for _ in range(6)]
    service.wait_for(r"event=upgrade\.committed")
    service.until_one_generation()
    for each in silent:
        assert b" 200 " in ask(each)
        assert not is_closed(each)
        each.close()
    service.stop()


def test_connections_that_have_sent_nothing_yet_hold_no_thread(make_service: MakeService):
    service = make_service("gthread", workers=1)
    service.arguments += ["--threads", "2", "--worker-connections", "2000"]
    service.start()
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), PATIENCE)) for _ in range(60)
        ]
        # gunicorn's two threads would wait for five seconds for each of them.
        with socket.create_connection(("127.0.0.1", service.port), PATIENCE) as asks:
            assert b" 200 " in ask(asks)
        assert all(b" 200 " in ask(each) for each in silent)
    service.stop()


def test_a_request_in_hand_is_answered_and_its_connection_kept(make_service: MakeService):
    service = keeping(make_service)
    connection = socket.create_connection(("127.0.0.1", service.port), PATIENCE)
    heads: list[bytes] = []
    request = b"GET /hold?release HTTP/1.1\r\nHost: x\r\n\r\n"
    thread = threading.Thread(target=lambda: heads.append(ask(connection, request)))
    thread.start()
    held = service.directory / "release.held-by-1"
    until("the request in hand", held.exists, service)
    service.upgrade()
    (service.directory / "release").touch()
    thread.join()
    assert b"connection: close" not in heads[0].lower()
    service.until_one_generation()
    assert b" 200 " in ask(connection)
    assert service.snapshot().connections_received == 1
    connection.close()
    service.stop()


@pytest.mark.parametrize("worker_class", KEEPERS)
def test_connections_that_no_worker_takes_are_answered_where_they_came_from(
    make_service: MakeService, worker_class: str
):
    service = keeping(make_service, worker_class)
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port), PATIENCE)) for _ in range(4)]
        for each in held:
            each.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nfirst")
        until("requests in hand", lambda: sum(each.in_flight for each in service.snapshot().workers) == 4, service)
        service.upgrade()
        stopped = [worker.pid for worker in service.snapshot().workers]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            for each in held:
                assert b" 200 " in ask(each, b" half")
            until(
                "connections in the exchange",
                lambda: sum(each.handed_over for each in service.generations()[0].snapshot().workers) == 4,
                service,
            )
            for each in held:
                each.sendall(REQUESTS[0])
            service.wait_for(r"generation=1 event=connections\.taken_back")
            for each in held:
                assert b" 200 " in ask(each, b"")
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    service.until_one_generation()
    assert service.matches(r"event=internal\.error") == [], service.log()
    service.stop()


@pytest.mark.parametrize("worker_class", KEEPERS)
def test_a_stop_closes_idle_connections_and_says_how_many(make_service: MakeService, worker_class: str):
    service = keeping(make_service, worker_class)
    with idle_connections(service, 20) as idle:
        service.stop()
        assert all(map(is_closed, idle))
    assert service.matches(r"event=phase\.stopped .*closed_idle=20"), service.log()


def test_idle_connections_leave_over_the_whole_lame_duck(make_service: MakeService):
    service = keeping(make_service, drain_delay=3, grace_period=10)
    with idle_connections(service, 60) as idle:
        service.signal(signal.SIGTERM)
        # Some while the lame duck lasts, and not all of them at once.
        closed = until("a part of them closed", lambda: sum(map(is_closed, idle)), service)
        assert closed < len(idle)
        until("all of them closed", lambda: all(map(is_closed, idle)), service)
        service.ends()
    assert service.matches(r"event=phase\.stopped .*closed_idle=60"), service.log()


def inodes(pid: int) -> set[str]:
    """The sockets of SOCK_SEQPACKET without a name that a process holds."""
    with open(f"/proc/{pid}/net/unix") as table:
        # Num RefCount Protocol Flags Type St Inode [Path]; type 5 is SOCK_SEQPACKET.
        rows = [line.split() for line in table.readlines()[1:]]
    nameless = {row[6] for row in rows if row[4] == "0005" and len(row) == 7}
    held = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{fd}"))
        if found and found[1] in nameless:
            held.add(found[1])
    return held


FORKING = """
    import os, subprocess, sys
    import zdd_web

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/child":
            pid = os.fork()
            if pid == 0:
                # Stays until the test has looked.
                import time
                time.sleep(60)
                os._exit(0)
            body = str(pid).encode()
        elif environ["PATH_INFO"] == "/program":
            body = str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid).encode()
        else:
            body = b"1 1 1"
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
"""


def test_only_the_masters_and_their_workers_hold_the_exchange(make_service: MakeService):
    service = make_service(probe_bind="127.0.0.1:0")
    service.write_app(FORKING)
    service.start()
    workers = [worker.pid for worker in service.snapshot().workers]
    pair = set.intersection(*map(inodes, [service.pid, *workers]))
    assert len(pair) == 2
    forked, program = int(service.get("/child").body), int(service.get("/program").body)
    held = {pid for pid in service.processes() if inodes(pid) & pair}
    assert held == {service.pid, *workers}
    assert {forked, program} <= set(service.processes())
    service.upgrade()
    service.until_one_generation()
    successors = {service.pid, *(worker.pid for worker in service.snapshot().workers)}
    assert {pid for pid in service.processes() if inodes(pid) & pair} == successors
    service.clean_up()
