"""What an asyncio worker accepts from: nothing that was accepted is dropped when it is closed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from zdd_web.gunicorn.workers.accepting_server import AcceptingServer


class Replying(asyncio.Protocol):
    """Replies to whatever it receives, and closes."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"reply")
        self._transport.close()


async def reply_to_what_was_accepted_before_the_close(
    make: Callable[[asyncio.AbstractEventLoop, socket.socket], Any],
) -> bytes:
    """Close a server between its accept and the next turn of the loop; return what the client received."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = await make(loop, listener)
    with socket.create_connection(listener.getsockname(), 5) as client:
        client.sendall(b"request")
        # The loop looks at its sockets once a turn, after what is due: it accepts in the next one, before the close.
        closed = asyncio.Event()
        loop.call_soon(loop.call_soon, lambda: (server.close(), closed.set()))
        await closed.wait()
        return await loop.run_in_executor(None, received, client)


def received(client: socket.socket) -> bytes:
    try:
        return client.recv(100)
    except ConnectionResetError:
        return b"reset"
    except TimeoutError:
        return b"nothing"  # until the socket is collected as garbage


async def asyncios(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> Any:
    return await loop.create_server(Replying, sock=listener)


async def ours(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> AcceptingServer:
    return AcceptingServer(loop, Replying, listener)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_asyncio_drops_what_it_has_accepted_when_its_server_is_closed() -> None:
    assert asyncio.run(reply_to_what_was_accepted_before_the_close(asyncios)) in (b"reset", b"nothing", b"")


def test_what_was_accepted_is_answered_after_the_close() -> None:
    assert asyncio.run(reply_to_what_was_accepted_before_the_close(ours)) == b"reply"
