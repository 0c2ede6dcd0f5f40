"""Which connections of each worker class are idle, and how they leave and come: on gunicorn's and uvicorn's classes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.workers import gthread as stock
from gunicorn.workers.gthread import ThreadWorker

from zdd_web.gunicorn.adapter import kept_gthread
from zdd_web.gunicorn.adapter.kept_asyncio import COUNTS_EVERY, AsyncioConnections, UvicornConnections
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.sockets.exchange import Exchange
from zdd_web.system import connection_passing
from zdd_web.system.connection_passing import Handed

PATIENCE = 10.0

if not hasattr(ThreadWorker, "wait_for_and_dispatch_events"):
    pytest.skip("this gunicorn's gthread keeps its connections in another way", allow_module_level=True)


class Kept:
    """What a store calls."""

    def __init__(self) -> None:
        self.closed = 0
        self.turn = self.take_some = lambda: None

    def pause(self) -> None: ...

    def hands_over(self) -> bool:
        return False

    def count_closed(self) -> None:
        self.closed += 1


def travelled(fd: int, handed: Handed) -> tuple[socket.socket, Handed]:
    give, take = connection_passing.pair()
    with give, take:
        assert connection_passing.send(give, fd, handed)
        received = connection_passing.receive(take)
    assert received is not None
    return received


# -- gthread


class Gthread:
    """A gthread worker without a loop."""

    def __init__(self, **settings: Any) -> None:
        worker: Any = ThreadWorker.__new__(ThreadWorker)
        self.worker, self.kept = worker, Kept()
        worker.cfg = Config()
        for name, value in settings.items():
            worker.cfg.set(name, value)
        worker.ppid, worker.alive, worker.nr_conns = 0, True, 0
        worker.worker_connections, worker.max_keepalived = 10, 8
        worker.keepalived_conns, worker.pending_conns = deque(), deque()
        worker.poller = selectors.DefaultSelector()
        self.started: list[Any] = []
        worker.enqueue_req = self.started.append
        store = kept_gthread.store_for(worker, self.kept)  # type: ignore[arg-type]
        assert store is not None
        self.store = store
        self.clients: list[socket.socket] = []

    def keep(self, left: float = 5.0, requests: int = 1) -> socket.socket:
        server, client = socket.socketpair()
        self.clients.append(client)
        client.settimeout(PATIENCE)
        self.store.keep(server, Handed(left, requests, ("127.0.0.1", 80)))
        return client

    def close(self) -> None:
        for conn in [*self.worker.keepalived_conns, *self.worker.pending_conns, *self.started]:
            conn.sock.close()
        for client in self.clients:
            client.close()
        self.worker.poller.close()


@pytest.fixture
def gthread() -> Iterator[Callable[..., Gthread]]:
    made: list[Gthread] = []

    def make(**settings: Any) -> Gthread:
        made.append(Gthread(**settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_received_connections_stand_in_the_order_in_which_they_end(gthread: Callable[..., Gthread]) -> None:
    worker = gthread(keepalive=50)
    for left in (3.0, 1.0, 2.0, 4.0):
        worker.keep(left)
    lefts = [worker.store.describe(each)[1].left for each in worker.store.idle()]
    assert [round(left) for left in lefts] == [1, 2, 3, 4]
    assert (worker.store.in_hand(), worker.store.room()) == (4, 4)


@pytest.mark.parametrize("requests", [0, 1])
def test_a_received_connection_does_not_outlast_those_that_come_after_it(
    gthread: Callable[..., Gthread], requests: int
) -> None:
    worker = gthread(keepalive=2)
    worker.keep(left=1e6, requests=requests)
    (received,) = worker.store.idle()
    # As is done before a connection of the worker's own is appended.
    silent = 0.0 if requests or not hasattr(ThreadWorker, "murder_pending") else stock.DEFAULT_WORKER_DATA_TIMEOUT
    assert received.timeout <= time.monotonic() + silent + worker.worker.cfg.keepalive


def test_a_connection_goes_on_where_it_is_received_with_its_next_request_as_its_second(
    gthread: Callable[..., Gthread],
) -> None:
    first, second = gthread(), gthread()
    client = first.keep(requests=3)
    (conn,) = first.store.idle()
    received = travelled(*first.store.describe(conn))
    first.store.forget(conn)
    assert (first.store.in_hand(), first.store.idle(), len(first.worker.poller.get_map())) == (0, [], 0)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    second.store.keep(*received)
    for key, _ in second.worker.poller.select(PATIENCE):
        key.data(key.fileobj)
    (started,) = second.started
    started.sock.setblocking(True)
    request = next(started.parser)
    assert (request.req_number, request.path, started.server) == (4, "/", ("127.0.0.1", 80))
    assert started.data_ready, "no thread waits for what is here"


@pytest.mark.skipif(not hasattr(ThreadWorker, "murder_pending"), reason="this gunicorn has no pending connections")
def test_a_connection_that_has_sent_nothing_stays_one(gthread: Callable[..., Gthread]) -> None:
    worker = gthread()
    worker.keep(requests=0)
    assert len(worker.worker.pending_conns) == 1
    (conn,) = worker.store.idle()
    assert worker.store.describe(conn)[1].requests == 0
    worker.store.forget(conn)
    assert worker.store.in_hand() == 0


def test_a_connection_that_has_sent_nothing_keeps_its_time(gthread: Callable[..., Gthread]) -> None:
    worker = gthread(keepalive=2)
    if not hasattr(ThreadWorker, "murder_pending"):
        pytest.skip("this gunicorn has no limit for them")
    worker.keep(left=6.5, requests=0)
    worker.keep(left=75.0, requests=0)
    now = time.monotonic()
    first, second = (each.timeout - now for each in worker.worker.pending_conns)
    assert 2.0 < first <= 6.5 < second <= 7.0


def test_connections_that_have_sent_nothing_do_not_count_among_those_that_leave_over_a_lame_duck(
    gthread: Callable[..., Gthread],
) -> None:
    worker = gthread()
    for requests in (0, 1, 0):
        worker.keep(requests=requests)
    assert (len(worker.store.idle()), worker.store.closable()) == (3, list(worker.worker.keepalived_conns))


def test_a_connection_with_bytes_in_its_parser_is_not_idle(gthread: Callable[..., Gthread]) -> None:
    worker = gthread()
    worker.keep()
    worker.worker.keepalived_conns[0].parser.unreader.unread(b"GET ")
    assert worker.store.idle() == []


def test_each_connection_is_looked_at_before_it_is_closed(gthread: Callable[..., Gthread]) -> None:
    worker = gthread()
    silent, asks = worker.keep(left=0.0), worker.keep(left=0.0)
    asks.sendall(b"GET / HTTP/1.1\r\n\r\n")
    worker.worker.murder_keepalived()
    assert silent.recv(1) == b""
    assert len(worker.started) == 1 and worker.kept.closed == 1
    assert worker.store.in_hand() == 1, "the one that asks"


def test_what_was_reset_on_its_way_is_forgotten(gthread: Callable[..., Gthread]) -> None:
    worker = gthread()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                server.getpeername()
        worker.store.keep(server, Handed(1.0, 1, ""))
    assert worker.store.in_hand() == 0 and server.fileno() == -1


@pytest.mark.parametrize(
    ("settings", "travels"), [({}, True), ({"certfile": "x", "keyfile": "y"}, False), ({"keepalive": 0}, False)]
)
def test_tls_and_what_is_not_kept_do_not_travel(
    gthread: Callable[..., Gthread], settings: dict[str, Any], travels: bool
) -> None:
    assert gthread(**settings).store.can_travel is travels


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"worker_class": "gthread"}, True),
        ({"worker_class": "gthread", "proxy_protocol": True}, True),
        ({"worker_class": "gthread", "keepalive": 0}, False),
        ({"worker_class": "gthread", "certfile": "x", "keyfile": "y"}, False),
        ({"worker_class": "gthread", "worker_connections": 4, "threads": 4}, False),
        ({"worker_class": "sync"}, False),
        ({"worker_class": "sync", "threads": 2}, True),
        ({"worker_class": "gevent"}, True),
        ({"worker_class": "gevent", "keepalive": 0}, False),
    ],
)
def test_predecessor_is_told_whether_its_connections_are_taken(settings: dict[str, Any], taken: bool) -> None:
    if settings["worker_class"] == "gevent":
        pytest.importorskip("gevent")
    cfg: Any = Config()
    for name, value in settings.items():
        cfg.set(name, value)
    first = Exchange()
    given = {name: os.dup(fd) for name, fd in first.inheritance().items()}
    successor = Exchange(Inheritance(2, 1, -1, -1, -1, (), (), **given))
    assert (successor.is_taken_from(cfg), first.is_taken_from(cfg)) == (taken, False)
    first.close()
    successor.close()


# -- uvicorn


def protocols() -> list[Any]:
    found = []
    with contextlib.suppress(ImportError):
        from uvicorn.protocols.http.h11_impl import H11Protocol

        found.append(H11Protocol)
    with contextlib.suppress(ImportError):
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        found.append(HttpToolsProtocol)
    return found


class Uvicorn:
    """A loop with connections of one of uvicorn's protocols, and an app that waits to be released."""

    def __init__(self, protocol: Any) -> None:
        from uvicorn.config import Config as UvicornConfig
        from uvicorn.server import ServerState

        self.loop = asyncio.get_running_loop()
        self.protocols: list[Any] = []
        self.release = asyncio.Event()
        self.release.set()
        config = UvicornConfig(self.app, interface="asgi3", log_config=None, timeout_keep_alive=50)
        config.load()
        state = ServerState()

        def make() -> Any:
            self.protocols.append(protocol(config=config, server_state=state, app_state={}))
            return self.protocols[-1]

        self.store: AsyncioConnections = UvicornConnections(Kept(), lambda: self.protocols, lambda: ())  # type: ignore[arg-type]
        self.store.loop, self.store.factory = self.loop, make
        self.make = make

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def connect(self) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        server, client = socket.socketpair()
        for each in (server, client):
            each.setblocking(False)
        _, protocol = await self.loop.connect_accepted_socket(self.make, server)
        reader, writer = await asyncio.open_connection(sock=client)
        return protocol, reader, writer

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0.005)

    def is_idle(self) -> bool:
        return bool(self.store.idle())


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD_OF_POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


