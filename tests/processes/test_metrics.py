"""Metrics of a real service: they go on where workers, and generations, end."""

from __future__ import annotations

import http.client
import os
import re
import signal
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes.harness import Service, settled, until


def scrape(service: Service) -> dict[str, float]:
    """Ask the probe port; samples with labels are named `name{value}`."""
    port = int(re.findall(r"event=probes\.listening address=127\.0\.0\.1:(\d+)", service.log())[-1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    assert response.status == 200, text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name.removeprefix("zdd_web_") + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for sample in samples
    }


def counters(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if "_total" in name}


def test_counters_go_on_across_workers_and_generations(service: Service):
    service.configure(probe_bind="127.0.0.1:0").start()
    for _ in range(5):
        assert service.get().status == 200
    service.get("/readyz")
    first = until("six requests", lambda: scrape(service) if scrape(service)["requests_total"] >= 6 else None, service)
    assert first["phase{serving}"] == 1
    assert first["workers{serving}"] == 2
    assert first["server_errors_total"] == 0
    assert first[f"accept_queue_limit{{http://127.0.0.1:{service.port}}}"] > 0

    # A crash, a worker that is replaced, and one that is told to go.
    os.kill(settled(service, 2)[0], signal.SIGKILL)
    workers = settled(service, 2)
    until("the loss", lambda: scrape(service)["workers_lost_total"] == 1, service)
    service.signal(signal.SIGHUP)
    settled(service, 2, without=workers)
    second = scrape(service)
    assert second["requests_total"] >= first["requests_total"]

    service.deploy("2", at_import="import nonsense")
    service.signal(signal.SIGUSR2)
    service.wait_for("event=upgrade.failed")
    until("the failure", lambda: scrape(service)["upgrades_total{failed}"] == 1, service)
    service.deploy("3")
    service.signal(signal.SIGUSR2)
    service.wait_for("generation=1 event=phase.stopped")
    third = until("generation 2", lambda: scrape(service) if scrape(service)["generation"] == 2 else None, service)
    for name, value in counters(second).items():
        assert third[name] >= value, name
    # What the old generation came to in the end.
    third = until(
        "its last words", lambda: scrape(service) if scrape(service)["upgrades_total{done}"] else None, service
    )
    assert third["upgrades_total{done}"] == 1
    assert third["upgrades_total{failed}"] == 1
    assert third["workers_lost_total"] == 1
    assert third["last_upgrade_seconds"] > 0
    service.stop()


def test_what_the_app_cannot_answer_is_a_server_error_and_a_probe_is_none(service: Service):
    service.write_app(
        """
        import zdd_web
        from zdd_web.wsgi import ProbeMiddleware
        zdd_web.check("never", critical=True, kind="liveness")(lambda: None)

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/raise":
                raise RuntimeError("as the test wants it")
            start_response(environ["PATH_INFO"][1:] + " Said", [("Content-Length", "0")])
            return [b""]

        app = ProbeMiddleware(app)
        """
    )
    service.configure(probe_bind="127.0.0.1:0", drain_delay=20, grace_period=30).start()
    for path, status in (("/500", 500), ("/503", 503), ("/404", 404), ("/200", 200), ("/raise", 500)):
        assert service.get(path).status == status
    until("three errors", lambda: scrape(service)["server_errors_total"] == 3, service)
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    assert service.get("/readyz").status == 503
    assert service.get("/200").status == 200
    found = until("the last one", lambda: scrape(service) if scrape(service)["requests_total"] == 7 else None, service)
    assert found["server_errors_total"] == 3
    assert found["late_requests_total"] == 1
    assert found["phase{lame_duck}"] == 1
    service.signal(signal.SIGTERM)
    service.ends()


def test_background_work_is_counted_and_its_age(make_service: Callable[..., Service]):
    service = make_service("gthread")
    service.configure(probe_bind="127.0.0.1:0", grace_period=2).start()
    service.get("/job?seconds=600")
    found = until("a job", lambda: scrape(service) if scrape(service)["background_tasks"] else None, service)
    assert found["background_tasks"] == 1
    until("its age", lambda: scrape(service)["background_oldest_seconds"] > found["background_oldest_seconds"], service)
    service.stop(status=1)


@pytest.mark.parametrize("details", ["", "never"])
def test_names_of_checks_are_for_those_who_may_see_them(make_service: Callable[..., Service], details: str):
    service = make_service("gthread")
    service.deploy("1", at_import="zdd_web.check('database')(lambda: None)")
    service.configure(probe_bind="127.0.0.1:0", details=details).start()
    assert ("check_passes{database}" in scrape(service)) is (details != "never")
    service.stop()
