"""Connections of a worker: how they are closed, and how long those that send nothing are waited for."""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn import util
from gunicorn.workers import gthread as stock
from gunicorn.workers.sync import SyncWorker

from zdd_web.gunicorn.adapter import closing_connections as module
from zdd_web.gunicorn.adapter import gthread, silent_connections, sync
from zdd_web.gunicorn.adapter.closing_connections import ClosingConnections

PATIENCE = 20.0


@pytest.fixture
def made() -> Iterator[list[socket.socket]]:
    """Sockets that are closed at the end of the test."""
    sockets: list[socket.socket] = []
    yield sockets
    for each in sockets:
        each.close()


@pytest.fixture
def closing() -> Iterator[ClosingConnections]:
    connections = ClosingConnections()
    yield connections
    connections.finish(lambda: None, lambda: 0.0)
    connections._epoll.close()


def connect(made: list[socket.socket]) -> tuple[socket.socket, socket.socket]:
    """Return a server's and a client's end of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        server, _ = listener.accept()
    made += [server, client]
    return server, client


def turn_until(closing: ClosingConnections, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        closing.turn(0.05)


def received(client: socket.socket) -> bytes:
    found = b""
    while more := client.recv(65536):
        found += more
    return found


# -- closing


def test_add_returns_at_once_and_the_client_finds_the_end_of_the_stream(made, closing) -> None:
    server, client = connect(made)
    server.sendall(b"reply")
    began = time.monotonic()
    closing.add(server)
    assert time.monotonic() - began < module.QUIET / 2
    assert received(client) == b"reply"
    assert (len(closing), server.fileno()) == (1, -1)


def test_a_client_that_closes_makes_the_descriptor_readable_and_ends_the_connection(made, closing) -> None:
    server, client = connect(made)
    closing.add(server)
    assert not select.select([closing], [], [], 0)[0]
    client.close()
    assert select.select([closing], [], [], PATIENCE)[0]
    closing.turn()
    assert len(closing) == 0


def test_a_reply_reaches_a_client_that_goes_on_sending(made, closing) -> None:
    # 8 MiB either way: neither fits into the kernel's buffers.
    server, client = connect(made)
    size = 8 << 20
    sent: list[BaseException | None] = []

    def upload() -> None:
        try:
            client.sendall(bytes(size))
            client.shutdown(socket.SHUT_WR)
            sent.append(None)
        except OSError as error:
            sent.append(error)

    def reply() -> None:
        server.sendall(bytes(size))
        closing.add(server)

    found: list[bytes] = []
    threads = [threading.Thread(target=each) for each in (upload, reply, lambda: found.append(received(client)))]
    for thread in threads:
        thread.start()
    turn_until(closing, lambda: bool(found and sent))
    for thread in threads:
        thread.join()
    assert (len(found[0]), sent) == (size, [None])


def test_a_client_that_is_quiet_is_not_waited_for_for_ever(made, closing, monkeypatch) -> None:
    monkeypatch.setattr(module, "QUIET", 0.05)
    server, _ = connect(made)
    closing.add(server)
    timeout = closing.next_timeout()
    assert timeout is not None and timeout <= 0.05
    turn_until(closing, lambda: len(closing) == 0)
    assert closing.next_timeout() is None


@pytest.mark.parametrize(("limit", "value"), [("AT_MOST", 0.05), ("MOST_BYTES", 1 << 20)])
def test_nor_is_one_that_does_not_stop_sending(made, closing, monkeypatch, limit: str, value: float) -> None:
    monkeypatch.setattr(module, limit, value)
    server, client = connect(made)
    closing.add(server)

    def send_on() -> None:
        with contextlib.suppress(OSError):
            while True:
                client.sendall(bytes(65536))

    thread = threading.Thread(target=send_on)
    thread.start()
    turn_until(closing, lambda: len(closing) == 0)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_of_too_many_those_that_were_quiet_longest_are_closed(made, closing, monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    pairs = [connect(made) for _ in range(4)]
    for server, _ in pairs[:2]:
        closing.add(server)
    pairs[0][1].sendall(b"more")
    turn_until(closing, lambda: list(closing._closing.values())[-1].discarded > 0)
    closing.add(pairs[2][0])
    # The second one was quiet for longer than the first.
    assert is_cut_off(pairs[1][1])
    assert len(closing) == 2
    pairs[0][1].sendall(b"more")


def is_cut_off(client: socket.socket) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            client.sendall(b"x")
        except OSError:
            return True
    return False


def test_the_end_waits_for_clients_beating_and_not_beyond_the_time_that_is_left(made, closing) -> None:
    server, client = connect(made)
    closing.add(server)
    beats: list[float] = []
    began = time.monotonic()

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) == 2:
            client.close()

    closing.finish(beat, lambda: None)
    assert len(beats) >= 2
    assert time.monotonic() - began < module.QUIET
    server, client = connect(made)
    closing.add(server)
    closing.finish(lambda: pytest.fail("no time is left"), lambda: 0.0)
    assert received(client) == b""


def test_what_is_closed_or_gone_is_left_alone(made, closing) -> None:
    server, client = connect(made)
    server.close()
    closing.add(server)
    server, client = connect(made)
    closing.add(server)
    closing.add(server)
    assert len(closing) == 1
    # A descriptor of the same number, which is somebody else's, stays open.
    client.close()
    turn_until(closing, lambda: len(closing) == 0)
    server.close()
    closing.add(server)
    assert len(closing) == 0


# -- connections that send nothing


def test_bytes_that_are_there_are_not_waited_for(made) -> None:
    server, client = connect(made)
    client.sendall(b"G")
    assert silent_connections.await_first_byte(server, lambda: pytest.fail("no reason to ask"))


def test_a_silent_connection_is_waited_for_as_long_as_the_worker_serves(made) -> None:
    server, client = connect(made)
    asked: list[None] = []

    def is_leaving() -> bool:
        asked.append(None)
        if len(asked) == 15:  # longer than a leaving worker waits
            client.sendall(b"G")
        return False

    assert silent_connections.await_first_byte(server, is_leaving)


def test_a_leaving_worker_serves_what_a_young_connection_sends(made) -> None:
    server, client = connect(made)
    beats: list[None] = []

    def beat() -> None:
        beats.append(None)
        if len(beats) == 2:
            client.sendall(b"G")

    assert silent_connections.await_first_byte(server, lambda: True, beat)


def test_a_leaving_worker_gives_up_one_that_stays_silent(made, monkeypatch) -> None:
    monkeypatch.setattr(silent_connections, "PATIENCE", 0.3)
    server, _ = connect(made)
    began = time.monotonic()
    assert not silent_connections.await_first_byte(server, lambda: True)
    assert time.monotonic() - began < PATIENCE


def test_several_that_have_waited_in_a_queue_are_not_waited_for_one_after_the_other(made, monkeypatch) -> None:
    monkeypatch.setattr(silent_connections, "PATIENCE", 0.5)
    servers = [connect(made)[0] for _ in range(40)]
    began = time.monotonic()
    assert not any(silent_connections.await_first_byte(server, lambda: True) for server in servers)
    # Half a second for each takes 20 s.
    assert time.monotonic() - began < 10


def test_a_timeout_ends_the_wait_of_one_that_serves(made) -> None:
    server, _ = connect(made)
    assert not silent_connections.await_first_byte(server, lambda: False, timeout=0.05)


def test_the_age_of_a_connection_is_that_since_its_handshake(made) -> None:
    server, client = connect(made)
    now = time.monotonic()
    deadline = now + PATIENCE
    while silent_connections.silent_for(server, time.monotonic()) < 0.2:
        assert time.monotonic() < deadline
    assert silent_connections.silent_for(server, time.monotonic()) <= time.monotonic() - now + 0.1
    client.sendall(b"G")
    select.select([server], [], [], PATIENCE)
    assert silent_connections.silent_for(server, time.monotonic()) < 0.2
    ours, theirs = socket.socketpair()
    made += [ours, theirs]
    assert silent_connections.silent_for(ours, time.monotonic() - 3) >= 3


# -- what is changed in gunicorn


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn's classes, which a worker changes in its own process, as they were."""
    for owner, name in ((stock.TConn, "close"), (stock.TConn, "wait_for_data"), (util, "close_graceful")):
        if hasattr(owner, name):
            monkeypatch.setattr(owner, name, getattr(owner, name))


