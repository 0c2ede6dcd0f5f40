"""Counters: what they add up, and that they never go back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from zdd_web.board import Board, Header, Slot, WorkerState
from zdd_web.health import Result
from zdd_web.lifecycle import Phase
from zdd_web.metrics import Collector, Totals, before, carry, exposition, totals
from zdd_web.system import clock

made: list[Board] = []


@pytest.fixture(autouse=True)
def close_boards() -> Iterator[None]:
    yield
    while made:
        made.pop().close()


def listen(board: Board, *listeners: tuple[str, int, int]) -> None:
    for index, each in enumerate(listeners):
        record = board.header.listener(index)
        record.name, record.length, record.limit = each
    board.header.listener_count = len(listeners)


def generation(requests: int = 0, **header: int) -> Board:
    board = Board.create("metrics", slots=4)
    made.append(board)
    slot = board.claim(1)
    slot.requests, slot.state = requests, WorkerState.SERVING
    for name, value in header.items():
        setattr(board.header, name, value)
    return board


def scrape(board: Board, accept: str = "") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    content_type, body = exposition(Collector(board), accept)
    assert content_type.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    return {(each.name, tuple(each.labels.items())): each.value for family in families for each in family.samples}


def test_the_silence_of_a_master_is_shown() -> None:
    assert scrape(generation())["zdd_web_master_silence_seconds", ()] == 0
    assert scrape(generation(tick_at=clock.after_ns(-60.0)))["zdd_web_master_silence_seconds", ()] >= 60


def test_counts_outlive_the_worker_that_counted() -> None:
    board = generation(requests=7)
    slot = board.slot(0)
    slot.server_errors, slot.late = 2, 1
    assert totals(board) == Totals(requests=7, server_errors=2, late_requests=1)
    board.free(slot)
    board.header.requests_gone, board.header.server_errors_gone, board.header.late_gone = 7, 2, 1
    assert totals(board) == Totals(requests=7, server_errors=2, late_requests=1)
    board.claim(2).requests = 1
    assert totals(board).requests == 8


def test_counts_go_on_along_a_chain_of_generations() -> None:
    first = generation(requests=100, upgrades_failed=2, upgrades_refused=1)
    second = generation(requests=10)
    carry(second, first)
    assert totals(second) == Totals(requests=110, upgrades_failed=2, upgrades_refused=1)
    # The first one still drains.
    first.slot(0).requests, first.header.upgrades_done, first.header.drain_took = 105, 1, 3_000_000_000
    carry(second, first)
    third = generation(requests=1)
    carry(third, second)
    assert totals(third) == Totals(
        requests=116, upgrades_done=1, upgrades_failed=2, upgrades_refused=1, last_drain=3_000_000_000
    )
    # A worker of it has gone, and is counted nowhere for an instant.
    second.slot(0).state = WorkerState.FREE
    carry(third, second)
    assert totals(third).requests == 116


def test_the_board_of_another_version_is_left_alone() -> None:
    first, second = generation(requests=100), generation()
    first.header.layout = 99
    carry(second, first)
    assert before(second) == Totals()


@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * len(Totals._fields)), min_size=1))
def test_nothing_goes_back(seen: list[tuple[int, ...]]) -> None:
    total = Totals()
    for each in seen:
        after = total.at_least(Totals(*each))
        assert all(new >= old for new, old in zip(after, total, strict=True))
        total = after


def test_there_is_room_for_all_totals() -> None:
    assert Header.BEFORE_AT + len(Totals._fields) <= Header.LISTENERS_AT


def test_each_listener_has_its_queue_and_what_was_accepted_from_it() -> None:
    board = generation()
    assert list(board.listeners()) == []
    listen(board, ("http://127.0.0.1:80#0", 3, 2048), ("http://127.0.0.1:80#1", 0, 2048))
    slot = board.claim(1)
    slot.words[slot.base + Slot.ACCEPTS_AT + 1] = 7
    assert [(each.name, each.length, each.limit, each.accepted) for each in board.listeners()] == [
        ("http://127.0.0.1:80#0", 3, 2048, 0),
        ("http://127.0.0.1:80#1", 0, 2048, 7),
    ]


def test_a_scrape_has_everything() -> None:
    board = generation(requests=5, generation=3, phase=Phase.SERVING, workers_wanted=2, upgrade_took=1_500_000_000)
    listen(board, ("http://127.0.0.1:80", 3, 2048))
    slot = board.slot(0)
    slot.in_flight, slot.tasks, slot.oldest_task, slot.checks = 2, 1, 1, 1
    record = slot.check(0)
    record.name, record.result, record.fresh_until = "database", Result.PASSED, 2**62
    booting = board.claim(2)
    booting.checks = 0
    found = scrape(board)
    assert found["zdd_web_phase", (("phase", "serving"),)] == 1
    assert sum(value for (name, _), value in found.items() if name == "zdd_web_phase") == 1
    assert found["zdd_web_generation", ()] == 3
    assert found["zdd_web_workers", (("state", "serving"),)] == 1
    assert found["zdd_web_workers", (("state", "booting"),)] == 1
    assert found["zdd_web_requests_total", ()] == 5
    assert found["zdd_web_requests_in_flight", ()] == 2
    assert found["zdd_web_background_oldest_seconds", ()] > 0
    assert found["zdd_web_accept_queue_length", (("listener", "http://127.0.0.1:80"),)] == 3
    assert found["zdd_web_accept_queue_limit", (("listener", "http://127.0.0.1:80"),)] == 2048
    assert found["zdd_web_upgrades_total", (("outcome", "done"),)] == 0
    assert found["zdd_web_last_upgrade_seconds", ()] == 1.5
    assert found["zdd_web_check_passes", (("check", "database"),)] == 1
    assert {name for name, _ in found if not name.startswith("zdd_web_")} == set()


def test_openmetrics_is_for_who_asks_for_it() -> None:
    content_type, body = exposition(Collector(generation()), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_collector_never_shows_less_than_before() -> None:
    board = generation(requests=50)
    collector = Collector(board)
    stop, wrong = threading.Event(), []

    def churn() -> None:
        while not stop.is_set():
            slot = board.slot(0)
            requests = slot.requests
            board.free(slot)
            board.header.requests_gone += requests
            board.claim(1).requests = 5

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        last = 0.0
        for _ in range(200):
            value = next(metric for metric in collector.collect() if metric.name == "zdd_web_requests").samples[0].value
            if value < last:
                wrong.append((last, value))
            last = value
    finally:
        stop.set()
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("tasks", [0, 3])
def test_the_age_of_background_work_is_that_of_the_oldest(tasks: int) -> None:
    board = generation()
    board.slot(0).tasks, board.slot(0).oldest_task = tasks, 0
    assert scrape(board)["zdd_web_background_oldest_seconds", ()] == 0


def test_every_metric_is_documented_and_no_other() -> None:
    board = generation()
    slot = board.slot(0)
    slot.checks = 1
    slot.check(0).name = "database"
    board.header.release = "7"
    listen(board, ("http://127.0.0.1:80", 0, 1))
    families = list(Collector(board).collect())
    kinds = {
        each.name.removeprefix("zdd_web_") + ("_total" if each.type == "counter" else ""): (
            each.type,
            "".join(sorted({name for sample in each.samples for name in sample.labels})),
        )
        for each in families
    }
    page = Path(__file__).parents[2] / "docs/reference/metrics.md"
    rows = [
        [cell.strip(" `") for cell in row.split("|")[1:-1]] for row in page.read_text().splitlines() if row[:3] == "| `"
    ]
    assert {row[0]: (row[1], row[2]) for row in rows} == kinds
