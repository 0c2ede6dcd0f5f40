"""A host that was paused: nobody is condemned for a silence in which the watching process was paused itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.processes.harness import Service, answered_from, settled, until
from tests.processes.test_faults import SHORT_PATIENCE
from tests.processes.test_probe_port import ask, port_of
from tests.processes.trial import WIDE_COMMIT_WINDOW, configure

#: gunicorn's `timeout`, and a pause that is longer, seconds.
TIMEOUT, PAUSE = 2, 3.5


@contextmanager
def paused(service: Service) -> Iterator[None]:
    """Have all processes of a service stopped for longer than `TIMEOUT`, as `docker pause` does."""
    pids = service.processes()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
        # The length of the pause is what is tested.
        time.sleep(PAUSE)
    finally:
        # The master first: the others have had no time yet.
        for pid in sorted(pids, key=lambda each: each != service.pid):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def service(make_service, worker_class: str) -> Service:
    service = make_service(worker_class, probe_bind="127.0.0.1:0")
    # A kept connection that has been idle for `keep-alive` is closed after a pause as after any other time.
    service.arguments = ["--timeout", str(TIMEOUT), "--keep-alive", "60"]
    return service


def test_a_pause_longer_than_the_timeout_costs_no_worker_and_no_request(service: Service):
    service.start()
    workers = settled(service, 2)
    port = port_of(service)
    with service.under_load(clients=6) as load:
        with paused(service):
            pass
        alive = {ask(port, "/livez").status, service.get("/livez").status, ask(port, "/livez").status}
        answered_from(load, 50)
        # Whatever is decided upon the silence is decided within two of gunicorn's turns, and after one more heartbeat.
        seen = service.is_active().board.header.tick_at
        until("turns", lambda: service.is_active().board.header.tick_at > seen + 2 * TIMEOUT * 10**9, service)
    assert alive == {200}
    assert settled(service, 2) == workers
    assert not service.matches("WORKER TIMEOUT")
    assert not service.matches(r"event=(probe\.failing|internal\.error)")
    service.stop()


def test_a_worker_that_stands_still_is_killed_all_the_same(service: Service):
    service.start()
    frozen, other = settled(service, 2)
    os.kill(frozen, signal.SIGSTOP)
    with paused(service):
        pass
    os.kill(frozen, signal.SIGSTOP)
    service.wait_for(rf"WORKER TIMEOUT \(pid:{frozen}\)")
    assert other in settled(service, 2, without=[frozen])
    assert len(service.matches("WORKER TIMEOUT")) == 1
    service.stop()


def test_a_pause_in_the_commit_window_costs_no_upgrade(service: Service):
    configure(service, SHORT_PATIENCE + WIDE_COMMIT_WINDOW).start()
    with service.under_load(clients=6):
        service.signal(signal.SIGUSR2)
        service.wait_for(r"generation=2 event=phase\.serving")
        with paused(service):
            pass
        service.wait_for(r"event=upgrade\.(committed|failed)")
    assert not service.matches(r"event=(upgrade\.failed|internal\.error)|WORKER TIMEOUT")
    service.stop()


def test_a_wait_that_a_handler_outlasts_ends(make_service) -> None:
    """CPython's `SimpleQueue.get(timeout)` never returns from it: a master would not see that its workers are ready."""
    service = make_service("sync", workers=1)
    release, interrupted = service.directory / "release", service.directory / "interrupted"
    service.deploy("1", at_import=f"import os, time\nwhile not os.path.exists({str(release)!r}): time.sleep(0.02)")
    service.configure(f"""
import pathlib, signal, time

def handler(sig, frame):
    pathlib.Path({str(interrupted)!r}).touch()
    time.sleep(1)

signal.signal(signal.SIGALRM, handler)
""")
    master = service.spawn()
    service.wait_for("Booting worker")
    os.kill(master.pid, signal.SIGALRM)
    until("the handler to run", interrupted.exists, service)
    release.touch()
    service.wait_for(r"event=phase\.serving")