def process(**said: Any) -> Any:
    return SimpleNamespace(**{"deadline_ns": 0, "going": False, "is_leaving": lambda: False, **said})


def worker_of(kind: Any, **attributes: Any) -> Any:
    worker = kind.__new__(kind)
    vars(worker).update(attributes)
    return worker


@pytest.mark.usefixtures("unchanged")
def test_pending_connections_of_a_leaving_gthread_worker_do_not_wait_for_keepalive(monkeypatch) -> None:
    if not hasattr(stock.ThreadWorker, "murder_pending"):
        pytest.skip("this gunicorn gives a connection no thread before it has sent something")
    murdered: list[float] = []
    monkeypatch.setattr(
        stock.ThreadWorker,
        "murder_pending",
        lambda worker: murdered.extend(each.timeout for each in worker.pending_conns),
    )
    monkeypatch.setattr(stock.ThreadWorker, "wait_for_and_dispatch_events", lambda worker, timeout: None)
    ours = process()
    worker = worker_of(stock.ThreadWorker, pending_conns=[SimpleNamespace(timeout=time.monotonic() + 75)])
    gthread.give_up_silent_connections(worker, ours, lambda: False)
    worker.murder_pending()
    ours.going = True
    worker.murder_pending()
    serving, leaving = (timeout - time.monotonic() for timeout in murdered)
    assert serving > 60
    assert leaving <= module.QUIET


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("going", [False, True], ids=["lame duck", "stops"])
def test_only_a_worker_that_stops_holds_a_thread_for_a_connection_that_has_sent_nothing_yet(made, going: bool) -> None:
    if not hasattr(stock.ThreadWorker, "murder_pending"):
        pytest.skip("this gunicorn gives a connection no thread before it has sent something")
    server, client = connect(made)
    looks: list[None] = []

    def is_leaving() -> bool:
        looks.append(None)
        if len(looks) == 3:
            client.sendall(b"G")
        return True

    ours = process()
    ours.is_leaving, ours.going = is_leaving, going
    gthread.give_up_silent_connections(worker_of(stock.ThreadWorker, pending_conns=[]), ours, lambda: False)
    # A worker that stops may have no more turn for it.
    assert worker_of(stock.TConn, sock=server, data_ready=False).wait_for_data(PATIENCE) is going


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A gthread worker that has been told to end; `ready` are connections that it has begun to serve."""
    if not hasattr(stock.ThreadWorker, "murder_pending"):
        pytest.skip("this gunicorn gives a connection no thread before it has sent something")
    monkeypatch.setattr(stock.ThreadWorker, "wait_for_and_dispatch_events", lambda worker, timeout: None)
    with selectors.DefaultSelector() as poller:
        worker = worker_of(stock.ThreadWorker, pending_conns=deque(), poller=poller, nr_conns=1, alive=False, ready=[])
        worker.enqueue_req = worker.ready.append
        gthread.give_up_silent_connections(worker, process(going=True), lambda: False)
        yield worker


@pytest.mark.usefixtures("unchanged")
def test_a_connection_that_is_deferred_as_its_worker_ends_is_served(made, ending) -> None:
    server, client = connect(made)
    conn = worker_of(stock.TConn, sock=server, data_ready=False, parser=None, initialized=False)
    done = Future[object]()
    done.set_result(stock._DEFER)
    ending.finish_request(conn, done)
    client.sendall(b"G")
    ((key, _),) = ending.poller.select(PATIENCE)
    key.data(key.fileobj)
    assert (ending.ready, list(ending.pending_conns), ending.nr_conns) == ([conn], [], 1)


@pytest.mark.usefixtures("unchanged")
def test_a_connection_that_cannot_be_deferred_is_closed_and_costs_nothing_else(made, ending) -> None:
    server, client = connect(made)
    conn = worker_of(stock.TConn, sock=server, data_ready=False, parser=None, initialized=False)
    # As where the kernel watches no more descriptors for this user.
    ending.poller.register(server, selectors.EVENT_READ)
    done = Future[object]()
    done.set_result(stock._DEFER)
    ending.finish_request(conn, done)
    assert client.recv(1) == b""
    assert (list(ending.pending_conns), ending.nr_conns) == ([], 0)


@pytest.mark.usefixtures("unchanged")
def test_a_silent_connection_that_has_spoken_by_its_last_instant_is_served(made, ending) -> None:
    (server, client), (silent, _) = connect(made), connect(made)
    client.sendall(b"G")
    over = time.monotonic()
    late, never = (worker_of(stock.TConn, sock=sock, timeout=over) for sock in (server, silent))
    ending.pending_conns.extend((late, never))
    for sock in (server, silent):
        ending.poller.register(sock, selectors.EVENT_READ)
    ending.nr_conns = 2
    ending.murder_pending()
    assert (ending.ready, list(ending.pending_conns), ending.nr_conns) == ([late], [], 1)
    assert silent.fileno() < 0 <= server.fileno()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("adapt", [partial(gthread.adapt, hands_over=lambda: False), sync.adapt])
def test_workers_of_other_classes_are_left_as_they_are(adapt: Callable[[Any, Any], None]) -> None:
    worker = SimpleNamespace()
    before = stock.TConn.close
    adapt(worker, process())
    assert vars(worker) == {}
    assert stock.TConn.close is before


def test_with_several_listeners_a_sync_worker_accepts_nothing_from_those_that_are_closing() -> None:
    among = sync._AmongListeners()
    with pytest.raises(BlockingIOError):
        worker_of(SyncWorker).accept(among)
    among._epoll.close()
