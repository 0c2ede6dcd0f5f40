"""Clients that close late, or connect and send nothing: they cost a leaving worker little, and the others nothing."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.processes.harness import PATIENCE, Service, connections, until

#: gunicorn waits up to two seconds for each lazy client; a stop or an upgrade waits until its end for a silent one.
MANY, SOON = 24, 8.0


@contextlib.contextmanager
def clients(service: Service, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = [socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) for _ in range(count)]
        yield [stack.enter_context(each) for each in made]


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_clients_that_do_not_close_stall_nobody_in_a_lame_duck(service: Service) -> None:
    service.workers = 1
    service.configure(drain_delay=60, grace_period=90).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    with clients(service, MANY) as lazy:
        for client in lazy:
            client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        began = time.monotonic()
        for client in lazy:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        assert service.get().status == 200
        assert time.monotonic() - began < SOON
        # Nor is the end held up for longer than it takes for one of them.
        service.signal(signal.SIGTERM)
        service.ends(patience=SOON)


def test_a_reply_in_a_lame_duck_outlives_a_body_that_the_app_does_not_read(make_service) -> None:
    service = make_service("gthread")
    service.configure(drain_delay=60, grace_period=90).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    size = 16 << 20
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % size)
        client.sendall(bytes(size))
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.getheader("Connection")) == (200, "close")
        assert response.read().startswith(b"1 1 ")
    service.signal(signal.SIGTERM)
    service.ends()


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_clients_that_send_nothing_hold_up_neither_an_upgrade_nor_a_stop(service: Service) -> None:
    service.workers = 1
    service.arguments = ["--keep-alive", "75"]
    service.configure(grace_period=60).start()
    with clients(service, 8):
        until("the connections", lambda: taken(service), service)
        service.signal(signal.SIGUSR2)
        service.wait_for("event=phase.retiring")
        until("the end of the old generation", lambda: len(service.generations()) == 1, service, SOON)
        with clients(service, 8):
            until("the connections", lambda: taken(service), service)
            service.signal(signal.SIGTERM)
            service.ends(status=0, patience=SOON)


def taken(service: Service) -> bool:
    (worker,) = service.snapshot().workers
    return bool(connections(worker.pid))
