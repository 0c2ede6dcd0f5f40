"""The WSGI middleware answers probes from the board, and lets everything else through untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from zdd_web.board import Board
from zdd_web.health import Health, Probe, Question, answer
from zdd_web.lifecycle import Phase
from zdd_web.wsgi import ProbeMiddleware

Service = Callable[..., Board]
Answer = tuple[str, dict[str, str], bytes]


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-App", "yes")])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else b"the app"]


def ask(wsgi: Any, path: str, method: str = "GET", **environ: Any) -> Answer:
    """Ask as a server that holds both sides to PEP 3333 does."""
    environ = {"PATH_INFO": path, "REQUEST_METHOD": method, "SCRIPT_NAME": "", "QUERY_STRING": "", **environ}
    setup_testing_defaults(environ)
    heard: list[Any] = []
    body = validator(wsgi)(environ, lambda status, headers, exc_info=None: heard.append((status, headers)))
    content = b"".join(body)
    body.close()
    ((status, headers),) = heard
    return status, dict(headers), content


PATHS = {"/livez": Probe.LIVENESS, "/readyz/": Probe.READINESS, "/healthz": Probe.READINESS}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_probe_is_answered_as_the_phase_decides(service: Service, phase: Phase, path: str, method: str) -> None:
    service(phase)
    reply = answer(PATHS[path], Question(method), Health(phase))
    assert ask(ProbeMiddleware(app), path, method) == (reply.status_line, dict(reply.headers), reply.body)


@pytest.mark.parametrize(
    "path", ["/", "", "/livez2", "/livez//", "//livez", "/LIVEZ", "/app/livez", "/livez/x", "/startupz2"]
)
def test_everything_else_is_the_apps(service: Service, path: str) -> None:
    service(Phase.DRAINING)
    status, headers, body = ask(ProbeMiddleware(app), path)
    assert (status, headers["X-App"], body) == ("200 OK", "yes", b"the app")


def test_app_gets_the_very_objects_of_the_server(service: Service) -> None:
    service()
    seen: list[object] = []

    def looking(environ: Any, start_response: Any) -> Any:
        seen.extend([environ, start_response])
        return body

    body: list[bytes] = []
    environ = {"PATH_INFO": "/", "REQUEST_METHOD": "GET"}
    assert ProbeMiddleware(looking)(environ, print) is body
    assert seen[0] is environ
    assert seen[1] is print


def test_query_does_not_hide_a_probe(service: Service) -> None:
    service()
    assert ask(ProbeMiddleware(app), "/livez", QUERY_STRING="full=1")[2] == b"ok\n"


def test_probe_is_answered_under_a_mount_point(service: Service) -> None:
    service()
    assert ask(ProbeMiddleware(app), "/livez", SCRIPT_NAME="/shop")[2] == b"ok\n"


def test_drain_is_seen_at_the_next_probe(service: Service) -> None:
    board = service(Phase.SERVING)
    wsgi = ProbeMiddleware(app)
    statuses = []
    for phase in (Phase.SERVING, Phase.LAME_DUCK, Phase.SERVING):
        board.header.phase = phase
        statuses.append(ask(wsgi, "/readyz")[0])
    assert statuses == ["200 OK", "503 Service Unavailable", "200 OK"]


def test_a_lame_duck_is_ready_where_the_service_says_so(service: Service) -> None:
    service(Phase.LAME_DUCK, lame_duck_ready=True)
    assert ask(ProbeMiddleware(app), "/readyz")[0] == "200 OK"


@pytest.mark.parametrize(
    ("successor", "status"),
    [(Phase.SERVING, "200 OK"), (Phase.LAME_DUCK, "503 Service Unavailable"), (None, "503 Service Unavailable")],
)
def test_retiring_generation_answers_for_its_successor(service: Service, successor: Phase | None, status: str) -> None:
    service(Phase.RETIRING, successor)
    assert ask(ProbeMiddleware(app), "/readyz")[0] == status


def test_paths_are_those_of_the_settings_and_of_the_newest(service: Service) -> None:
    wsgi = ProbeMiddleware(app)
    service(liveness_path="/-/alive")
    assert [ask(wsgi, path)[2] for path in ("/-/alive", "/livez")] == [b"ok\n", b"the app"]
    service()
    assert [ask(wsgi, path)[2] for path in ("/-/alive", "/livez")] == [b"the app", b"ok\n"]


def test_probe_is_answered_while_the_app_is_broken(service: Service) -> None:
    service()

    def broken(environ: Any, start_response: Any) -> Any:
        raise RuntimeError("no database")

    assert ask(ProbeMiddleware(broken), "/healthz")[0] == "200 OK"
    with pytest.raises(RuntimeError, match="no database"):
        ask(ProbeMiddleware(broken), "/")
