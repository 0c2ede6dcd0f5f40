"""Threads of the app that are not daemons, for which Python would wait at its end: waited for, then left and named."""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Callable

import pytest

from tests.processes.harness import APP, WORKER_CLASSES, Service, skip_unless_installed, until
from tests.processes.test_worker_classes import ASGI_APP

CONSUMER = """
    import threading

    def consume():
        while True:
            time.sleep(0.05)

    threading.Thread(target=consume, name="consumer").start()
"""


def write(service: Service, extra: str) -> Service:
    app = APP if service.worker_class in WORKER_CLASSES[:3] else ASGI_APP.replace("STARTUP", "pass")
    (service.directory / "app.py").write_text(textwrap.dedent(app) + textwrap.dedent(extra))
    return service


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_a_thread_without_end_is_named_at_the_deadline(make_service: Callable[..., Service], worker_class: str):
    service = write(make_service(skip_unless_installed(worker_class)), CONSUMER)
    service.configure(grace_period=6).start()
    # Nothing is known to be lost: the status is that of any stop, and no worker was killed.
    service.stop(status=0)
    assert len(service.matches(r"event=threads\.left .*thread=consumer .*zdd_web\.draining")) == service.workers
    assert service.log().count("in consume\n    time.sleep(0.05)") == service.workers
    assert not service.matches(r"event=drain\.abandoned|SIGKILL|exited with code")


def test_a_retired_generation_leaves_such_threads_behind(service: Service):
    # gunicorn would kill its workers after `timeout`, and never without one.
    service.arguments = ["--timeout", "0"]
    write(service, CONSUMER).configure(recycle_timeout=0.5).start()
    service.upgrade()
    service.until_one_generation()
    assert len(service.matches(r"generation=1 event=threads\.left .*thread=consumer")) == service.workers
    assert not service.matches("SIGKILL")
    service.signal(signal.SIGQUIT)
    service.ends(status=None)


LEAVES = """
    import threading

    stop = threading.Event()

    def finish():
        while not zdd_web.draining():
            time.sleep(0.05)
        time.sleep(2.5)
        print("finished its work", file=sys.stderr, flush=True)

    threading.Thread(target=finish, name="finisher").start()
    threading.Thread(target=stop.wait, name="stopped-by-a-hook").start()
    zdd_web.on_drained(stop.set)
"""


def test_threads_that_end_are_waited_for_with_a_heartbeat(service: Service):
    service.arguments = ["--timeout", "1"]
    write(service, LEAVES).configure(grace_period=20).start()
    service.stop(status=0)
    assert len(service.matches("finished its work")) == service.workers
    assert service.matches(r"event=threads\.waiting .*threads=1 names=finisher")
    assert not service.matches(r"event=threads\.left|WORKER TIMEOUT")


IN_A_POOL = """
    _app = app

    async def app(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/pool":
            HELD.add(asyncio.ensure_future(asyncio.to_thread(time.sleep, 600)))
            await asyncio.sleep(0)
        await _app(scope, receive, send)
"""


@pytest.mark.parametrize("worker_class", WORKER_CLASSES[3:])
def test_a_call_in_a_pool_of_threads_is_named_at_the_deadline(make_service: Callable[..., Service], worker_class: str):
    service = write(make_service(skip_unless_installed(worker_class), workers=1), IN_A_POOL)
    service.configure(grace_period=2).start()
    assert service.get("/pool").status == 200
    service.stop(status=0)
    assert service.matches(r"event=threads\.left .*thread=asyncio_0")
    assert not service.matches(r"event=drain\.abandoned|SIGKILL")


def test_a_master_that_has_loaded_the_app_does_not_wait_for_its_threads_for_ever(service: Service):
    service.arguments = ["--preload"]
    write(service, CONSUMER).configure(grace_period=2).start()
    service.stop(status=0)
    assert service.matches(rf"event=threads\.left pid={service.process.pid} thread=consumer")  # type: ignore[union-attr]


def test_a_worker_that_cannot_boot_does_not_wait_for_threads(service: Service):
    write(service, CONSUMER + '\n    raise RuntimeError("broken release")\n')
    service.spawn()
    service.ends(status=3)


STUCK = """
    import atexit

    def hang():
        while not os.path.exists("go"):
            time.sleep(0.05)

    atexit.register(hang)
"""


def test_what_python_does_at_its_end_is_bounded_too(service: Service):
    write(service, STUCK).configure(recycle_timeout=0.5).start()
    victim = service.get().pid
    os.kill(victim, signal.SIGTERM)
    until("the worker's end", lambda: victim not in service.processes(), service)
    assert service.matches(rf"event=exit\.stuck pid={victim}")
    assert "in hang" in service.log()
    assert not service.matches("WORKER TIMEOUT")
    (service.directory / "go").touch()
    service.stop(status=0)
