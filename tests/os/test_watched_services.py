"""`zdd-web status --watch` follows services by their boards, and looks at all processes now and then only."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.helpers.masters import Masters
from zdd_web import lookup, service
from zdd_web.board import Board
from zdd_web.cli import progress
from zdd_web.cli import watched_services as module
from zdd_web.cli.watched_services import Followed
from zdd_web.errors import ServiceNotFound


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The looks at all processes: an entry each."""
    found: list[int] = []
    survey = lookup.survey

    def counted(*arguments: object, **named: object) -> lookup.Survey:
        found.append(1)
        return survey(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(lookup, "survey", counted)
    return found


@pytest.fixture
def followed(masters: Masters, name: str) -> Iterator[Followed]:
    # The pids of other tests' masters are none of this one's.
    with contextlib.closing(Followed(lambda: service.lines(name))) as followed:
        yield followed


def pids(services: list[list[service.Generation]]) -> list[list[int]]:
    return [[each.pid for each in line] for line in services]


def test_all_processes_are_looked_at_once_however_often_the_boards_are(
    masters: Masters, name: str, followed: Followed, looks: list[int]
) -> None:
    pid = masters.start(name)
    for _ in range(20):
        assert pids(followed.look()) == [[pid]]
    assert len(looks) == 1


def test_the_time_between_two_looks_grows_with_what_one_takes(
    masters: Masters, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(module, "time", clock)
    found: list[float] = []

    def find() -> list[list[service.Generation]]:
        nonlocal now
        found.append(now)
        now += 2.0
        return []

    slow = Followed(find)
    while now < 100:
        slow.look()
        now += 0.5
    # Two seconds of forty each: a twentieth of one core.
    assert found == [0.0, 40.0, 80.0]


def test_a_successor_is_seen_by_the_board_of_its_predecessor_and_ended_generations_are_not(
    masters: Masters, name: str, followed: Followed, looks: list[int]
) -> None:
    successor = masters.start(f"{name}-later", 2)
    old = masters.start(name, successor=successor)
    assert pids(followed.look()) == [[old]]
    assert pids(followed.look()) == [[old, successor]]
    os.kill(old, signal.SIGKILL)
    os.waitpid(old, 0)
    assert pids(followed.look()) == [[successor]]
    os.kill(successor, signal.SIGKILL)
    os.waitpid(successor, 0)
    assert followed.look() == []
    assert len(looks) == 1


def test_a_pid_that_has_become_another_services_is_not_the_successor(
    masters: Masters, name: str, followed: Followed
) -> None:
    other = masters.start(f"{name}-other")
    old = masters.start(name, generation=2, successor=other)
    assert [pids(followed.look()) for _ in range(3)] == [[[old]]] * 3


def test_a_successor_is_looked_for_among_the_children_that_are_no_workers(
    masters: Masters, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_workers(board: Board) -> None:
        for pid in range(1001, 1003):
            board.order(pid - 1001).pid = pid

    old = masters.start(name, edit=has_workers)
    successor = masters.start(name, 2, predecessor=old)
    generation = service.generation_of(old)
    assert generation is not None
    looked_at: list[int] = []
    look = service.generation_of

    def counted(pid: int) -> service.Generation | None:
        looked_at.append(pid)
        return look(pid)

    monkeypatch.setattr(service, "generation_of", counted)
    monkeypatch.setattr(progress, "_children", lambda pid: [1001, 1002, successor])
    found = progress.successor_of(generation)
    assert found is not None
    assert (found.pid, looked_at) == (successor, [successor])
    found.close()
    generation.close()


def test_a_service_that_is_gone_is_looked_for_no_more_often(looks: list[int]) -> None:
    followed = Followed(lambda: [[service.find(name="there-is-none")]])
    with pytest.raises(ServiceNotFound):
        followed.look()
    for _ in range(5):
        assert followed.look() == []
    assert len(looks) == 1
