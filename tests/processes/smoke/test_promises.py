"""One short scene for each promise and each mode: the first answer to "does it still work?".

Each of them is told at length, with what may go wrong, in a file of its own beside this directory.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes.harness import (
    Service,
    answered_from,
    command_line,
    generations_of,
    settled,
    skip_unless_installed,
    until,
)
from tests.processes.test_systemd_mode import activated, start
from tests.processes.test_takeover import another, configure, take_over
from tests.processes.test_worker_classes import deploy

Make = Callable[..., Service]

#: Fixtures of other scenes.
__all__ = ["activated"]


def upgrades_under_load(service: Service, deploy: Callable[[Service, str], None] = Service.deploy) -> None:
    """Deploy a second version to a service that runs, and lose nothing."""
    with service.under_load(8) as load:
        deploy(service, "2")
        service.upgrade()
        until("the new version", lambda: service.get().version == "2", service)
        answered_from(load, 50)


# -- a successful upgrade loses nothing


def test_upgrade_loses_nothing(make_service: Make) -> None:
    service = make_service("sync", generation_header="X-Zdd-Generation").start()
    with service.under_load(8) as load:
        service.deploy("2")
        service.upgrade()
        answered_from(load, 50)
    assert generations_of(load) == {1, 2}
    assert service.get().version == "2"
    service.stop()
    service.leaves_no_trace()


def test_upgrade_in_an_event_loop_loses_nothing(make_service: Make) -> None:
    service = make_service(skip_unless_installed("asgi"))
    deploy(service, "1")
    upgrades_under_load(service.start(), deploy)
    service.stop()


# -- a failed upgrade costs nothing


def test_code_that_cannot_be_imported_costs_nothing(make_service: Make) -> None:
    service = make_service("gthread").start()
    service.deploy("2", at_import="raise ImportError('boom at import')")
    with service.under_load(8) as load:
        assert "boom at import" in service.upgrade(expect="upgrade.failed")
        answered_from(load, 50)
    assert service.get().version == "1"
    service.until_alone()
    service.stop()


def test_code_that_hangs_is_given_up(make_service: Make) -> None:
    service = make_service("gthread", upgrade_timeout=3).start()
    service.deploy("2", at_import="time.sleep(600)")
    assert "UPGRADE_TIMEOUT = 3 s" in service.upgrade(expect="upgrade.failed")
    assert service.get().version == "1"
    service.until_alone()
    service.stop()


# -- a stop finishes what was begun


def test_stop_finishes_a_request_and_a_job(make_service: Make) -> None:
    service = make_service("gthread").start()
    service.get("/job?seconds=2")
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=1")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.stop()
        assert reply.result().status == 200
    assert service.matches("job finished")
    service.leaves_no_trace()


def test_worker_that_is_recycled_finishes_its_job(make_service: Make) -> None:
    service = make_service("sync", workers=1)
    service.arguments = ["--max-requests", "3"]
    service.start()
    first = service.get("/job?seconds=1").pid
    while not service.matches("event=worker.recycled"):
        assert service.get().status == 200
    until("the worker's end", lambda: first not in service.processes(), service)
    assert service.matches("job finished")
    service.stop()


# -- probes tell the truth


def test_readiness_falls_before_anything_is_refused(make_service: Make) -> None:
    service = make_service("gthread", drain_delay=20, grace_period=30).start()
    assert service.get("/readyz").status == 200
    service.signal(signal.SIGTERM)
    service.wait_for(r"event=phase\.lame_duck")
    assert [service.get(path).status for path in ("/readyz", "/livez", "/")] == [503, 200, 200]
    # The second one ends the lame duck.
    service.stop()


# -- a reload


def test_hup_brings_new_code_worker_by_worker(make_service: Make) -> None:
    service = make_service("gthread").start()
    old = settled(service, 2)
    service.deploy("2")
    with service.under_load(8) as load:
        service.signal(signal.SIGHUP)
        settled(service, 2, without=old)
        answered_from(load, 50)
    assert (service.get().version, service.get().generation) == ("2", 1)
    service.stop()


# -- every way to listen, and every way to replace a master


def test_upgrade_with_a_queue_for_each_worker_loses_nothing(make_service: Make) -> None:
    service = make_service("sync", listener="reuseport").start()
    upgrades_under_load(service)
    service.stop()


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate")
def test_upgrade_on_a_socket_of_systemd_loses_nothing(activated: Make) -> None:
    service = activated("web")
    start(service)
    upgrades_under_load(service)
    service.stop(status=None)


def test_takeover_loses_nothing(make_service: Make) -> None:
    old = configure(make_service("gthread", takeover=True)).start()
    new = another(make_service, old)
    new.deploy("2")
    with old.under_load(8) as load:
        take_over(new, old)
        old.ends(0)
        answered_from(load, 50)
    assert (old.get().version, old.get().generation) == ("2", 2)
    new.stop()


def test_kept_pid_outlives_its_master(make_service: Make) -> None:
    service = make_service("gthread", keep_pid=True).start()
    assert service.process is not None
    kept = service.process.pid
    upgrades_under_load(service)
    until("the keeper", lambda: command_line(kept)[1:3] == ["-m", "zdd_web.keeper"], service)
    service.signal(signal.SIGTERM, kept)
    service.ends(0)
