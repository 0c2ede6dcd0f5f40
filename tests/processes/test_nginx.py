"""A Unix socket behind nginx, as many deployments have it: nginx's clients see no error across upgrades."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.processes.harness import Service, answered_from, lost, until
from tests.processes.test_listeners import bound_to, start
from zdd_web.cli.rehearse.load import Load, LoadThread

NGINX = """
daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000;
    # No second try elsewhere: what fails shall be seen.
    upstream app {{ server {upstream} fail_timeout=0; keepalive 8; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_next_upstream off;
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(directory: Path, upstream: str) -> Iterator[int]:
    """Run nginx in front of an address, as nginx writes it; yields its port."""
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


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.begins_first
def test_clients_of_nginx_see_no_error_across_ten_upgrades(
    make_service: Callable[..., Service], worker_class: str, tmp_path: Path
):
    path = tmp_path / "app.sock"
    service = make_service(worker_class)
    service.settings["generation_header"] = "X-Zdd-Generation"
    start(bound_to(service, f"unix:{path}"))
    with nginx(tmp_path / "nginx", f"unix:{path}") as port:
        load = LoadThread(Load("127.0.0.1", port, ("/",), 8, 0.5, 0.1, 20.0, pace=0.1))
        with load:
            answered_from(load, 50)
            for _ in range(10):
                service.upgrade()
                answered_from(load, 30)
        assert lost(load) == [], ((tmp_path / "nginx" / "error.log").read_text(), service.log())
        assert max(sample.generation or 0 for sample in load.samples) == 11
    service.stop()
