"""What of a reply is compared with those before the first upgrade, and what counts as different."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.cli.rehearse import text_report
from zdd_web.cli.rehearse.changed_replies import STABLE_FROM, Body, Difference, compare
from zdd_web.cli.rehearse.report import Handover, Outcome, Sample, build
from zdd_web.gunicorn.workers.asgi_request_counter import CountingApp
from zdd_web.gunicorn.workers.worker_adapter import _name_generation, request_number

UPGRADE = Handover(1, 1, 2, 10.0, 10.5, 11.0, ok=True)


def reply(at: float, body: bytes, status: int = 200, generation: int = 1, path: str = "/") -> Sample:
    seen = Body()
    seen.add(body)
    return Sample(0, "new", path, at, at, at, Outcome.OK, status, generation, "", seen.length, seen.digest)


def before(*bodies: bytes, status: int = 200, times: int = STABLE_FROM) -> list[Sample]:
    return [reply(n / 100, body, status) for n in range(times) for body in bodies]


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        pytest.param(before(b"hello"), reply(11, b"hello"), "", id="the same"),
        pytest.param(before(b"hello"), reply(11, b"", 404), "status 404, before 2xx", id="404"),
        pytest.param(before(b"hello"), reply(11, b"", 302), "status 302, before 2xx", id="302"),
        pytest.param(before(b"hello"), reply(11, b""), "an empty body, before none", id="empty"),
        pytest.param(before(b"hello"), reply(11, b"hell"), "a body of 4 bytes, before 5", id="another length"),
        pytest.param(before(b"hello"), reply(11, b"world"), "another body of the same length", id="another body"),
        pytest.param(before(b"hello"), reply(11, b"hello", 204), "", id="the same class"),
        pytest.param(before(b"no", status=404), reply(11, b"no", 404), "", id="404 before too"),
        pytest.param(before(b"no", status=404), reply(11, b"no", 200), "status 200, before 4xx", id="404 only before"),
        pytest.param(before(b"", status=302), reply(11, b"", 302), "", id="empty before too"),
        pytest.param(before(b"v1 1 4711"), reply(11, b"v1 2 40712"), "", id="generation and pid"),
        pytest.param(before(b"tokenA", b"tokenB"), reply(11, b"tokenC"), "", id="varies, of one length"),
        pytest.param(before(b"tokenA", b"tokenB"), reply(11, b"short"), "a body of 5 bytes", id="varies, other length"),
        pytest.param(before(b"a", b"bb"), reply(11, b"ccc"), "", id="varies in length"),
        pytest.param(before(b"a", b"bb"), reply(11, b""), "an empty body", id="varies in length, but never empty"),
        pytest.param(before(b"a", b""), reply(11, b"ccc"), "", id="sometimes empty"),
        pytest.param(before(b"a", times=2), reply(11, b""), "", id="too few to be stable"),
        pytest.param(before(b"a", times=1), reply(11, b"", 404), "status 404", id="a class is known from one"),
        pytest.param(before(b"hello"), reply(11, b"other", path="/other"), "", id="a path without a reply before"),
    ],
)
def test_what_differs(old: list[Sample], new: Sample, what: str) -> None:
    found = compare([*old, new], until=10.0)
    assert [difference.what.startswith(what) for difference in found] == ([True] if what else [])


def test_losses_are_not_counted_twice_and_differences_are_counted_by_generation() -> None:
    samples = before(b"hello")
    samples += [reply(11, b"", 404, generation=2)] * 3 + [reply(12, b"", 404, generation=3)]
    samples.append(Sample(0, "new", "/", 12, 12, 12, Outcome.SERVER_ERROR, 500, 3))
    samples.append(Sample(0, "new", "/", 12, 12, 12, Outcome.TIMEOUT))
    assert compare(samples, until=10.0) == (
        Difference("/", 2, "status 404, before 2xx", 3),
        Difference("/", 3, "status 404, before 2xx", 1),
    )


def test_a_rehearsal_with_differences_is_not_ok_and_names_them_first() -> None:
    report = build([*before(b"hello"), *[reply(11, b"", 404, generation=2)] * 3], [UPGRADE], stop=None)
    assert (report.ok, report.lost, report.different) == (False, 0, 3)
    lines = text_report.text(report).splitlines()
    assert lines[0] == "0 of 13 requests lost, 3 replies DIFFERENT, in 1 upgrade"
    assert lines[1] == "DIFFERENT: 3 replies to GET / from generation 2: status 404, before the first upgrade 2xx"
    values = report.to_json()
    assert values["different"] == 3
    assert values["differences"] == [{"path": "/", "generation": 2, "what": "status 404, before 2xx", "count": 3}]
    assert build([*before(b"hello"), reply(11, b"hello", generation=2)], [UPGRADE], stop=None).ok


def test_digits_may_be_cut_anywhere() -> None:
    whole, parts = Body(), Body()
    whole.add(b"pid 4711.")
    for part in (b"pid 4", b"7", b"11."):
        parts.add(part)
    assert (whole.length, whole.digest) == (parts.length, parts.digest)
    assert whole.length == 5


@pytest.mark.parametrize(
    ("value", "named"), [("17", "17"), ("", ""), ("1\r2", ""), ("x", ""), ("²", ""), ("1" * 21, "")]
)
def test_a_number_of_a_request_is_digits(value: str, named: str) -> None:
    assert request_number(value) == named


def test_a_reply_names_its_request_where_it_names_its_generation() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("A", "b")])
        return [b""]

    sent: list[Any] = []
    named = _name_generation(app, "X-Zdd-Generation", 3)
    named({"HTTP_X_ZDD_REQUEST": "17"}, lambda status, headers, exc: sent.append(headers))
    named({"HTTP_X_ZDD_REQUEST": "evil"}, lambda status, headers, exc: sent.append(headers))
    generation = ("X-Zdd-Generation", "3")
    assert sent == [[("A", "b"), generation, ("X-Zdd-Request", "17")], [("A", "b"), generation]]


@pytest.mark.parametrize("names", [((b"x-zdd-generation", b"3"),), ()])
def test_an_asgi_reply_names_its_request_where_it_names_its_generation(names: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.extend(message["headers"])

    runtime = SimpleNamespace(requests=SimpleNamespace(started=lambda *_: None, finished=lambda *_: None))
    counted = CountingApp(app, SimpleNamespace(runtime=runtime, has_cut=False), names, says_close=False)  # type: ignore[arg-type]
    headers = [(b"x-zdd-request", b"17")]
    scope = {"type": "http", "method": "GET", "path": "/", "http_version": "1.1", "headers": headers}
    asyncio.run(counted(scope, None, send))
    assert sent == ([*names, (b"x-zdd-request", b"17")] if names else [])