@pytest.mark.parametrize("protocol", protocols(), ids=lambda each: each.__name__)
def test_uvicorn_connection_is_idle_between_two_whole_requests_alone(protocol: Any) -> None:
    async def play() -> None:
        server = Uvicorn(protocol)
        _, reader, writer = await server.connect()
        assert server.is_idle(), "it has sent nothing"
        server.release.clear()
        writer.write(GET[:9])
        await server.settle()
        assert not server.is_idle(), "a part of a head"
        writer.write(GET[9:])
        await server.settle()
        assert not server.is_idle(), "a reply under way"
        server.release.set()
        assert await reader.readuntil(b"ok")
        await server.settle()
        assert server.is_idle(), "between two requests"
        writer.write(GET + GET[:9])
        assert await reader.readuntil(b"ok")
        await server.settle()
        assert not server.is_idle(), "a part of a head that came together with the request before"
        writer.write(GET[9:])
        assert await reader.readuntil(b"ok")
        await server.settle()
        assert server.is_idle(), "between two requests"
        writer.write(HEAD_OF_POST)
        assert await reader.readuntil(b"ok")
        await server.settle()
        assert not server.is_idle(), "a body that is still to come would be read as a request"
        writer.close()
        await server.settle()

    asyncio.run(asyncio.wait_for(play(), PATIENCE))


