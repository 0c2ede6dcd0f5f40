"""The ASGI middleware answers probes in the event loop, and lets everything else through untouched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from zdd_web.asgi import ProbeMiddleware
from zdd_web.board import Board
from zdd_web.lifecycle import Phase

Service = Callable[..., Board]

SCOPE = {"type": "http", "http_version": "1.1", "scheme": "http", "query_string": b"", "headers": [], "root_path": ""}


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the app"})


async def never() -> Any:
    raise AssertionError("nobody needs the body of a probe")


def ask(asgi: Any, path: str, method: str = "GET", **scope: Any) -> tuple[int, dict[str, str], bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asgi({**SCOPE, "method": method, "path": path, **scope}, never, send))
    start, body = sent
    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body["body"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/startupz", "/livez/"])
def test_probe_is_answered(service: Service, path: str) -> None:
    service()
    status, headers, body = ask(ProbeMiddleware(app), path)
    assert (status, body) == (200, b"ok\n")
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert (headers["content-length"], headers["cache-control"]) == ("3", "no-store")


@pytest.mark.parametrize("path", ["/", "", "/livez2", "//livez", "/app/livez"])
def test_everything_else_is_the_apps(service: Service, path: str) -> None:
    service(Phase.DRAINING)
    assert ask(ProbeMiddleware(app), path) == (200, {}, b"the app")


def test_drain_shows_in_readiness_and_not_in_liveness(service: Service) -> None:
    board = service()
    asgi = ProbeMiddleware(app)
    board.header.phase = Phase.LAME_DUCK
    status, headers, body = ask(asgi, "/readyz")
    assert (status, body, headers["retry-after"]) == (503, b"lame_duck\n", "5")
    assert ask(asgi, "/livez")[0] == 200


def test_head_and_other_methods(service: Service) -> None:
    service()
    asgi = ProbeMiddleware(app)
    status, headers, body = ask(asgi, "/livez", "HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", "3")
    status, headers, _ = ask(asgi, "/livez", "POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert ask(asgi, "/livez", "OPTIONS")[::2] == (200, b"")


@pytest.mark.parametrize(
    ("root", "path"), [("/shop", "/shop/livez"), ("/shop", "/livez"), ("", "/livez"), ("/livez", "/livez/livez")]
)
def test_probe_is_answered_under_a_mount_point(service: Service, root: str, path: str) -> None:
    service()
    assert ask(ProbeMiddleware(app), path, root_path=root)[2] == b"ok\n"


def test_scope_may_lack_what_the_specification_lets_it_lack(service: Service) -> None:
    service()
    scope = {"type": "http", "method": "GET", "path": "/livez"}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ProbeMiddleware(app)(scope, never, send))
    assert sent[0]["status"] == 200


def test_query_accept_and_peer_reach_the_answer(service: Service) -> None:
    service(details="loopback")
    asgi = ProbeMiddleware(app)
    asked: dict[str, Any] = {"query_string": b"verbose", "headers": [(b"accept", b"text/plain")]}
    assert b"[+]phase serving" in ask(asgi, "/readyz", client=("127.0.0.1", 4711), **asked)[2]
    assert ask(asgi, "/readyz", client=("10.0.0.7", 4711), **asked)[2] == b"ok\n"
    assert ask(asgi, "/readyz", client=None, **asked)[2] == b"ok\n"
    _, headers, _ = ask(asgi, "/readyz", headers=[(b"accept", b"application/json")])
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_scopes_pass_untouched(service: Service, kind: str) -> None:
    service()
    seen: list[object] = []

    async def looking(*given: Any) -> None:
        seen.extend(given)

    scope = {"type": kind, "path": "/livez"}
    asyncio.run(ProbeMiddleware(looking)(scope, never, print))  # type: ignore[arg-type]
    assert [each is given for each, given in zip(seen, (scope, never, print), strict=True)] == [True] * 3


def test_app_gets_the_very_objects_of_the_server(service: Service) -> None:
    service()
    seen: list[object] = []

    async def looking(*given: Any) -> None:
        seen.extend(given)

    scope = {**SCOPE, "method": "GET", "path": "/"}
    asyncio.run(ProbeMiddleware(looking)(scope, never, print))  # type: ignore[arg-type]
    assert [each is given for each, given in zip(seen, (scope, never, print), strict=True)] == [True] * 3


def test_no_thread_is_started(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service()
    asgi = ProbeMiddleware(app)
    ask(asgi, "/livez")
    monkeypatch.setattr(threading.Thread, "start", None)
    assert ask(asgi, "/readyz")[2] == b"ok\n"
    assert ask(asgi, "/")[2] == b"the app"


def test_servers_take_it_for_asgi_3() -> None:
    # As uvicorn decides it (config.py, `interface = "auto"`).
    assert asyncio.iscoroutinefunction(ProbeMiddleware(app).__call__)


def test_probe_is_answered_while_the_app_is_broken(service: Service) -> None:
    service()

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no database")

    assert ask(ProbeMiddleware(broken), "/healthz")[0] == 200
    with pytest.raises(RuntimeError, match="no database"):
        ask(ProbeMiddleware(broken), "/")
