"""SIGUSR2, under load: what a deploy may do to requests, which is nothing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.processes.harness import Service, answered_from, generations_of, until
from zdd_web.lifecycle import Phase


def test_new_code_takes_over_without_a_lost_request(service: Service):
    service.configure(generation_header="X-Zdd-Generation").start()
    first = service.pid
    # Denser than usual.
    with service.under_load(16, pause=0.02) as load:
        for number in (2, 3):
            service.deploy(str(number))
            service.upgrade()
            answered_from(load, 100)
    assert generations_of(load) == {1, 2, 3}
    assert service.get().version == "3"
    assert service.pid != first
    assert service.pid_file.read_text() == f"{service.pid}\n"
    service.stop()
    assert not service.is_open()
    assert not service.pid_file.exists()


def test_no_answer_of_the_new_generation_before_it_is_ready(service: Service):
    # One worker of the two takes its time; the quick one must wait for it.
    service.configure(generation_header="X-Zdd-Generation").start()
    slow_once = """
    try:
        os.mkdir("first")
    except FileExistsError:
        time.sleep(2)
    """
    service.deploy("2", at_import="\n".join(line[4:] for line in slow_once.splitlines()))
    with service.under_load() as load:
        service.upgrade()
        answered_from(load, 100)
    ready_at = service.is_active().board.header.ready_at / 1e9
    assert [sample for sample in load.samples if sample.generation == 2 and sample.ended < ready_at] == []
    assert generations_of(load) == {1, 2}


def test_code_that_raises_at_import_costs_nothing(service: Service):
    service.start()
    before = service.pid
    service.deploy("2", at_import="raise ImportError('boom at import')")
    with service.under_load() as load:
        line = service.upgrade(expect="upgrade.failed")
        answered_from(load, 100)
    assert "boom at import" in line
    assert service.pid == before
    assert service.get().version == "1"
    assert len(service.processes()) == 1 + service.workers
    service.deploy("3")
    service.upgrade()
    assert until("version 3", lambda: service.get().version == "3")
    service.stop()
    assert not service.is_open()


def test_code_that_hangs_at_import_is_given_up(service: Service):
    service.configure(upgrade_timeout=10).start()
    service.deploy("2", at_import="time.sleep(600)")
    with service.under_load() as load:
        line = service.upgrade(expect="upgrade.failed")
        answered_from(load, 100)
    assert "UPGRADE_TIMEOUT = 10 s" in line
    assert "2 booting" in line
    assert service.get().version == "1"
    service.until_alone()
    service.stop()
    assert not service.is_open()


@contextmanager
def answered_by_the_first(service: Service, seconds: int) -> Iterator[None]:
    """A slow request to the first generation, which answers it whatever is done meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, f"/slow?seconds={seconds}")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        yield
        assert reply.result().generation == 1


def test_a_slow_request_outlives_its_generation(service: Service):
    service.start()
    with answered_by_the_first(service, seconds=4):
        service.upgrade()
        until("the new generation", lambda: service.get().generation == 2, service)
    service.wait_for("generation=1 event=phase.stopped")
    service.stop()


def test_a_third_generation_starts_while_the_first_still_drains(service: Service):
    service.start()
    with answered_by_the_first(service, seconds=6):
        service.upgrade()
        service.upgrade()
        assert [each.board.header.generation for each in service.generations()][-1] == 3
    service.wait_for("generation=1 event=phase.stopped")
    assert service.get().generation == 3
    assert not service.matches("successor.lost")
    service.stop()


def test_stopping_the_new_generation_does_not_bring_the_old_one_back(service: Service):
    service.start()
    with answered_by_the_first(service, seconds=4):
        service.upgrade()
        service.signal(signal.SIGTERM)
        service.wait_for("generation=2 event=phase.stopped")
    service.ends(status=None)
    assert not service.matches("successor.lost")
    assert not service.is_open()