@pytest.mark.parametrize("protocol", protocols(), ids=lambda each: each.__name__)
def test_uvicorn_connection_goes_on_where_it_is_received(protocol: Any) -> None:
    async def play() -> None:
        first, second = Uvicorn(protocol), Uvicorn(protocol)
        held, reader, writer = await first.connect()
        writer.write(GET)
        assert await reader.readuntil(b"ok")
        await first.settle()
        fd, handed = first.store.describe(held)
        assert handed.requests == 1 and 40 < handed.left <= 50
        received = travelled(fd, handed._replace(left=7.0))
        first.store.forget(held)
        await first.settle()
        assert first.store.in_hand() == 0
        second.store.keep(*received)
        await second.settle()
        (there,) = second.store.idle()
        # It is handed on once more before its next request, and must not lose its time there.
        assert second.store.describe(there)[1].requests == 1
        assert 6 < second.store.describe(there)[1].left <= 7
        writer.write(GET)
        assert await reader.readuntil(b"ok")
        writer.close()
        await second.settle()

    asyncio.run(asyncio.wait_for(play(), PATIENCE))


class Closes(asyncio.Protocol):
    """Ends each connection at once."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


def test_room_is_known_without_a_look_at_every_connection_each_time() -> None:
    looks = []

    def connections() -> list[Any]:
        looks.append(None)
        return []

    async def play() -> None:
        store: AsyncioConnections[Any] = UvicornConnections(Kept(), connections, lambda: (), limit=1000)
        store.loop, store.factory = asyncio.get_running_loop(), Closes
        here, there = socket.socketpair()
        began = time.monotonic()
        room = [store.room() for _ in range(400)]
        store.keep(here, Handed(1.0, 0, ""))
        assert (room[0], room[-1], store.room()) == (1000, 1000, 999), "one that has come is counted at once"
        assert len(looks) <= 2 + (time.monotonic() - began) / COUNTS_EVERY
        while store.in_hand():
            await asyncio.sleep(0)
        there.close()

    asyncio.run(asyncio.wait_for(play(), PATIENCE))


@pytest.mark.parametrize("protocol", protocols(), ids=lambda each: each.__name__)
def test_uvicorn_connection_is_closed_right_after_the_look_at_it(protocol: Any) -> None:
    async def play() -> None:
        server = Uvicorn(protocol)
        ends, client = socket.socketpair()
        for each in (ends, client):
            each.setblocking(False)
        await server.loop.connect_accepted_socket(server.make, ends)
        (idle,) = server.store.idle()
        with client:
            assert server.store.close_idle(idle)
            # And not in the next turn of the loop.
            assert client.recv(1) == b""
        await server.settle()

    asyncio.run(asyncio.wait_for(play(), PATIENCE))


# -- gevent

GEVENT = """
import gevent
from gevent import socket
from types import SimpleNamespace
from gunicorn import http
from gunicorn.config import Config
from zdd_web.gunicorn.adapter.kept_gevent import GeventConnections

