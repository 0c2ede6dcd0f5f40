"""nginx keeps its upstream connections across upgrades: no error, and no connection is opened anew."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.kept_clients import REQUESTS, ask
from tests.processes.harness import PATIENCE, Service, until
from tests.processes.test_listeners import free_port

CLIENTS = 4

NGINX = """
daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000;
    # No second try elsewhere: what fails shall be seen.
    upstream app {{ server 127.0.0.1:{upstream} fail_timeout=0; keepalive 8; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_next_upstream off;
        }}
    }}
}}
"""

APP = """
    def app(environ, start_response):
        environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Length", "2"), ("X-Upstream-Port", environ["REMOTE_PORT"])])
        return [b"ok"]
"""


@contextlib.contextmanager
def nginx(directory: Path, upstream: int) -> Iterator[int]:
    """Run nginx in front of a port; yields its own."""
    directory.mkdir()
    port = free_port()
    configuration = directory / "nginx.conf"
    configuration.write_text(NGINX.format(directory=directory, upstream=upstream, port=port))
    process = subprocess.Popen(
        ["nginx", "-p", str(directory), "-c", str(configuration), "-e", str(directory / "error.log")]
    )
    try:
        until("nginx's pid file", lambda: (directory / "nginx.pid").exists() or process.poll() is not None)
        assert process.poll() is None, (directory / "error.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait()


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
            while not self._ends.wait(0.002):
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
def test_upstream_connections_of_nginx_stay_across_five_upgrades(
    make_service: Callable[..., Service], worker_class: str, tmp_path: Path
):
    service = make_service(worker_class)
    service.write_app(APP)
    service.arguments += ["--keep-alive", "120"]
    service.start()
    with nginx(tmp_path / "nginx", service.port) as port, Clients(port) as clients:
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
