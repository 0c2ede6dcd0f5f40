"""How many workers a canary has, and when it grows: the decisions, without a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.upgrade.canary import Canary, Watching, why_to_grow, workers_of


@pytest.mark.parametrize(
    ("share", "full", "workers"),
    [
        ("", 4, 4),
        ("1", 4, 1),
        ("3", 4, 3),
        ("4", 4, 4),
        ("99", 4, 4),
        ("1", 1, 1),
        ("1%", 4, 1),
        ("25%", 4, 1),
        ("26%", 4, 2),
        ("25%", 5, 2),
        ("10%", 10, 1),
        ("7%", 100, 7),
        ("99%", 4, 4),
        ("100%", 4, 4),
        ("50%", 1, 1),
    ],
)
def test_number_of_workers(share: str, full: int, workers: int) -> None:
    assert workers_of(share, full) == workers


def link(**fields: bool) -> Watching:
    return cast(Watching, SimpleNamespace(**{"may_grow": False, "is_active": False, "alone": False, **fields}))


@pytest.mark.parametrize(
    ("predecessor", "reason"),
    [
        (link(), ""),
        (link(may_grow=True), "the watch is passed"),
        (link(is_active=True), "it is active"),
        (link(alone=True), "no predecessor is left"),
        (link(alone=True, may_grow=True), "no predecessor is left"),
        (None, "no predecessor is left"),
    ],
)
def test_when_it_grows(predecessor: Watching | None, reason: str) -> None:
    assert why_to_grow(predecessor) == reason


def canary(share: str, workers: int) -> tuple[Canary, Any]:
    server = SimpleNamespace(num_workers=workers)
    return Canary(cast(ArbiterFacade, server), share), server


def numbers(made: Canary) -> tuple[int, int, int]:
    return made.size, made.at_gate, made.wanted


def test_it_grows_once_and_its_gate_stays_as_it_was() -> None:
    made, server = canary("25%", 8)
    assert numbers(made) == (2, 2, 2)
    assert made.described == {"canary": "2 of 8"}
    made.follow(link())
    server.num_workers = 9  # SIGTTIN
    assert numbers(made) == (2, 2, 2)
    made.follow(link(may_grow=True))
    assert numbers(made) == (2, 2, 9)
    assert made.described == {}
    made.follow(link())
    assert made.wanted == 9


def test_sigttou_leaves_no_more_workers_than_there_are_to_be() -> None:
    made, server = canary("3", 4)
    server.num_workers = 2
    assert numbers(made) == (3, 2, 2)


@pytest.mark.parametrize("share", ["", "4", "100%", "9"])
def test_generation_that_begins_with_all_workers_is_not_a_canary(share: str) -> None:
    made, server = canary(share, 4)
    assert numbers(made) == (0, 4, 4)
    server.num_workers = 0  # SIGWINCH to a daemon
    made.follow(None)
    assert numbers(made) == (0, 0, 0)
