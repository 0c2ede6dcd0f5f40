"""The load's own health, the requests it sends by weight, and its open loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.os.test_load import Server, keep_answering, read_request
from zdd_web.cli.rehearse.generator_health import EVERY, Watch
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.request_mix import Request, in_turn, parse
from zdd_web.cli.rehearse.samples import Outcome, Sample


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_round_has_each_request_as_often_as_it_weighs_and_spread(weights: list[int]) -> None:
    requests = [Request(f"/{n}", weight) for n, weight in enumerate(weights)]
    found = in_turn(requests)
    assert Counter(found) == Counter({each: each.weight for each in requests})
    for each in requests:
        # No stretch in which one of them is left out for longer than twice its share, or at the ends once.
        places = [n for n, one in enumerate(found) if one is each]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps, default=0) <= 2 * len(found) / each.weight + len(requests)


@pytest.mark.parametrize(
    ("text", "wrong"), [("0:/", "weight 0"), ("1001:/", "weight 1001"), ("99999999:/", "must be from 1 to 1000")]
)
def test_a_weight_that_cannot_be_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse(text)


def test_generator_that_works_without_a_pause_is_the_bottleneck() -> None:
    async def busy() -> Watch:
        watch = Watch()
        looking = asyncio.ensure_future(watch.run())
        for _ in range(8):
            until = time.thread_time() + 3 * EVERY
            while time.thread_time() < until:
                pass
            await asyncio.sleep(0)
        looking.cancel()
        return watch

    health = asyncio.run(busy()).health(None, None, 0, 1)
    assert health.late_ms > EVERY * 1000
    assert any("waited for a CPU" in note for note in health.notes)


def test_upload_sends_its_body_and_is_no_idempotent_request() -> None:
    bodies: list[int] = []

    def script(connection: object, number: int) -> None:
        data = b""
        head_length = -1
        while head_length < 0 or len(data) < head_length + 1000:
            data += connection.recv(4096)  # type: ignore[attr-defined]
            if b"\r\n\r\n" in data:
                head_length = data.index(b"\r\n\r\n") + 4
        assert data.startswith(b"POST /up HTTP/1.1\r\n")
        assert b"content-length: 1000\r\n" in data.lower()
        bodies.append(len(data) - head_length)
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]

    found: list[Sample] = []
    with Server(script) as server:  # type: ignore[arg-type]
        load = Load("127.0.0.1", server.port, [parse("/up", upload=1000)], 1, 0.0, sink=found.append)
        with LoadThread(load):
            deadline = time.monotonic() + 20
            while not found and time.monotonic() < deadline:
                time.sleep(0.01)
    assert set(bodies) == {1000}
    assert {(each.outcome, each.method, each.status) for each in found} == {(Outcome.OK, "POST", 201)}


def test_stream_may_take_longer_than_the_timeout_if_it_is_not_silent() -> None:
    def script(connection: object, number: int) -> None:
        read_request(connection)  # type: ignore[arg-type]
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")  # type: ignore[attr-defined]
        for _ in range(8):
            connection.sendall(b"1\r\nx\r\n")  # type: ignore[attr-defined]
            time.sleep(0.1)
        if number:
            time.sleep(2)  # silence
        connection.sendall(b"0\r\n\r\n")  # type: ignore[attr-defined]

    found: list[Sample] = []
    with Server(script) as server:  # type: ignore[arg-type]
        load = Load("127.0.0.1", server.port, [Request("/s", stream=True)], 1, 0.0, timeout=0.5, sink=found.append)
        with LoadThread(load):
            deadline = time.monotonic() + 20
            while len(found) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
    assert [each.outcome for each in found[:2]] == [Outcome.OK, Outcome.TIMEOUT]
    assert found[1].detail == "reply incomplete"


def test_open_loop_sends_at_its_rate_and_closed_connections_are_among_them() -> None:
    found: list[Sample] = []
    with Server(keep_answering()) as server:
        load = Load("127.0.0.1", server.port, ["/"], 8, 0.5, rate=100.0, sink=found.append)
        with LoadThread(load) as thread:
            deadline = time.monotonic() + 30
            while len(found) < 100 and time.monotonic() < deadline:
                time.sleep(0.01)
        health = thread.health()
    first = min(each.started for each in found)
    # Each request counts from the instant at which it was due, whenever it was sent.
    for number, each in enumerate(sorted(found, key=lambda each: each.started)[:100]):
        assert each.started == pytest.approx(first + number / 100.0, abs=1e-6)
    assert {each.kind for each in found} == {"new", "keepalive", "thinking"}
    assert health.asked == 100.0
    assert load.samples == []


def test_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rate=0: need a positive number of requests a second"):
        Load("127.0.0.1", 1, ["/"], rate=0)


def test_load_that_is_stopped_at_once_does_not_wait_for_a_reply() -> None:
    asked = asyncio.Event()

    def script(connection: object, number: int) -> None:
        read_request(connection)  # type: ignore[arg-type]
        asked.set()
        connection.recv(1)  # type: ignore[attr-defined]

    found: list[Sample] = []
    with Server(script) as server:  # type: ignore[arg-type]
        thread = LoadThread(Load("127.0.0.1", server.port, ["/"], 1, 0.0, timeout=600.0, sink=found.append))
        thread.start()
        deadline = time.monotonic() + 20
        while not asked.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        thread.stop(at_once=True)
    assert found == []
