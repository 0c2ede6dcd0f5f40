"""Listeners hear of each change of the phase, once, from a thread that looks at the board."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from queue import Queue

import pytest

from zdd_web import watch
from zdd_web.board import Board
from zdd_web.lifecycle import Phase

Service = Callable[..., Board]
Heard = Queue[tuple[Phase, Phase, int]]

PATIENCE = 30


@pytest.fixture(autouse=True)
def listeners(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(watch, "_listeners", {})
    yield
    watch.end()


@pytest.fixture
def heard() -> Heard:
    queue: Heard = Queue()
    watch.listen("test", lambda *change: queue.put(change))
    return queue


def test_each_change_is_told_with_what_was_before(service: Service, heard: Heard) -> None:
    board = service(Phase.BOOTING)
    board.header.generation = 7
    watch.start()
    for previous, phase in ((Phase.BOOTING, Phase.SERVING), (Phase.SERVING, Phase.LAME_DUCK)):
        board.header.phase = phase
        assert heard.get(timeout=PATIENCE) == (phase, previous, 7)
    watch.end()
    assert heard.empty()


def test_last_look_is_taken_at_the_end(service: Service, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK", PATIENCE)
    board = service(Phase.SERVING)
    watch.start()
    board.header.phase = Phase.LAME_DUCK
    board.header.phase = Phase.DRAINING
    watch.end()
    assert heard.get_nowait() == (Phase.DRAINING, Phase.SERVING, 1)
    assert heard.empty()


def test_nothing_is_told_where_nothing_changes(service: Service, heard: Heard) -> None:
    service(Phase.SERVING)
    watch.start()
    watch.end()
    assert heard.empty()


def test_nobody_watches_where_nobody_listens(service: Service) -> None:
    service()
    before = threading.active_count()
    watch.start()
    assert threading.active_count() == before
    watch.end()


def test_second_listener_of_a_name_takes_the_place_of_the_first(service: Service, heard: Heard) -> None:
    other: Heard = Queue()
    watch.listen("test", lambda *change: other.put(change))
    board = service(Phase.SERVING)
    watch.start()
    board.header.phase = Phase.RETIRING
    assert other.get(timeout=PATIENCE) == (Phase.RETIRING, Phase.SERVING, 1)
    watch.end()
    assert heard.empty()


def test_listener_that_raises_is_logged_and_keeps_nobody_from_hearing(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: Heard = Queue()
    watch.listen("broken", lambda *change: 1 / 0)
    watch.listen("other", lambda *change: after.put(change))
    board = service(Phase.SERVING)
    with caplog.at_level(logging.ERROR, logger="zdd_web"):
        watch.start()
        for previous, phase in ((Phase.SERVING, Phase.LAME_DUCK), (Phase.LAME_DUCK, Phase.DRAINING)):
            board.header.phase = phase
            assert after.get(timeout=PATIENCE) == (phase, previous, 1)
        watch.end()
    assert [record.message for record in caplog.records] == ["event=internal.error where=phase_changed:broken"] * 2
    assert "ZeroDivisionError" in caplog.text


def test_listener_that_hangs_keeps_no_worker_from_leaving(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FINAL_POLL_TIMEOUT", 0.05)
    called, released = threading.Event(), threading.Event()

    def hang(*change: object) -> None:
        called.set()
        released.wait(PATIENCE)

    watch.listen("test", hang)
    board = service(Phase.SERVING)
    watch.start()
    board.header.phase = Phase.DRAINING
    assert called.wait(PATIENCE)
    thread = next(each for each in threading.enumerate() if each.name == "zdd_web-watch")
    watch.end()
    assert thread.is_alive()
    released.set()
    thread.join(PATIENCE)
