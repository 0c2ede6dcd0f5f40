"""Pid files and look-ups where pids are had again at once, and where /proc hides other users' processes."""

from __future__ import annotations

import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import spawn, status_of
from tests.helpers.masters import NOBODY_UID, Masters
from tests.helpers.namespaces import become_dumpable, in_pid_namespace, next_pid, with_hidepid
from zdd_web import service
from zdd_web.board import Board
from zdd_web.errors import ServiceNotFound
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.system import proc

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces, and be another user in them"),
]

NAME = f"unit-{uuid.uuid4().hex[:12]}"
HIDEPID = pytest.mark.parametrize("level", [1, 2])


@pytest.fixture
def path() -> Iterator[Path]:
    """A pid file in a directory that is nobody's own."""
    with tempfile.TemporaryDirectory(prefix="zdd-web-test-") as directory:
        os.chown(directory, NOBODY_UID, NOBODY_UID)
        yield Path(directory, "shop.pid")


def stale_after(path: Path, reuse: Callable[[Masters], int]) -> list[object]:
    """Start a master, write its pid file, end it, and give its pid to another process; then judge the file.

    Returns whether it was stale before and after.
    """

    def scene() -> object:
        masters = Masters()
        try:
            pid = masters.start(NAME)
            file = PidFile(str(path), os.getpid())
            file.create(pid)
            # The clock is set back when the host has its time: the file looks written after the next process's start.
            os.utime(path, (4_000_000_000, 4_000_000_000))
            before = file.remove_if_stale()
            os.kill(pid, signal.SIGKILL)
            status_of(pid)
            next_pid(pid)
            again = reuse(masters)
            return [before, again == pid, file.remove_if_stale(), path.exists()]
        finally:
            masters.stop()

    found: list[object] = in_pid_namespace(scene)
    return found


def idle(masters: Masters) -> int:
    pid = spawn(signal.pause)
    masters.pids.append(pid)
    return pid


def worker(masters: Masters) -> int:
    board = Board.create(f"{NAME}-2", slots=1)
    board.header.master_pid = os.getpid()
    return idle(masters)


def test_pid_that_an_unrelated_process_has_now_makes_the_file_stale(path: Path) -> None:
    assert stale_after(path, idle) == [False, True, True, False]


def test_pid_that_a_worker_of_another_service_has_now_makes_the_file_stale(path: Path) -> None:
    assert stale_after(path, worker) == [False, True, True, False]


def test_pid_that_another_master_has_now_is_respected(path: Path) -> None:
    # It may be this service, under another NAME: to start beside it is worse than to refuse.
    assert stale_after(path, lambda masters: masters.start(f"{NAME}-2")) == [False, True, False, True]


@HIDEPID
def test_file_of_ones_own_whose_pid_a_hidden_process_has_is_stale(path: Path, level: int) -> None:
    def judge() -> object:
        become_dumpable(NOBODY_UID)
        file = PidFile(str(path), os.getpid())
        file.create(os.getppid())
        return [proc.state(os.getppid()), file.remove_if_stale(), path.exists()]

    assert with_hidepid(level, judge) == ["", True, False]


@HIDEPID
def test_file_of_another_user_that_names_a_hidden_process_is_respected(path: Path, level: int) -> None:
    PidFile(str(path), 0).create(os.getpid())
    pid = os.getpid()

    def judge() -> object:
        become_dumpable(NOBODY_UID)
        return PidFile(str(path), os.getpid()).remove_if_stale()

    assert with_hidepid(level, judge) is False
    assert path.read_text() == f"{pid}\n"


@HIDEPID
def test_own_service_is_found_and_its_file_respected_where_others_are_hidden(path: Path, level: int) -> None:
    masters = Masters()

    def judge() -> object:
        become_dumpable(NOBODY_UID)
        try:
            own = masters.start(NAME)
            file = PidFile(str(path), os.getpid())
            file.create(own)
            os.utime(path, (1_000_000_000, 1_000_000_000))
            line = service.Line(os.getpid(), NAME, own)
            kept = line.is_active()
            try:
                hidden = service.find(pid=masters.pids[0]).pid
            except ServiceNotFound as error:
                hidden = str(error)
            return [
                service.find(name=NAME).pid == own,
                kept is not None and kept.pid == own,
                file.remove_if_stale(),
                hidden,
            ]
        finally:
            os.kill(own, signal.SIGKILL)
            status_of(own)
            masters.pids.remove(own)

    # Root's, of the same name.
    other = masters.start(NAME)
    try:
        found = with_hidepid(level, judge)
    finally:
        masters.stop()
    assert found[:3] == [True, True, False]
    assert str(other) in found[3]
