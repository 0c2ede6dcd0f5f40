"""Which connections of the event loops' HTTP protocols have a part of a request's head."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.gunicorn.adapter import request_heads

HEAD = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbody"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 2), "sockname": ("127.0.0.1", 1)}.get(name, default)

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, chunks: Any) -> None:
        self.write(b"".join(chunks))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def h11_connection(loop: asyncio.AbstractEventLoop) -> Any:
    pytest.importorskip("uvicorn")
    from uvicorn.protocols.http.h11_impl import H11Protocol

    return uvicorn_connection(loop, H11Protocol)


def httptools_connection(loop: asyncio.AbstractEventLoop) -> Any:
    pytest.importorskip("uvicorn")
    pytest.importorskip("httptools")
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    return uvicorn_connection(loop, HttpToolsProtocol)


def uvicorn_connection(loop: asyncio.AbstractEventLoop, protocol: Any) -> Any:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    config = Config(app, interface="asgi3", lifespan="off", log_config=None, timeout_keep_alive=1)
    config.load()
    return protocol(config, ServerState(), {}, _loop=loop)


def asgi_connection(loop: asyncio.AbstractEventLoop) -> Any:
    if importlib.util.find_spec("gunicorn.asgi") is None:
        pytest.skip("this gunicorn has no asgi worker")
    from gunicorn.asgi.protocol import ASGIProtocol
    from gunicorn.config import Config
    from gunicorn.glogging import Logger

    class Noting(ASGIProtocol):
        pass

    request_heads.note_heads(Noting)
    request_heads.answer_late_requests(Noting)
    cfg = Config()
    cfg.set("keepalive", 1)
    worker = SimpleNamespace(cfg=cfg, log=Logger(cfg), asgi=app, loop=loop, alive=True, state={})
    worker.nr, worker.nr_conns, worker.max_requests = 0, 0, 9
    return Noting(worker)


Make = Callable[[asyncio.AbstractEventLoop], Any]
KINDS: list[tuple[Make, Callable[[Any], bool]]] = [
    (asgi_connection, request_heads.gunicorn_reads_a_head),
    (h11_connection, request_heads.uvicorn_reads_a_head),
    (httptools_connection, request_heads.uvicorn_reads_a_head),
]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    for task in asyncio.all_tasks(made):
        task.cancel()
    made.run_until_complete(asyncio.sleep(0))
    made.close()


@pytest.mark.parametrize(("make", "reads_a_head"), KINDS)
def test_a_connection_has_a_part_of_a_head_from_its_first_byte_to_its_last(
    make: Make, reads_a_head: Callable[[Any], bool], loop: asyncio.AbstractEventLoop
) -> None:
    async def play() -> None:
        connection, transport = make(loop), Transport()
        connection.connection_made(transport)
        assert not reads_a_head(connection)
        for round_, request in enumerate((HEAD, POST, HEAD), 1):
            for cut in (1, len(b"GET / HTTP/1.1\r\nHo")):
                connection.data_received(request[:cut])
                assert reads_a_head(connection), (round_, cut)
                request = request[cut:]
            await asyncio.sleep(0)
            assert reads_a_head(connection), round_
            connection.data_received(request)
            assert not reads_a_head(connection), round_
            for _ in range(100):
                await asyncio.sleep(0)
            assert transport.written.count(b"HTTP/1.1 200") == round_
            assert not reads_a_head(connection), round_
        connection.data_received(HEAD[:5])
        assert reads_a_head(connection)
        transport.close()
        assert not reads_a_head(connection)
        connection.connection_lost(None)

    loop.run_until_complete(play())


@pytest.mark.parametrize(("make", "reads_a_head"), KINDS)
def test_an_empty_line_after_a_body_is_not_the_beginning_of_a_head(
    make: Make, reads_a_head: Callable[[Any], bool], loop: asyncio.AbstractEventLoop
) -> None:
    async def play() -> None:
        connection = make(loop)
        connection.connection_made(Transport())
        connection.data_received(POST)
        for _ in range(100):
            await asyncio.sleep(0)
        connection.data_received(b"\r\n")
        assert not reads_a_head(connection)
        connection.connection_lost(None)

    loop.run_until_complete(play())


@pytest.mark.parametrize(("make", "reads_a_head"), KINDS)
def test_a_connection_with_a_part_of_a_head_is_not_closed_as_idle(
    make: Make, reads_a_head: Callable[[Any], bool], loop: asyncio.AbstractEventLoop
) -> None:
    async def play() -> None:
        connection, transport = make(loop), Transport()
        connection.connection_made(transport)
        connection.data_received(HEAD)
        for _ in range(100):
            await asyncio.sleep(0)
        connection.data_received(HEAD[:20])
        assert reads_a_head(connection)
        # The timer of an idle connection is one second.
        await asyncio.sleep(1.2)
        assert not transport.is_closing()
        connection.data_received(HEAD[20:])
        for _ in range(100):
            await asyncio.sleep(0)
        assert transport.written.count(b"HTTP/1.1 200") == 2
        connection.connection_lost(None)

    loop.run_until_complete(play())


def test_a_request_that_arrives_in_the_turn_in_which_keepalive_ends_is_answered(
    loop: asyncio.AbstractEventLoop,
) -> None:
    # gunicorn's own closes both.
    here, client = socket.socketpair()

    class OnSocket(Transport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return here if name == "socket" else super().get_extra_info(name, default)

    async def play() -> None:
        connection, transport = asgi_connection(loop), OnSocket()
        connection.connection_made(transport)
        connection.data_received(HEAD)
        await turns()
        # Read already, and not yet read.
        connection.data_received(HEAD)
        connection._keepalive_timeout()
        assert not connection._closed
        await turns()
        assert transport.written.count(b"HTTP/1.1 200") == 2
        client.send(HEAD)
        connection._keepalive_timeout()
        assert not connection._closed
        connection.data_received(here.recv(100))
        await turns()
        assert transport.written.count(b"HTTP/1.1 200") == 3
        connection._keepalive_timeout()
        assert connection._closed
        connection.connection_lost(None)

    async def turns() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    with here, client:
        loop.run_until_complete(play())
