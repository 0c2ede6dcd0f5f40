"""nginx, HAProxy and Envoy in front of two instances, on a free port of 127.0.0.1.

The settings are those of docs/how-to/load-balancers.md, and for nginx its defaults with retries off besides. None of
them sends a request again that it may have sent already.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import ServerError
from tests.helpers.ports import free_port

START_TIMEOUT = 10.0

_NGINX = """\
daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    upstream app {{
        server 127.0.0.1:{ports[0]} {server};
        server 127.0.0.1:{ports[1]} {server};
        keepalive 16;{keepalive}
        keepalive_timeout 60s;  # below gunicorn's keepalive of 75
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream {next_upstream};
        }}
    }}
}}
"""

_HAPROXY = """\
global
    maxconn 1000
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    retries 0
frontend clients
    bind 127.0.0.1:{port}
    default_backend app
backend app
    http-reuse {reuse}
    option httpchk GET /readyz
    default-server check inter 1s fall 2 rise 2
    server one 127.0.0.1:{ports[0]}
    server two 127.0.0.1:{ports[1]}
"""

#: What the names of Envoy's types begin with.
_ENVOY_TYPES = "type.googleapis.com/envoy.extensions"

_ENVOY = """\
static_resources:
  listeners:
    - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": {types}.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: app
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config: {{"@type": {types}.filters.http.router.v3.Router}}
                route_config:
                  virtual_hosts:
                    - {{name: app, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: app}}}}]}}
  clusters:
    - name: app
      type: STATIC
      connect_timeout: 5s
      common_lb_config: {{healthy_panic_threshold: {{value: 0}}}}
      health_checks:
        - {{timeout: 1s, interval: 1s, no_traffic_interval: 1s, unhealthy_threshold: 2, healthy_threshold: 1,
           http_health_check: {{path: /readyz}}}}
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": {types}.upstreams.http.v3.HttpProtocolOptions
          common_http_protocol_options: {{idle_timeout: 60s}}  # below gunicorn's keepalive of 75
          explicit_http_config: {{http_protocol_options: {{}}}}
      load_assignment:
        cluster_name: app
        endpoints:
          - lb_endpoints:
              - {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {ports[0]}}}}}}}}}
              - {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {ports[1]}}}}}}}}}
"""


@dataclass(frozen=True)
class Proxy:
    """A balancer with its settings; `command` is what runs it with its configuration file."""

    program: str
    settings: str
    configuration: Callable[[Path, int, Sequence[int]], str]
    command: Callable[[str, Path], list[str]]
    version: str

    @property
    def path(self) -> str | None:
        """Where the program is installed, None where it is not."""
        # Debian has HAProxy in /usr/sbin, which is not in every PATH.
        return shutil.which(self.program) or shutil.which(self.program, path="/usr/local/sbin:/usr/sbin:/sbin")

    def version_line(self) -> str:
        """Return what the program says of itself. Only where it is installed."""
        assert self.path
        said = subprocess.run([self.path, self.version], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = next((line for line in said.stdout.splitlines() if line.strip()), "")
        return f"{self.program}: {line.rpartition('version')[2].strip(': ')}"


def _nginx(server: str, next_upstream: str, keepalive: str = "") -> Callable[[Path, int, Sequence[int]], str]:
    return lambda directory, port, ports: _NGINX.format(
        directory=directory, port=port, ports=ports, server=server, next_upstream=next_upstream, keepalive=keepalive
    )


def _nginx_command(path: str, file: Path) -> list[str]:
    return [path, "-p", str(file.parent), "-c", str(file), "-e", "stderr"]


def _haproxy(reuse: str) -> Callable[[Path, int, Sequence[int]], str]:
    return lambda directory, port, ports: _HAPROXY.format(port=port, ports=ports, reuse=reuse)


def _haproxy_command(path: str, file: Path) -> list[str]:
    return [path, "-db", "-f", str(file)]


PROXIES = (
    Proxy("nginx", "retries off", _nginx("", "off"), _nginx_command, "-v"),
    Proxy("nginx", "its defaults", _nginx("", "error timeout"), _nginx_command, "-v"),
    Proxy("nginx", "fail_timeout=1s", _nginx("max_fails=1 fail_timeout=1s", "error timeout"), _nginx_command, "-v"),
    Proxy(
        "haproxy",
        "httpchk, retries 0",
        _haproxy("safe"),
        _haproxy_command,
        "-v",
    ),
    Proxy(
        "envoy",
        "health checks, no retries",
        lambda directory, port, ports: _ENVOY.format(types=_ENVOY_TYPES, port=port, ports=ports),
        lambda path, file: [path, "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"],
        "--version",
    ),
)

#: Those that keep connections to the instances and send any request on them, and none a second time. By default nginx
#: opens another after a thousand requests, which would be counted as opened.
KEEPING = (
    Proxy("nginx", "keepalive, retries off", _nginx("", "off", " keepalive_requests 1000000;"), _nginx_command, "-v"),
    Proxy("haproxy", "http-reuse always, retries 0", _haproxy("always"), _haproxy_command, "-v"),
)


@contextlib.contextmanager
def running(proxy: Proxy, ports: Sequence[int], is_ready: Callable[[int], bool]) -> Iterator[int]:
    """Run a balancer in front of two ports; yields its own, once `is_ready` says so of it.

    Raises `ServerError` with the end of its log when it does not start.
    """
    assert proxy.path
    with tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-") as directory:
        # nginx started as root runs as another user.
        Path(directory).chmod(0o755)
        port, file, log_path = free_port(), Path(directory, "configuration.yaml"), Path(directory, "log")
        file.write_text(proxy.configuration(Path(directory), port, ports))
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                proxy.command(proxy.path, file), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while not is_ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"{proxy.program} did not start:\n{log_path.read_text()[-2000:]}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()
