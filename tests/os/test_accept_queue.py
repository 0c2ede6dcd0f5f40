"""The door of a listener, with real connections."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from zdd_web.listeners import accept_queue
from zdd_web.listeners.accept_queue import Admission, block_new_connections, is_empty


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    try:
        server = socket.create_server((request.param, 0), family=family, backlog=64)
    except OSError as error:
        pytest.skip(f"no {request.param} here: {error}")
    with server:
        server.setblocking(False)
        yield server


def connect(listener: socket.socket, timeout: float = 5.0) -> socket.socket:
    return socket.create_connection(listener.getsockname()[:2], timeout=timeout)


def needs_the_privilege(listener: socket.socket) -> None:
    if block_new_connections(listener) is not Admission.BLOCKED:
        pytest.skip("needs CAP_NET_ADMIN for a filter on a listener")


def test_who_waits_when_the_door_closes_is_served(listener: socket.socket) -> None:
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(listener)) for _ in range(8)]
        block_new_connections(listener)
        for client in waiting:
            served, _ = listener.accept()
            with served:
                client.sendall(b"ask")
                assert served.recv(3) == b"ask"
                served.sendall(b"answer")
                assert client.recv(6) == b"answer"
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_nobody_passes_a_closed_door_and_the_kernel_says_refused_once_the_listener_is_gone(
    listener: socket.socket,
) -> None:
    needs_the_privilege(listener)
    with pytest.raises(TimeoutError):
        connect(listener, timeout=0.1)
    assert is_empty([listener])
    address = listener.getsockname()[:2]
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_without_the_privilege_the_queue_is_narrowed(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    # No such option: refused by the kernel as the real one is to whom it is not permitted.
    monkeypatch.setattr(accept_queue, "SO_ATTACH_FILTER", 9999)
    assert block_new_connections(listener) is Admission.LIMITED
    # What the kernel calls a backlog of 0 is one place; who finds it taken tries again by itself.
    with connect(listener), pytest.raises(TimeoutError):
        for _ in range(64):
            connect(listener, timeout=0.1).close()


def test_unix_socket_is_narrowed(tmp_path: object) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/socket")
        server.listen(64)
        assert block_new_connections(server) is Admission.LIMITED


def test_queue_is_empty_until_somebody_waits_in_one_of_them(listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert is_empty([listener, other])
        with connect(other):
            deadline = time.monotonic() + 5
            while is_empty([listener, other]):
                assert time.monotonic() < deadline
            assert is_empty([listener])
    assert is_empty([])
