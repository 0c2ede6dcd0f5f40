"""What the adapter of asyncio's worker classes does in the loop, on a worker without gunicorn."""

from __future__ import annotations

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.board import Board
from zdd_web.gunicorn.adapter.kept_asyncio import AsyncioConnections
from zdd_web.gunicorn.sockets.exchange import Exchange
from zdd_web.gunicorn.workers import kept_connections
from zdd_web.gunicorn.workers.asyncio_adapter import AsyncioAdapter
from zdd_web.gunicorn.workers.kept_connections import KeptConnections
from zdd_web.lifecycle import Phase


class Adapter(AsyncioAdapter[Any]):
    def make_store(self) -> AsyncioConnections[Any]:
        return AsyncioConnections(self.runtime.kept, lambda: (), lambda: ())


def test_worker_looks_into_the_exchange_as_soon_as_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    # The gate may open right after a turn, and the next one is far.
    monkeypatch.setattr(kept_connections, "TURN", 1000.0)
    board, pair = Board.private(), Exchange()
    board.header.phase = Phase.SERVING
    listener = socket.create_server(("127.0.0.1", 0))
    worker = SimpleNamespace(
        notify=lambda: None, handle_exit=None, sockets=[listener], timeout=30, cfg=SimpleNamespace(backlog=1)
    )
    runtime: Any = SimpleNamespace(
        worker=worker, board=board, slot=board.slot(0), pid=os.getpid(), process=SimpleNamespace(going=False),
        is_finishing=False, notify=lambda: None, end=SimpleNamespace(threads_left=lambda **_: ()),
    )  # fmt: skip
    runtime.kept = KeptConnections(runtime, pair)
    adapter = Adapter(runtime)
    runtime.kept.store = adapter.store
    adapter._at_gate = True

    async def play() -> None:
        loop = asyncio.get_running_loop()
        adapter.enter_loop()
        server = await loop.create_server(asyncio.Protocol, sock=listener)
        assert loop.remove_reader(runtime.kept.take_fd)
        server.close()

    asyncio.run(play())
    pair.close()
