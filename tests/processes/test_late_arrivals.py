"""Requests that come after a stop has begun: those on new connections are counted apart from those on old ones."""

from __future__ import annotations

import http.client
import signal
from contextlib import closing

import pytest

from tests.processes.harness import APP, PATIENCE, WORKER_CLASSES, Service, skip_unless_installed
from tests.processes.test_worker_classes import ASGI_APP


def ask(connection: http.client.HTTPConnection, sender: str) -> int:
    connection.request("GET", "/", headers={"X-Forwarded-For": sender})
    response = connection.getresponse()
    response.read()
    return response.status


def connect(service: Service) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE))


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("worker_class", WORKER_CLASSES[1:])
def test_connections_from_before_the_stop_are_told_from_new_ones(make_service, worker_class: str, trusted: bool):
    service = make_service(skip_unless_installed(worker_class), workers=1)
    service.write_app(APP if worker_class in WORKER_CLASSES[:3] else ASGI_APP.replace("STARTUP", "pass"))
    service.arguments = ["--keep-alive", "30", "--forwarded-allow-ips", "127.0.0.1" if trusted else "192.0.2.1"]
    service.configure(drain_delay=30, grace_period=60).start()
    with connect(service) as first, connect(service) as second:
        assert [ask(kept, "10.0.0.1") for kept in (first, second)] == [200, 200]
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.lame_duck")
        assert ask(first, "10.0.0.1") == 200
        with connect(service) as new:
            assert ask(new, "10.0.0.2") == 200
        assert ask(second, "10.0.0.1") == 200
    # The second one ends the lame duck.
    service.signal(signal.SIGTERM)
    service.ends()
    line = service.wait_for(r"event=phase\.stopped")
    assert " late=3 " in line and " late_new=1 " in line
    assert (" late_peer=10.0.0.2 " if trusted else " late_peer=127.0.0.1:") in line
    assert "remedy=" not in line and "[INFO]" in line