def test_the_old_generation_returns_when_the_new_one_is_killed_while_it_retires(service: Service):
    service.start()
    first = service.pid
    with answered_by_the_first(service, seconds=5):
        service.upgrade()
        service.wait_for("generation=1 event=phase.retiring")
        service.signal(signal.SIGKILL, service.pid)
        service.wait_for("event=successor.lost")
        until("the old one's office", lambda: service.pid_file.read_text() == f"{first}\n", service)
    until("an answer", lambda: service.get().generation == 1, service)
    service.until_alone()
    service.upgrade()
    until("an answer", lambda: service.get().generation == 2, service)
    service.stop(status=0)


def test_a_second_usr2_is_refused_with_the_reason(service: Service):
    service.start()
    service.deploy("2", at_import="time.sleep(1)")
    service.signal(signal.SIGUSR2)
    service.wait_for("event=upgrade.started")
    service.signal(signal.SIGUSR2)
    assert "an upgrade is under way" in service.wait_for("event=refused")
    service.wait_for("event=upgrade.committed")
    service.stop()


def test_stop_cancels_an_upgrade(service: Service):
    service.start()
    service.deploy("2", at_import="time.sleep(600)")
    service.signal(signal.SIGUSR2)
    service.wait_for("event=upgrade.started")
    service.wait_for("generation=2 event=boot.started")
    service.stop()
    assert service.matches("event=upgrade.cancelled")
    assert not service.is_open()


def test_a_configuration_that_does_not_load_costs_nothing(service: Service):
    service.start()
    conf = service.directory / "gunicorn.conf.py"
    good = conf.read_text()
    for bad, said in (
        ("raise SystemExit('not today')", "not today"),
        ("workers = (", "SyntaxError"),
        ("1/0", "ZeroDiv"),
    ):
        conf.write_text(f"{bad}\n{good}")
        assert said in service.upgrade(expect="upgrade.failed")
        # What it printed is not lost: it stands in the service's own stderr.
        assert service.matches(said)
    conf.write_text(good)
    service.upgrade()
    service.stop()


def test_phase_is_serving_again_in_the_successor(service: Service):
    service.start()
    service.upgrade()
    assert service.snapshot().phase is Phase.SERVING
    assert service.snapshot().generation == 2
    assert service.snapshot().predecessor_pid != 0
    service.stop()


def launches(service: Service):
    (service.directory / "factory.py").write_text("from app import app\ndef create():\n    return app\n")
    (service.directory / "conf_module.py").write_text((service.directory / "gunicorn.conf.py").read_text())
    scripts = sys.executable.rpartition("/")[0]
    return {
        "console script": ([f"{scripts}/gunicorn"], ["app:app"]),
        "python -m": ([sys.executable, "-m", "gunicorn"], ["app:app"]),
        "python -X dev -m": ([sys.executable, "-X", "dev", "-m", "gunicorn"], ["app:app"]),
        "-c file": ([sys.executable, "-m", "gunicorn"], ["-c", "gunicorn.conf.py", "app:app"]),
        "-c python:module": ([sys.executable, "-m", "gunicorn"], ["-c", "python:conf_module", "app:app"]),
        "app factory": ([sys.executable, "-m", "gunicorn"], ["factory:create()"]),
    }


@pytest.mark.begins_first
def test_every_way_to_launch_survives_an_upgrade(make_service):
    for way in ("console script", "python -m", "python -X dev -m", "-c file", "-c python:module", "app factory"):
        service = make_service("gthread", workers=1)
        service.launcher, service.target = launches(service)[way]
        service.start()
        service.upgrade()
        service.upgrade()
        until(f"generation 3 by {way}", lambda s=service: s.get().generation == 3, service)
        service.stop()


def test_relative_config_with_chdir_survives_an_upgrade(make_service):
    service = make_service("gthread", workers=1)
    code = service.directory / "code"
    code.mkdir()
    (service.directory / "app.py").rename(code / "app.py")
    service.arguments = ["--chdir", "code", "-c", "gunicorn.conf.py"]
    service.start()
    service.upgrade()
    until("the new generation", lambda: service.get().generation == 2, service)
    service.stop()
