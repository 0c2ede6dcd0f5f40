"""Apps with signal handlers of their own, and `on_stop`, which they should use instead."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes.harness import APP, WORKER_CLASSES, Held, Service, settled, skip_unless_installed, until

OWN_HANDLER = """
import signal

def on_term(sig, frame):
    print(f"flushed by {os.getpid()}", file=sys.stderr, flush=True)

signal.signal(signal.SIGTERM, {handler})
"""

ASGI = """
async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    body = f"{VERSION} {zdd_web.generation()} {os.getpid()}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""

HOOKS = """
@zdd_web.on_stop
def broken():
    raise RuntimeError("not this one")

@zdd_web.on_stop
def leaving():
    main = os.readlink('/proc/thread-self').endswith(f'task/{os.getpid()}')
    print(f"on_stop in {os.getpid()} main={main}", file=sys.stderr, flush=True)
"""


def with_app(service: Service, text: str) -> Service:
    service.write_app(APP)
    with (service.directory / "app.py").open("a") as file:
        file.write(f"{text}\n{ASGI}")
    service.target = ["app:app" if service.worker_class in ("sync", "gthread", "gevent") else "app:asgi"]
    return service


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_an_app_with_its_own_handler_leaves_no_later_than_another(make_service, worker_class: str) -> None:
    service = make_service(skip_unless_installed(worker_class))
    # Ignored, nothing tells a worker of the signal; and an idle sync worker would wait for half of this.
    service.arguments = ["--timeout", "90"]
    with_app(service, OWN_HANDLER.replace("{handler}", "signal.SIG_IGN")).start()
    service.upgrade()
    replies = {service.get().generation for _ in range(10)}
    assert replies == {2}
    service.until_one_generation()
    service.stop()
    said = service.matches("event=handler.replaced")
    assert [line.partition("generation=")[2][:1] for line in said] == ["1", "2"]
    assert "handler=SIG_IGN" in said[0] and "zdd_web.on_stop(function)" in said[0] and "WARNING" in said[0]


def test_an_apps_own_handler_is_still_called(make_service) -> None:
    service = with_app(make_service("sync"), OWN_HANDLER.replace("{handler}", "on_term")).start()
    service.stop()
    assert service.matches("flushed by")
    assert "handler=app.on_term" in service.wait_for("event=handler.replaced")


def test_what_is_in_hand_is_named_at_the_deadline_whatever_handler_there_is(make_service) -> None:
    service = with_app(make_service("sync", workers=1), OWN_HANDLER.replace("{handler}", "signal.SIG_IGN"))
    service.configure(grace_period=4).start()
    service.get("/job?seconds=60")
    Held(service)
    service.stop(status=1)
    assert service.matches("event=background.abandoned .*name=job")


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_on_stop_is_called_once_when_a_worker_begins_to_leave(make_service, worker_class: str) -> None:
    service = with_app(make_service(skip_unless_installed(worker_class)), HOOKS).start()
    workers = settled(service, service.workers)
    service.stop()
    said = sorted(line.partition("on_stop in ")[2] for line in service.matches("on_stop in"))
    assert said == sorted(f"{pid} main=True" for pid in workers)
    assert len(service.matches("event=background.failed hook=on_stop name=broken")) == len(workers)


def test_on_stop_ends_a_request_that_would_not_end(make_service) -> None:
    service = make_service("sync", workers=1)
    with_app(service, HOOKS.replace("main = ", "open('stopping', 'w').close(); main = ")).start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/hold?stopping")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        assert reply.result().status == 200
    service.ends()
