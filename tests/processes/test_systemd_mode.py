"""LISTENER = "systemd", with systemd's own starter of socket-activated programs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable

import pytest

from tests.helpers.ports import free_port
from tests.processes.harness import Service, answered_from, until

pytestmark = pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate")

#: The loop turns as often as under load, and the commit window is short.
QUICK = """
import os
os.environ["ZDD_WEB_COMMIT_WINDOW"] = "0"
"""


@pytest.fixture
def activated(make_service: Callable[..., Service]) -> Callable[..., Service]:
    """Make a service for whose first connection systemd-socket-activate waits."""

    def make(*names: str, **settings: object) -> Service:
        service = make_service("gthread", workers=1, listener="systemd", **settings)
        service.ports = [free_port() for _ in names]  # type: ignore[attr-defined]
        service.port, service.bind = service.ports[0], None  # type: ignore[attr-defined]
        listen = [word for port in service.ports for word in ("-l", f"127.0.0.1:{port}")]  # type: ignore[attr-defined]
        service.launcher = ["systemd-socket-activate", *listen, "--fdname", ":".join(names),
                            "-E", "ZDD_TEST_MARKER", "-E", "PYTHONDONTWRITEBYTECODE",
                            sys.executable, "-m", "gunicorn"]  # fmt: skip
        return service.configure(QUICK)

    return make


def start(service: Service) -> None:
    """Start it, and connect as the first client does."""
    service.spawn()
    service.wait_for("Listening on")
    assert service.get().generation == 1


def test_upgrades_under_load_lose_nothing(activated: Callable[..., Service]):
    service = activated("web")
    start(service)
    with service.under_load(8) as load:
        for generation in (2, 3, 4):
            service.upgrade()
            answered_from(load, 20)
            assert service.get().generation == generation
    service.stop(status=None)
    # The socket is not ours to close or to drain; whoever had it passed has closed it with its own end.
    assert not service.matches("Traceback")


def test_names_tell_the_probe_port_from_the_apps(activated: Callable[..., Service]):
    service = activated("web", "health", systemd_names={"web": "app", "health": "probe"})
    start(service)
    app, probes = service.ports  # type: ignore[attr-defined]
    service.port = probes
    assert service.get("/readyz").status == 200
    assert service.get("/").status == 404
    service.port = app
    assert service.get("/").status == 200
    service.upgrade()
    service.until_one_generation()
    service.port = probes
    assert service.get("/readyz").status == 200
    service.stop(status=None)


WRONG = {
    "no name for it": (["web"], {"ZDD_WEB_SYSTEMD_NAMES": "www=app"}, "'web' .* is not in SYSTEMD_NAMES"),
    "not passed": (["web"], {"ZDD_WEB_SYSTEMD_NAMES": "web=app,health=probe"}, "no socket 'health' .* was passed"),
}


def refused(service: Service) -> str:
    """Wait until a service has ended for a reason, and return the line that says it."""
    service.ends(1)
    assert not service.matches("Traceback")
    assert not service.pid_file.exists()
    (line,) = service.matches("event=settings.invalid")
    return line


@pytest.mark.parametrize("what", WRONG)
def test_sockets_that_do_not_fit_end_the_start(activated: Callable[..., Service], what: str):
    names, environ, said = WRONG[what]
    service = activated(*names)
    service.launcher[1:1] = [word for name in environ for word in ("-E", name)]
    service.environ.update(environ)
    service.spawn()
    service.wait_for("Listening on")
    with socket.create_connection(("127.0.0.1", service.port)):
        assert re.search(said, refused(service))


@pytest.mark.parametrize(
    ("option", "said"),
    [("--datagram", "is a datagram socket: write ListenStream="), ("--accept", "write Accept=no in its unit")],
)
def test_sockets_that_are_no_listeners_end_the_start(activated: Callable[..., Service], option: str, said: str):
    service = activated("web")
    service.launcher.insert(1, option)
    process = service.spawn()
    service.wait_for("Listening on")
    kind = socket.SOCK_DGRAM if option == "--datagram" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as client:
        client.connect(("127.0.0.1", service.port))
        client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert said in service.wait_for("event=settings.invalid")
    if option == "--accept":
        # It forks for each connection, and goes on.
        os.kill(process.pid, signal.SIGTERM)
        until("its end", lambda: not service.processes(), service)
    else:
        assert said in refused(service)
    assert not service.matches("Traceback")


def test_a_start_without_systemd_says_how_to_start(make_service: Callable[..., Service]):
    service = make_service("gthread", workers=1, listener="systemd")
    service.bind = None
    service.spawn()
    assert "systemd-socket-activate -l" in refused(service)
