"""Late arrivals: what is counted, and what a stop's last line recommends."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.board import Board
from zdd_web.gunicorn.workers.late_arrivals import LateArrivals, LateCounter, is_even, level, sender

BOTH = "DRAIN_DELAY = {}, GRACE_PERIOD = {}"


def late(quarters: tuple[int, ...] = (0, 0, 0, 0), new_by: float = 0.0, old: int = 0, by: float = 0.0) -> LateArrivals:
    return LateArrivals(sum(quarters) + old, max(by, new_by), "10.0.0.7:1", quarters, new_by)


@pytest.mark.parametrize(
    ("arrivals", "drain_delay", "cut", "remedy"),
    [
        pytest.param(late(old=1, by=9.3), 10, 0, "", id="one kept connection at the end"),
        pytest.param(late(old=500, by=9.9), 10, 0, "", id="many kept connections to the end"),
        pytest.param(late((9, 3, 0, 0), 4.0), 10, 0, "", id="new ones that end"),
        pytest.param(late((9, 3, 0, 0), 4.0, old=3, by=9.9), 10, 0, "", id="new ones that end, kept ones to the end"),
        pytest.param(late((0, 0, 0, 3), 0.4), 0, 0, BOTH.format(5, 45), id="no lame duck"),
        pytest.param(late((20, 20, 20, 20), 2.0), 2, 0, BOTH.format(5, 43), id="a lame duck too short to judge a rate"),
        pytest.param(late((40, 20, 9, 2), 9.5), 10, 0, BOTH.format(19, 49), id="thinning out to the end"),
        pytest.param(late((1, 0, 0, 1), 9.5), 10, 0, BOTH.format(19, 49), id="too few for a rate"),
        pytest.param(late((20, 21, 19, 20), 9.9), 10, 0, "ignores /readyz", id="at an even rate to the end"),
        pytest.param(late((40, 41, 39, 40), 19.9), 20, 0, "ignores /readyz", id="and twice as long does not change it"),
        pytest.param(late((20, 21, 19, 20), 9.9), 10, 4, r"ignores /readyz.*GRACE_PERIOD = 80", id="even, and cut"),
        pytest.param(late((9, 3, 0, 0), 4.0), 10, 4, BOTH.format(10, 80), id="ended, and cut"),
        pytest.param(late(old=1, by=9.3), 10, 1, BOTH.format(10, 80), id="kept, and cut"),
        pytest.param(late((40, 20, 9, 2), 9.5), 10, 1, BOTH.format(19, 89), id="thinning out, and cut"),
        pytest.param(late(), 10, 3, "", id="nothing was late"),
    ],
)
def test_what_a_stop_recommends(arrivals: LateArrivals, drain_delay: float, cut: int, remedy: str) -> None:
    said = arrivals.fields(drain_delay, grace_period=40, cut=cut)
    if not remedy:
        assert "remedy" not in said
    else:
        assert re.search(remedy, said["remedy"])
        assert "DRAIN_DELAY" in said["remedy"]
    # A setting that cannot help is not recommended.
    assert not ("ignores" in remedy and re.search(r"DRAIN_DELAY = (?!10 |20 )", said["remedy"]))
    assert level(said) == (logging.WARNING if remedy else logging.INFO)
    assert said.get("late", 0) == arrivals.count
    assert said.get("late_new", 0) == arrivals.new


@pytest.mark.parametrize(
    ("quarters", "even"),
    [
        ((5, 5, 5, 5), True),
        ((8, 8, 8, 4), True),
        ((8, 8, 8, 3), False),
        ((0, 8, 8, 8), False),
        ((1, 1, 1, 1), False),
    ],
)
def test_a_rate_is_even_when_the_last_quarter_has_half_of_the_others(quarters: tuple[int, ...], even: bool) -> None:
    assert is_even(quarters, drain_delay=10) is even
    assert not is_even(quarters, drain_delay=4)


def test_arrivals_of_workers_add_up_and_the_last_new_connection_names_the_peer() -> None:
    total = LateArrivals()

    def gone(**values: Any) -> Any:
        return SimpleNamespace(**{"late_quarters": (0, 0, 0, 0), "late_new_by": 0.0, **values})

    total.add(gone(late=1, late_by=9.0, late_peer="kept"))
    assert total.peer == "kept"
    total.add(gone(late=3, late_by=3.0, late_peer="new", late_quarters=(1, 2, 0, 0), late_new_by=3.0))
    total.add(gone(late=1, late_by=9.5, late_peer="kept too"))
    total.add(gone(late=2, late_by=4.0, late_peer="newer", late_quarters=(1, 1, 0, 0), late_new_by=4.0))
    assert total == LateArrivals(7, 9.5, "newer", (2, 3, 0, 0), 4.0)


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "found"),
    [
        (("10.1.4.7", 41234), "", ["127.0.0.1"], "10.1.4.7:41234"),
        (("10.1.4.7", 41234), "192.0.2.1", [], "10.1.4.7:41234"),
        (("10.1.4.7", 41234), "192.0.2.1", ["*"], "192.0.2.1"),
        (("10.1.4.7", 41234), "6.6.6.6, 192.0.2.1", ["*"], "192.0.2.1"),
        (("127.0.0.1", 41234), "", ["127.0.0.1"], "127.0.0.1:41234"),
        (("::1", 41234, 0, 0), "2001:db8::7", ["127.0.0.1", "::1"], "2001:db8::7"),
        (("192.0.2.1", 0), "192.0.2.1", ["127.0.0.1"], "192.0.2.1"),
        (("10.1.4.7", 41234), "192.0.2.1,10.0.0.1", ["10.0.0.0/8"], "192.0.2.1"),
        (("10.1.4.7", 41234), "10.0.0.2,10.0.0.1", ["10.0.0.0/8"], "10.0.0.2"),
        ("", "192.0.2.1", ["127.0.0.1"], "192.0.2.1"),
        (None, "", ["127.0.0.1"], "unix"),
        (b"\xff client", "", ["127.0.0.1"], "b'\\xff client'"),
        (("127.0.0.1", 1), "unknown, ,", ["127.0.0.1"], "unknown"),
    ],
)
def test_the_sender_is_the_forwarded_one_where_gunicorn_trusts_the_peer(
    peer: Any, forwarded: str, trusted: list[str], found: str
) -> None:
    assert sender(peer, forwarded, trusted) == found


def request(peer: Any, *headers: tuple[Any, Any]) -> Any:
    return SimpleNamespace(peer_addr=peer, headers=list(headers))


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.private("late")
    yield board
    board.close()


def test_a_worker_counts_new_connections_apart(board: Board) -> None:
    slot = board.claim(1)
    counter = LateCounter(slot, drain_delay=10, trusted=["127.0.0.1"])
    second = 10**9
    counter.count(request(("127.0.0.1", 1), ("X-FORWARDED-FOR", "10.0.0.1")), 9 * second, is_new=False)
    assert (slot.late, slot.late_quarters, slot.late_peer) == (1, (0, 0, 0, 0), "10.0.0.1")
    for at in (1, 3, 4):
        counter.count(request(("127.0.0.1", 1), (b"x-forwarded-for", b"10.0.0.2")), at * second, is_new=True)
    counter.count(request(("10.0.0.3", 1)), 9 * second, is_new=False)
    assert (slot.late, slot.late_quarters, slot.late_peer) == (5, (1, 2, 0, 0), "10.0.0.2")
    assert (slot.late_by, slot.late_new_by) == (9 * second, 4 * second)


def test_a_slot_that_is_taken_again_counts_from_zero(board: Board) -> None:
    slot = board.claim(1)
    LateCounter(slot, 10, []).count(request(("10.0.0.1", 1)), 5, is_new=True)
    assert (slot.late, slot.late_quarters, slot.late_new_by) == (1, (1, 0, 0, 0), 5)
    board.free(slot)
    slot = board.claim(2)
    assert (slot.late, slot.late_quarters, slot.late_new_by, slot.late_peer) == (0, (0, 0, 0, 0), 0, "")
