"""A worker answers its warm-up paths to itself as a server would, and is not ready when the app is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.validate import validator

import flask
import pytest

from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.workers.warmup import warm_up


def answering(status: str, seen: list[dict[str, Any]] | None = None) -> Any:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if seen is not None:
            seen.append(environ)
        start_response(status, [("Content-Type", "text/plain")])
        return [b"warm"]

    return app


def quiet() -> None:
    """Beat no heart."""


def test_every_path_is_asked_for_in_order_between_heartbeats() -> None:
    heard: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        heard.append(environ["PATH_INFO"])
        start_response("200 OK", [])
        return [b""]

    warm_up(app, ["/", "/search", "/"], lambda: heard.append("beat"))
    assert heard == ["beat", "/", "beat", "/search", "beat", "/"]


def test_request_is_one_that_any_wsgi_app_may_get() -> None:
    seen: list[dict[str, Any]] = []
    warm_up(validator(answering("200 OK", seen)), ["/search?q=warm&page=2"], quiet)
    (environ,) = seen
    assert {key: environ[key] for key in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "SCRIPT_NAME")} == {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/search",
        "QUERY_STRING": "q=warm&page=2",
        "SCRIPT_NAME": "",
    }
    assert environ["HTTP_USER_AGENT"] == "zdd_web-warmup"
    assert environ["wsgi.input"].read(10) == b""


def test_url_names_host_and_scheme() -> None:
    seen: list[dict[str, Any]] = []
    warm_up(validator(answering("200 OK", seen)), ["https://shop.example:8443/search?q=warm", "http://[::1]/"], quiet)
    keys = ("wsgi.url_scheme", "HTTP_HOST", "SERVER_NAME", "SERVER_PORT", "PATH_INFO", "QUERY_STRING")
    assert [[environ[key] for key in keys] for environ in seen] == [
        ["https", "shop.example:8443", "shop.example", "8443", "/search", "q=warm"],
        ["http", "[::1]", "::1", "80", "/", ""],
    ]


def test_answer_that_refuses_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    warm_up(answering("400 Bad Request"), ["/"], quiet)
    warm_up(answering("302 Found"), ["/"], quiet)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "event=warmup.cold" in caplog.text and 'status="400 Bad Request"' in caplog.text


def test_nothing_to_warm_up_asks_for_nothing() -> None:
    warm_up(answering("500 never asked"), [], quiet)


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "302 Found", "401 Unauthorized", "404 Not Found"])
def test_answer_that_the_app_chose_to_give_is_good_enough(status: str) -> None:
    warm_up(answering(status), ["/"], quiet)


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable", "OK"])
def test_answer_of_an_app_that_is_not_ready_is_refused(status: str) -> None:
    with pytest.raises(UpgradeError) as caught:
        warm_up(answering(status), ["/", "/search"], quiet)
    assert str(caught.value) == f"WARMUP path '/' answered {status!r}: the app is not ready for requests"


def test_status_that_replaced_another_is_the_one_that_counts() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        start_response("500 Internal Server Error", [], (ValueError, ValueError(), None))
        return [b""]

    with pytest.raises(UpgradeError, match="answered '500 Internal Server Error'"):
        warm_up(app, ["/"], quiet)


def test_app_that_never_starts_a_response_is_refused() -> None:
    with pytest.raises(UpgradeError, match="start_response was never called"):
        warm_up(lambda environ, start_response: [b""], ["/"], quiet)


def test_what_the_app_raises_is_raised() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        raise LookupError("no database")

    with pytest.raises(LookupError, match="no database"):
        warm_up(app, ["/"], quiet)


class Body:
    """A response that breaks off, and must be closed all the same."""

    def __init__(self, *, breaks: bool) -> None:
        self.breaks, self.read, self.closed = breaks, 0, 0

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(3):
            self.read += 1
            yield b"part"
        if self.breaks:
            raise OSError("template is gone")

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("breaks", [False, True])
def test_body_is_read_to_its_end_and_closed(breaks: bool) -> None:
    body = Body(breaks=breaks)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return body

    if breaks:
        with pytest.raises(OSError, match="template is gone"):
            warm_up(app, ["/"], quiet)
    else:
        warm_up(app, ["/"], quiet)
    assert (body.read, body.closed) == (3, 1)


def test_app_that_starts_its_response_with_the_first_chunk_is_heard() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        write = start_response("200 OK", [])
        write(b"the old way")
        yield b"late"

    warm_up(app, ["/"], quiet)


def test_flask_app_is_warmed_up() -> None:
    app = flask.Flask(__name__)

    @app.get("/search")
    def search() -> str:
        app.config["WARM"] = flask.request.args["q"]
        return "found"

    warm_up(app.wsgi_app, ["/search?q=warm"], quiet)
    assert app.config["WARM"] == "warm"
