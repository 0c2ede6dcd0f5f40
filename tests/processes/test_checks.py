"""Checks in real workers: what a neighbour that is gone, slow or silent does to probes, and to nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes.harness import WORKER_CLASSES, Service, serving_workers, settled, skip_unless_installed, until

#: Two checks of one neighbour, over a connection that is made anew for each, as Django's is.
CHECKS = """
    import asyncio, os, socket, sys, time
    import zdd_web
    from zdd_web.wsgi import ProbeMiddleware

    PORT = int(os.environ["NEIGHBOUR"])

    @zdd_web.check("neighbour", interval=0.05, timeout=0.3)
    def neighbour():
        with socket.create_connection(("127.0.0.1", PORT)) as connection:
            return connection.recv(10) == b"ok"

    @zdd_web.check("aside", interval=0.05, timeout=0.3, critical=False)
    async def aside():
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        try:
            return await reader.read(10) == b"ok"
        finally:
            writer.close()
"""

APPS = {
    "wsgi": """
    def app(environ, start_response):
        if environ["PATH_INFO"] == "/slow":
            time.sleep(float(environ["QUERY_STRING"]))
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    app = ProbeMiddleware(app)
    """,
    "asgi": """
    from zdd_web.asgi import ProbeMiddleware

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                await send({"type": (await receive())["type"] + ".complete"})
        if scope["path"] == "/slow":
            await asyncio.sleep(float(scope["query_string"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    app = ProbeMiddleware(app)
    """,
}


@pytest.fixture(params=WORKER_CLASSES)
def worker_class(request: pytest.FixtureRequest) -> str:
    return skip_unless_installed(request.param)


class Neighbour:
    """A server that says "ok", or "no", or nothing to whoever connects."""

    def __init__(self) -> None:
        self.answer: bytes | None = b"ok"
        self.open: set[socket.socket] = set()
        self.most = 0
        self.asked = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._speak, args=(connection,), daemon=True).start()

    def _speak(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.asked += 1
            self.open.add(connection)
            self.most = max(self.most, len(self.open))
            if self.answer is not None:
                connection.sendall(self.answer)
            else:
                connection.recv(1)
        self.open.discard(connection)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.hang_up()


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    made = Neighbour()
    yield made
    made.close()


@pytest.fixture
def service(make_service: Callable[..., Service], worker_class: str, neighbour: Neighbour) -> Service:
    service = make_service(worker_class)
    kind = "asgi" if worker_class in ("asgi", "uvicorn_worker.UvicornWorker") else "wsgi"
    service.write_app(CHECKS + APPS[kind])
    service.environ["NEIGHBOUR"] = str(neighbour.port)
    return service


def status(service: Service, path: str) -> int:
    return service.get(path).status


def details(service: Service) -> dict[str, Any]:
    reply = service.get("/readyz?verbose", Accept="application/json")
    said = json.loads(reply.body)
    assert isinstance(said, dict)
    return said


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.parametrize("answer", [None, b"no"], ids=["silent", "wrong"])
def test_a_neighbour_that_fails_costs_readiness_and_nothing_else(
    service: Service, neighbour: Neighbour, answer: bytes | None
):
    service.configure(details="always").start()
    workers = settled(service, 2)
    assert [status(service, path) for path in ("/livez", "/readyz", "/startupz", "/healthz/neighbour")] == [200] * 4
    before = {pid: threads(pid) for pid in workers}

    neighbour.answer = answer
    until("readiness 503", lambda: status(service, "/readyz") == 503, service)
    asked = neighbour.asked
    # A hundred intervals in each worker. Of what hangs only the async check is asked again, since it can be cancelled,
    # and each time its limit of six intervals is over.
    rounds = 2 * 2 * 100 if answer is not None else 2 * 17
    until("a hundred intervals", lambda: neighbour.asked >= asked + rounds, service)
    assert [status(service, path) for path in ("/livez", "/readyz", "/startupz", "/")] == [200, 503, 200, 200]
    # Two checks of two workers, and each once more for as long as this end has not seen the other close.
    assert neighbour.most <= 2 * 2 * 2
    # A thread for each check, and those that gthread takes for its first requests.
    assert all(threads(pid) <= before[pid] + 2 + 4 for pid in workers)
    said = details(service)
    findings = {each["name"]: each for each in said["findings"]}
    why = "no answer within 0.3 s" if answer is None else "it returned False"
    assert findings["neighbour"]["status"] == "fail"
    assert why in findings["neighbour"]["text"]
    assert findings["aside"]["status"] == "warn"
    # Once for each worker; once more where a busy machine has given it another reason in between.
    lines = service.matches("event=check.failed check=neighbour")
    other = [line for line in lines if why not in line]
    assert len(_pids(lines)) == 2, lines
    assert len(lines) - len(other) <= 2 + len(other), lines

    neighbour.answer = b"ok"
    neighbour.hang_up()
    until("readiness 200", lambda: status(service, "/readyz") == 200, service)
    assert sorted(serving_workers(service)) == sorted(workers)
    passed = "event=check.passed check=neighbour after="
    until("both pass", lambda: len(_pids(service.matches(passed))) == 2, service)
    service.stop()


def _pids(lines: list[str]) -> set[str]:
    return {match[1] for line in lines if (match := re.search(r"\] \[(\d+)\] ", line))}


def test_new_workers_wait_for_a_neighbour_and_old_ones_serve(service: Service, neighbour: Neighbour):
    service.configure(upgrade_timeout=30).start()
    neighbour.answer = None
    until("readiness 503", lambda: status(service, "/readyz") == 503, service)
    service.signal(signal.SIGUSR2)
    service.wait_for("generation=2 event=check.failed check=neighbour")
    assert [status(service, path) for path in ("/", "/livez")] == [200, 200]
    neighbour.answer = b"ok"
    neighbour.hang_up()
    service.wait_for("event=upgrade.committed")
    until("readiness 200", lambda: status(service, "/readyz") == 200, service)
    service.stop()


def test_one_worker_of_two_with_a_broken_connection_is_a_warning(make_service: Callable[..., Service]):
    service = make_service("gthread")
    service.write_app(
        """
        import os, zdd_web
        from zdd_web.wsgi import ProbeMiddleware

        zdd_web.check("own", interval=0.05)(lambda: not os.path.exists(f"broken-{os.getpid()}"))

        def app(environ, start_response):
            start_response("200 OK", [])
            return [b"ok"]

        app = ProbeMiddleware(app)
        """
    )
    service.configure(details="always").start()
    one, other = settled(service, 2)
    (service.directory / f"broken-{one}").touch()
    service.wait_for("event=check.failed check=own")
    until("a warning", lambda: details(service)["status"] == "warn", service)
    assert status(service, "/readyz") == 200
    assert status(service, "/readyz/own") == 200
    (service.directory / f"broken-{other}").touch()
    until("readiness 503", lambda: status(service, "/readyz") == 503, service)
    assert status(service, "/livez") == 200
    service.stop()


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_many_async_checks_run_beside_each_other(make_service: Callable[..., Service], worker_class: str):
    service = make_service(skip_unless_installed(worker_class))
    service.write_app(
        """
        import asyncio, zdd_web
        from zdd_web.wsgi import ProbeMiddleware

        async def wait():
            await asyncio.sleep(0.1)

        for name in ("one", "two", "three"):
            zdd_web.check(name, interval=0.1, timeout=5)(wait)
            wait = type(wait)(wait.__code__, globals(), name)

        def app(environ, start_response):
            start_response("200 OK", [])
            return [b"ok"]

        app = ProbeMiddleware(app)
        """
    )
    service.start()
    assert [status(service, f"/readyz/{name}") for name in ("one", "two", "three")] == [200] * 3
    service.stop()


def test_checks_rest_while_a_generation_leaves_and_go_on_when_it_serves_again(
    make_service: Callable[..., Service], neighbour: Neighbour
):
    service = make_service("gthread")
    service.write_app(CHECKS + APPS["wsgi"])
    service.environ["NEIGHBOUR"] = str(neighbour.port)
    service.configure(drain_delay=20, grace_period=30).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    asked = until("rest", lambda: rest(neighbour), service)
    assert neighbour.asked == asked
    assert [status(service, path) for path in ("/livez", "/readyz", "/")] == [200, 503, 200]
    service.signal(signal.SIGTERM)
    service.ends()


def rest(neighbour: Neighbour) -> int | None:
    """Return how often the neighbour was asked, once nobody asks any more for four intervals."""
    asked, since = neighbour.asked, time.monotonic()
    while time.monotonic() - since < 0.2:
        if neighbour.asked != asked:
            return None
    return asked


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        (["shop_checks.databse"], "module 'shop_checks' has no 'databse'"),
        (["nowhere.database"], "there is no module 'nowhere'"),
        (["shop_checks.empty", "shop_checks.empty"], ""),
        ([("shop_checks.empty", {"intervall": 5})], "unexpected keyword|too many|intervall"),
        (["json"], "must be a list|neither a dotted path"),
        (["json.decoder"], "registers no check"),
    ],
)
def test_a_check_that_cannot_be_ends_the_start(make_service: Callable[..., Service], checks: list[Any], said: str):
    service = make_service("sync")
    (service.directory / "shop_checks.py").write_text("def empty(): ...\n")
    service.configure(checks=checks)
    if not said:
        service.start().stop()
        return
    process = service.spawn()
    assert process.wait(30) != 0
    assert service.matches(said), service.log()
    assert not service.pid_file.exists()


DJANGO = {
    "settings.py": """
        SECRET_KEY = "only for the test"
        ALLOWED_HOSTS = ["shop.example"]
        INSTALLED_APPS = ["zdd_web", "shop"]
        MIDDLEWARE = ["zdd_web.django.middleware.ProbeMiddleware"]
        ROOT_URLCONF = "urls"
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
        ZDD_WEB = {"CHECKS": ["zdd_web.django.checks.database", "zdd_web.django.checks.migrations"]}
        """,
    "urls.py": "urlpatterns = []",
    "app.py": """
        import os
        os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
        from django.core.wsgi import get_wsgi_application
        app = get_wsgi_application()
        """,
    "shop/__init__.py": "",
    "shop/migrations/__init__.py": "",
    "shop/migrations/0001_initial.py": """
        from django.db import migrations
        class Migration(migrations.Migration):
            operations = []
        """,
}

SECOND = """
from django.db import migrations
class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]
    operations = []
"""


@pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="django is not installed")
def test_new_code_whose_migrations_are_not_applied_does_not_take_over(make_service: Callable[..., Service]):
    service = make_service("gthread")
    for name, text in DJANGO.items():
        path = service.directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(text))

    def migrate() -> None:
        command = [sys.executable, "-m", "django", "migrate", "--settings", "settings", "--pythonpath", "."]
        subprocess.run(command, cwd=service.directory, check=True, capture_output=True, timeout=60)

    migrate()
    service.configure(upgrade_timeout=10).start()
    assert status(service, "/readyz") == 200
    (service.directory / "shop/migrations/0002_second.py").write_text(SECOND)
    service.signal(signal.SIGUSR2)
    line = service.wait_for("event=upgrade.failed")
    assert "1 unapplied migrations: shop.0002_second" in line
    # Who serves is asked for the migrations of its own code, and was asked already.
    assert status(service, "/readyz") == 200
    migrate()
    service.signal(signal.SIGUSR2)
    service.wait_for("event=upgrade.committed")
    service.stop()
