"""docs/reference/phases.md against real services: each phase, each endpoint, both ports, each worker class."""

from __future__ import annotations

import contextlib
import http.client
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes.harness import PATIENCE, WORKER_CLASSES, Service, skip_unless_installed, until

PAGE = Path(__file__).parents[2] / "docs/reference/phases.md"
ENDPOINTS = ("/livez", "/readyz", "/healthz", "/startupz")

WAIT = """
    import asyncio, os, time
    import zdd_web
    from zdd_web.wsgi import ProbeMiddleware

    while not os.path.exists("may-boot"):
        time.sleep(0.02)
"""

APPS = {
    "wsgi": """
    def app(environ, start_response):
        name = environ["QUERY_STRING"]
        if name:
            open(name + ".held", "w").close()
        while name and not os.path.exists(name):
            time.sleep(0.02)
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
        name = scope["query_string"].decode()
        if name:
            open(name + ".held", "w").close()
        while name and not os.path.exists(name):
            await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    app = ProbeMiddleware(app)
    """,
}


@pytest.fixture(params=WORKER_CLASSES)
def worker_class(request: pytest.FixtureRequest) -> str:
    return skip_unless_installed(request.param)


def documented() -> dict[tuple[str, str], dict[str, tuple[str, ...]]]:
    """Return what the page says: (phase, port) and endpoint → the words of the cell."""
    found = {}
    for port, title in (("app", "## On the app's port"), ("probe", "## On the probe port")):
        section = PAGE.read_text().partition(title)[2].partition("\n## ")[0]
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in section.splitlines() if row[:1] == "|"]
        names = [re.findall(r"`(/\w+)`", cell) for cell in rows[0]]
        for row in rows[2:]:
            cells = {
                name: tuple(cell.replace("`", "").split(", "))
                for cell, group in zip(row, names, strict=True)
                for name in group
            }
            found[row[0].strip("`"), port] = cells
    return found


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[str, ...]:
    """Return status and, if there is one, Retry-After, as the page spells them."""
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    retry = response.headers.get("Retry-After")
    return (str(response.status), *([f"Retry-After: {retry}"] if retry else []))


@contextlib.contextmanager
def connected(port: int) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        yield connection


class Table:
    """What was seen, by phase and port."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.seen: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}

    @property
    def probe_port(self) -> int:
        return int(re.findall(r"event=probes\.listening address=127\.0\.0\.1:(\d+)", self.service.log())[0])

    def new(self, phase: str, *ports: str) -> None:
        """Ask each endpoint on a connection of its own."""
        for port in ports:
            found = self.seen[phase, port] = {}
            for path in ENDPOINTS:
                with connected(self.service.port if port == "app" else self.probe_port) as connection:
                    found[path] = ask(connection, path)

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[str], None]]:
        """Keep a connection to the app for each endpoint; what this yields asks on them, in the phase then.

        Nothing for a sync worker, which keeps none.
        """
        if self.service.worker_class == "sync":
            yield lambda phase: None
            return
        with contextlib.ExitStack() as stack:
            connections = {path: stack.enter_context(connected(self.service.port)) for path in ENDPOINTS}
            for connection in connections.values():
                assert ask(connection, "/") == ("200",)

            def then(phase: str) -> None:
                self.seen[phase, "app"] = {path: ask(connections[path], path) for path in ENDPOINTS}

            yield then

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a request in hand, which is answered at the end."""
        directory = self.service.directory
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(self.service.get, f"/?{name}")
            until("the request", lambda: (directory / f"{name}.held").exists(), self.service)
            try:
                yield
            finally:
                (directory / name).touch()
            assert reply.result().status == 200


def test_each_phase_answers_as_documented(make_service: Callable[..., Service], worker_class: str):
    service = make_service(worker_class, workers=1)
    service.arguments = ["--keep-alive", "60"]
    service.write_app(WAIT + APPS["asgi" if worker_class in WORKER_CLASSES[3:] else "wsgi"])
    service.configure(probe_bind="127.0.0.1:0", drain_delay=100, grace_period=200).spawn()
    table = Table(service)

    service.wait_for("event=probes.listening")
    table.new("booting", "probe")
    (service.directory / "may-boot").touch()
    service.wait_for("generation=1 event=phase.serving")
    service.learn_port()
    table.new("serving", "app", "probe")

    with table.kept() as ask_again, table.held("one"):
        service.signal(signal.SIGUSR2)
        service.wait_for("generation=1 event=phase.retiring")
        ask_again("retiring")
        table.new("retiring", "probe")
    service.wait_for("generation=1 event=phase.stopped")

    with table.kept() as ask_again:
        service.signal(signal.SIGTERM)
        service.wait_for("generation=2 event=phase.lame_duck")
        table.new("lame_duck", "app", "probe")
        with table.held("two"):
            service.signal(signal.SIGTERM)
            service.wait_for("generation=2 event=phase.draining")
            ask_again("draining")
            table.new("draining", "probe")
    service.ends()

    told = documented()
    if worker_class == "sync":
        del told["retiring", "app"], told["draining", "app"]
    assert table.seen == told
