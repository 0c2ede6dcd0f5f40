"""nginx keeps its upstream connections across upgrades: no error, and no connection is opened anew."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kept_clients import REQUESTS, ask
from tests.processes.harness import PATIENCE, Service, until
from tests.processes.test_nginx import nginx

CLIENTS = 4

APP = """
    def app(environ, start_response):
        environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Length", "2"), ("X-Upstream-Port", environ["REMOTE_PORT"])])
        return [b"ok"]
"""


class Clients:
    """Clients of nginx, each with one connection, that ask until they are stopped."""

    def __init__(self, port: int) -> None:
        self.upstream_ports: set[str] = set()
        self.failures: list[str] = []
        self.answered = 0
        self._port, self._ends = port, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        for each in self._threads:
            each.join()

    def _run(self, number: int) -> None:
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as connection:
            while not self._ends.wait(0.01):
                number += 1
                try:
                    head = ask(connection, REQUESTS[number % 2]).lower()
                except OSError as error:
                    self.failures.append(str(error))
                    return
                if b" 200 " not in head:
                    self.failures.append(head.decode())
                else:
                    self.upstream_ports.add(head.partition(b"x-upstream-port: ")[2].split(b"\r\n")[0].decode())
                self.answered += 1


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
@pytest.mark.begins_first
def test_upstream_connections_of_nginx_stay_across_five_upgrades(
    make_service: Callable[..., Service], worker_class: str, tmp_path: Path
):
    service = make_service(worker_class)
    service.write_app(APP)
    service.arguments += ["--keep-alive", "120"]
    service.start()
    with nginx(tmp_path / "nginx", f"127.0.0.1:{service.port}") as port, Clients(port) as clients:
        until("answers", lambda: clients.answered > 100, service)
        for _ in range(5):
            service.upgrade()
            service.until_one_generation()
            target = clients.answered + 50
            until("answers of the next generation", lambda target=target: clients.answered > target, service)
    assert clients.failures == [], service.log()
    # As many as ask at a time: none was opened anew.
    assert len(clients.upstream_ports) <= CLIENTS
    service.stop()
