"""When a new generation is said to answer with more errors than the old one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.board import Board, WorkerState
from zdd_web.gunicorn.upgrade.error_watch import ErrorWatch, Traffic, judge

COUNTS = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("old", "new", "allowed", "meanwhile", "at_the_end"),
    [
        # A tenth of its requests fail.
        ((500, 0), (500, 50), 0.01, True, True),
        ((50, 0), (50, 5), 0.01, True, True),
        # Nobody asks the old one any more.
        ((0, 0), (50, 5), 0.01, True, True),
        # One is an accident, and two of fifty may be.
        ((50, 0), (50, 1), 0.0, False, False),
        ((50, 0), (50, 2), 0.01, False, True),
        # A neighbour is down.
        ((500, 250), (500, 255), 0.01, False, False),
        ((500, 500), (500, 500), 0.0, False, False),
        # It is better.
        ((500, 50), (500, 5), 0.0, False, False),
        # As much as is allowed.
        ((500, 0), (500, 5), 0.01, False, False),
        ((500, 0), (500, 500), 1.0, False, False),
        ((0, 0), (0, 0), 0.0, False, False),
    ],
)
def test_verdict(old, new, allowed, meanwhile, at_the_end):
    verdicts = [bool(judge(Traffic(*old), Traffic(*new), allowed, is_over=is_over)) for is_over in (False, True)]
    assert verdicts == [meanwhile, at_the_end]


@given(old=st.tuples(COUNTS, COUNTS), new=st.tuples(COUNTS, COUNTS), allowed=st.floats(0, 1))
def test_what_is_rejected_meanwhile_would_be_at_the_end(old, new, allowed):
    # Counts are read one after the other: there may be more errors than requests for an instant.
    first, second = Traffic(*old), Traffic(*new)
    if judge(first, second, allowed, is_over=False):
        assert judge(first, second, allowed, is_over=True)


@given(old=st.tuples(COUNTS, COUNTS), new=st.tuples(COUNTS, COUNTS))
def test_whoever_allows_everything_rejects_nothing_but_more_errors_than_requests(old, new):
    if new[1] <= new[0]:
        assert judge(Traffic(*old), Traffic(*new), 1.0, is_over=True) == ""


def test_only_what_came_during_the_watch_counts_and_workers_that_are_gone_count_too():
    old, new = Board.create("old", slots=2), Board.create("new", slots=2)
    slots = []
    for board in (old, new):
        slot = board.claim(1)
        slot.state, slot.requests, slot.server_errors = WorkerState.SERVING, 1000, 500
        slots.append(slot)
    watch = ErrorWatch(old, new, 0.01)
    assert watch.judge(is_over=True) == ""
    slots[0].requests += 100
    new.header.requests_gone, new.header.server_errors_gone = 1100, 550
    new.free(slots[1])
    assert "for 50 of 100 requests (50.0%), the old generation for 0 of 100 requests" in watch.judge()
    for board in (old, new):
        board.close()
