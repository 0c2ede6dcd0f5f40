"""Workers that come and go: slots, replacement, reload."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.processes.harness import APP, Service, answered_from, serving_workers, settled, until
from zdd_web.system import proc


def test_slots_are_reused_and_name_live_processes(service: Service):
    service.start()
    with service.under_load() as load:
        for change, count in ((signal.SIGTTIN, 3), (signal.SIGTTIN, 4), (signal.SIGTTOU, 3), (signal.SIGTTOU, 2)):
            service.signal(change)
            settled(service, count)
        for _ in range(3):
            before = settled(service, 2)
            service.signal(signal.SIGHUP)
            settled(service, 2, without=before)
        answered_from(load, 50)
    board = service.is_active().board
    used = [slot.base for slot in board.slots() if slot.order.taken]
    # Sixteen workers have been here; the two that are left stand in the first few places.
    assert max(used) < board.slot(6).base
    for worker in service.snapshot().workers:
        assert proc.alive(worker.pid, worker.start)
    service.stop()


def test_a_crashed_worker_is_replaced_and_its_slot_freed(service: Service):
    service.start()
    before = settled(service, 2)
    os.kill(before[0], signal.SIGKILL)
    assert before[1] in settled(service, 2, without=before[:1])
    service.stop()


def test_max_requests_replaces_workers_without_a_lost_request(service: Service):
    service.arguments = ["--max-requests", "50"]
    service.start()
    first = settled(service, 2)
    with service.under_load() as load:
        until("recycled workers", lambda: len(service.matches("event=worker.recycled")) >= 4, service)
        answered_from(load, 50)
    assert not set(first) & set(settled(service, 2))
    service.stop()


def test_reload_brings_new_code_without_a_stall(service: Service):
    service.start()
    service.deploy("2", at_import="time.sleep(1)")
    with service.under_load() as load:
        service.signal(signal.SIGHUP)
        until("version 2", lambda: service.get().version == "2", service)
        settled(service, 2)
        answered_from(load, 50)
    assert service.snapshot().generation == 1
    service.stop()


def test_reload_with_broken_code_is_refused_and_the_old_workers_go_on(service: Service):
    service.start()
    before = settled(service, 2)
    service.deploy("2", at_import="raise RuntimeError('boom at import')")
    service.signal(signal.SIGHUP)
    line = service.wait_for("event=refused signal=HUP")
    assert "boom at import" in line
    assert settled(service, 2) == before
    conf = service.directory / "gunicorn.conf.py"
    good = conf.read_text()
    conf.write_text("workers = (\n")
    service.signal(signal.SIGHUP)
    assert "SyntaxError" in service.wait_for("event=refused signal=HUP", times=2)
    assert settled(service, 2) == before
    conf.write_text(good)
    service.deploy("3")
    service.signal(signal.SIGHUP)
    until("version 3", lambda: service.get().version == "3", service)
    service.stop()


def test_broken_code_on_disk_does_not_end_a_generation_that_has_served(service: Service):
    service.start()
    service.deploy("2", at_import="raise RuntimeError('boom at import')")
    before = settled(service, 2)
    os.kill(before[0], signal.SIGKILL)
    service.wait_for("event=worker.boot_failed", times=2)
    assert serving_workers(service) == [before[1]]
    assert service.get().version == "1"
    service.deploy("3")
    assert before[1] in settled(service, 2)
    service.stop()


def test_probes_answer_on_the_apps_port(service: Service):
    service.start()
    for path in ("/livez", "/readyz", "/healthz", "/readyz/"):
        reply = service.get(path)
        assert (reply.status, reply.body) == (200, "ok\n"), path
        assert reply.headers["Cache-Control"] == "no-store"
    service.stop()


def test_a_request_in_flight_is_counted_and_counted_out(service: Service):
    from concurrent.futures import ThreadPoolExecutor

    service.start()
    requests = sum(worker.requests for worker in service.snapshot().workers)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=1")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        reply.result()
    until("its end", lambda: service.snapshot().in_flight == 0, service)
    assert sum(worker.requests for worker in service.snapshot().workers) == requests + 1
    began = time.monotonic()
    service.get("/job?seconds=1")
    until("the task", lambda: service.snapshot().tasks == 1 or time.monotonic() - began > 5, service)
    until("its end", lambda: service.snapshot().tasks == 0, service)
    service.stop()


def test_worker_that_its_timeout_ends_while_it_boots_has_failed_to_boot(make_service: Callable[..., Service]):
    service = make_service("sync", workers=1)
    service.arguments = ["--timeout", "1"]
    service.configure(warmup=["/slow?seconds=600"]).spawn()
    service.wait_for(r"event=worker\.boot_failed .*retry_in=0\.5")
    service.signal(signal.SIGTERM)
    service.ends(status=None)


def test_workers_share_the_memory_that_they_inherit_after_a_reload_too(make_service: Callable[..., Service]) -> None:
    service = make_service("sync", workers=1)
    service.write_app(APP.replace('body = f"{VERSION}', 'import gc; body = f"{gc.get_freeze_count() > 1000}'))
    service.start()
    assert service.get().version == "True"
    before = settled(service, 1)
    service.signal(signal.SIGHUP)
    settled(service, 1, without=before)
    assert service.get().version == "True"
    service.stop()