def handle(listener, client, address):
    parser = http.get_parser(worker.cfg, client, address)
    while True:
        request = None
        with worker.timeout_ctx():
            request = next(parser)
        if not request:
            return client.close()
        client.sendall(b"ok")

worker = SimpleNamespace(cfg=Config(), handle=handle)
worker.cfg.set("keepalive", 50)
store = GeventConnections(worker, SimpleNamespace(count_closed=lambda: None))
store.enter(lambda listener: "name")
read = http.unreader.SocketUnreader.chunk

def chunk(self, *arguments):
    data = read(self, *arguments)
    store.note_reading()
    return data

http.unreader.SocketUnreader.chunk = chunk
server, client = socket.socketpair()
gevent.spawn(worker.handle, None, server, "")

def seen(*sent):
    for data in sent:
        client.sendall(data)
        gevent.sleep(0.05)
    return [store.describe(each)[1].requests for each in store.in_loop(store.idle)]

print(seen(), seen(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"))
print(seen(b"POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 4\\r\\n\\r\\nbody"))
print(seen(b"POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 4\\r\\n\\r\\nbo"), seen(b"dy"))
print(seen(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\nGET"), seen(b" / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"))
(each,) = store.idle()
store.in_loop(lambda: store.forget(each))
gevent.sleep(0.05)
print(store.idle(), client.recv(100)[-2:], client.recv(100))
"""


def test_gevent_connection_is_idle_between_two_whole_requests_alone() -> None:
    pytest.importorskip("gevent")
    # A process of its own: gunicorn's parser is changed.
    done = subprocess.run([sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["[0] [1]", "[2]", "[] [3]", "[] [5]", "[] b'ok' b''"], done.stderr
