"""What an app forks is not a worker."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest

from tests.processes.harness import WORKER_CLASSES, Service, settled, skip_unless_installed, until

#: A view that starts a child, ends it by a signal, and says what it was.
FORKING = """
import json, multiprocessing, os, signal, time
import zdd_web
from zdd_web.wsgi import ProbeMiddleware

fork = multiprocessing.get_context("fork")
SIGNALS = ("HUP", "INT", "QUIT", "ABRT", "TERM", "USR1", "USR2", "WINCH")


def child(path):
    handlers = {name: int(signal.getsignal(signal.Signals[f"SIG{name}"])) for name in SIGNALS}
    # What the child does with zdd_web is its own business, and not on the worker's slot.
    zdd_web.background.add("of the child")
    with open(f"{path}.new", "w") as file:
        json.dump({"handlers": handlers, "draining": zdd_web.draining(), "sockets": sockets()}, file)
    os.rename(f"{path}.new", path)
    time.sleep(60)


def sockets():
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file]
    listening = {row[9] for row in rows if row[3] == "0A"}
    files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    links = [os.readlink(path) for path in files if os.path.lexists(path)]
    return sorted(link for link in links if link.partition("[")[2][:-1] in listening)


def forks(query):
    path = f"child.{time.monotonic_ns()}"
    process = fork.Process(target=child, args=(path,))
    process.start()
    while not os.path.exists(path):
        time.sleep(0.01)
    os.kill(process.pid, signal.Signals[f"SIG{query}"])
    process.join(20)
    with open(path) as file:
        return json.dumps({**json.load(file), "exitcode": process.exitcode, "worker": os.getpid()})


def leaves_the_view():
    # As an old-fashioned daemon does it: the child ends by SystemExit, through whatever called the view.
    pid = os.fork()
    if pid == 0:
        raise SystemExit(0)
    os.waitpid(pid, 0)
    return str(pid)


def answer(environ):
    path = environ["PATH_INFO"]
    if path == "/fork":
        return forks(environ["QUERY_STRING"])
    return leaves_the_view() if path == "/exit" else str(os.getpid())


def app(environ, start_response):
    body = answer(environ).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


app = ProbeMiddleware(app)
"""

ASGI = """
async def asgi(scope, receive, send):
    if scope["type"] != "http":
        return
    body = answer({"PATH_INFO": scope["path"], "QUERY_STRING": scope["query_string"].decode()}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""


def forking(make_service: Callable[..., Service], worker_class: str) -> Service:
    service = make_service(skip_unless_installed(worker_class))
    service.write_app(FORKING + ASGI)
    service.target = ["app:app" if worker_class in ("sync", "gthread", "gevent") else "app:asgi"]
    return service.start()


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_a_child_of_the_app_is_not_a_worker(make_service, worker_class: str) -> None:
    service = forking(make_service, worker_class)
    workers = set(settled(service, 2))
    for sig in ("TERM", "INT", "QUIT", "TERM", "INT", "USR1"):
        reply = service.get(f"/fork?{sig}")
        assert reply.status == 200, service.log()
        said = json.loads(reply.body)
        assert said["exitcode"] == -signal.Signals[f"SIG{sig}"]
        assert set(said["handlers"].values()) == {signal.SIG_DFL}
        assert said["sockets"] == []
        assert said["draining"] is False
    # Nothing of the children is on the board, and no worker was replaced.
    assert {worker.pid for worker in service.snapshot().workers} == workers
    assert {(worker.state.label, worker.tasks, worker.in_flight) for worker in service.snapshot().workers} == {
        ("serving", 0, 0)
    }
    service.stop()


def test_a_child_that_ends_through_the_view_counts_for_nothing(make_service) -> None:
    service = forking(make_service, "sync")
    workers = settled(service, 2)
    for _ in range(4):
        # gunicorn answers in the child as well, and first.
        assert service.get("/exit").status == 500
    until("the worker's answers", lambda: not service.snapshot().in_flight, service)
    seen = service.snapshot().workers
    assert sorted(worker.pid for worker in seen) == sorted(workers)
    assert {(worker.state.label, worker.in_flight, worker.error) for worker in seen} == {("serving", 0, "")}
    assert sum(worker.requests for worker in seen) == 4
    assert not service.matches("Exception in worker process")
    service.until_alone()
    service.stop()
