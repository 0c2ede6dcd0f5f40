"""What a master notes of its deploys: the right one, at the right time, in memory of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zdd_web import history
from zdd_web.board import Board
from zdd_web.deploy_request import DeployRequest, standing
from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.upgrade.deploy_history import Deploys
from zdd_web.history import Entry
from zdd_web.settings import Settings
from zdd_web.system import shared_text

Make = Callable[..., Deploys]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make what a generation knows; it runs in `1` below `tmp_path`, and was started by the symlink `current`."""
    made: list[tuple[Deploys, Board]] = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "1")

    def generation(number: int = 1, inherited: Inheritance | None = None) -> Deploys:
        board = Board.create("deploys", slots=1)
        board.header.generation = number
        current = str(tmp_path / "current")
        launch = Launch(current, ("gunicorn",), {}, real_directory=str((tmp_path / "current").resolve()))
        made.append((Deploys(board.header, launch, current, "", inherited), board))
        return made[-1][0]

    yield generation
    for deploys, board in made:
        deploys.after_fork()
        board.close()


def inheriting(deploys: Deploys, *, taken: bool = False) -> Inheritance:
    """What the next generation inherits of that: copies of the descriptors, as after a fork."""
    fds = {name: os.dup(fd) for name, fd in deploys.hand_on(forks=not taken).items()}
    return Inheritance(2, os.getpid(), -1, -1, -1, (), (), taken=taken, **fds)


def noted(deploys: Deploys) -> list[tuple[str, str, int]]:
    entries = history.decode(shared_text.read(deploys._document.fd))
    return [(each.kind, each.outcome, each.generation) for each in entries]


def serve(deploys: Deploys) -> None:
    deploys._header.ready_at = 1
    deploys.follow(is_active=True)


def test_start_is_noted_once_when_it_serves(make):
    deploys = make()
    deploys.follow(is_active=True)
    assert noted(deploys) == []
    serve(deploys)
    serve(deploys)
    assert noted(deploys) == [("start", "done", 1)]


def test_what_is_refused_meanwhile_does_not_take_the_place_of_what_is_under_way(make, tmp_path):
    deploys = make()
    box = deploys._header.request_fd
    with standing(os.getpid(), box, os.geteuid(), DeployRequest(to=str(tmp_path / "2"), watch=60, max_errors=0.5)):
        deploys.begin()
    deploys.next_launch("")
    deploys.started()
    deploys.begin()
    deploys.ended("refused", "an upgrade is under way")
    assert deploys.watch(Settings()) == (60, 0.5)
    assert deploys.next_label == str((tmp_path / "2").resolve())
    deploys.ended("done")
    refused, done = history.decode(shared_text.read(deploys._document.fd))
    assert (refused.outcome, refused.directory) == ("refused", "")
    assert (done.outcome, done.directory) == ("done", str((tmp_path / "2").resolve()))
    assert "still leads to" in done.note


def test_successor_goes_on_with_what_was_noted_up_to_the_handover(make):
    old = make()
    serve(old)
    old.begin()
    old.next_launch("")
    new = make(2, inheriting(old))
    assert noted(new) == [("start", "done", 1)]
    new._header.ready_at = 1
    new.follow(is_active=False)
    old.ended("done")
    new.follow(is_active=True)
    assert noted(new) == [("start", "done", 1), ("deploy", "done", 2)]
    # From here on each writes its own.
    new.reloaded("done", 1.0)
    old.ended("lost", "killed")
    assert noted(new)[2:] == [("reload", "done", 2)]
    assert noted(old)[2:] == [("deploy", "lost", 2)]


@pytest.mark.parametrize(("taken", "kind"), [(False, "deploy"), (True, "takeover")])
def test_what_a_predecessor_could_not_note_is_noted_by_the_one_that_serves(make, taken, kind):
    old = make()
    serve(old)
    new = make(2, inheriting(old, taken=taken))
    serve(new)
    assert noted(new) == [("start", "done", 1), (kind, "done", 2)]


def test_predecessor_of_a_version_without_a_history_costs_nothing(make):
    new = make(2, Inheritance(2, os.getpid(), -1, -1, -1, (), ()))
    serve(new)
    assert noted(new) == [("deploy", "done", 2)]
    new._asked.request = DeployRequest(back=True)
    with pytest.raises(UpgradeError, match="no other release has served"):
        new.next_launch("")


def test_history_of_another_user_is_not_taken_over(make, monkeypatch):
    old = make()
    serve(old)
    inherited = inheriting(old)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    new = make(2, inherited)
    serve(new)
    assert noted(new) == [("deploy", "done", 2)]


def test_garbage_that_is_inherited_is_left_alone(make):
    fds = [os.memfd_create("garbage") for _ in range(2)]
    for fd in fds:
        os.write(fd, b"\xff" * 10_000)
    new = make(2, Inheritance(2, os.getpid(), -1, -1, -1, (), (), history=fds[0], lineage=fds[1]))
    serve(new)
    assert noted(new) == [("deploy", "done", 2)]
    links = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds if os.path.islink(f"/proc/self/fd/{fd}")}
    assert not [link for link in links if "garbage" in link]


def test_worker_has_nothing_left_that_it_could_write(make):
    deploys = make()
    fds = (deploys._header.history_fd, deploys._header.request_fd)
    deploys.after_fork()
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    deploys._append(Entry(1.0, "deploy", "done"))
