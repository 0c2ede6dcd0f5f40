"""A master is asked to give up an upgrade by what is written into a memfd of its own, whatever is written there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.commands import zdd
from tests.helpers.forks import in_child
from tests.helpers.masters import NOBODY_UID, Masters, become
from zdd_web import service
from zdd_web.board import Board, UpgradeState
from zdd_web.board.cancel_request import CancelRequest, take_back, write
from zdd_web.cli import control
from zdd_web.lifecycle import Phase

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def request_of() -> Iterator[CancelRequest]:
    request = CancelRequest()
    yield request
    request.close()


@pytest.fixture
def masters() -> Iterator[Masters]:
    masters = Masters()
    yield masters
    masters.stop()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"unit-{os.getpid()}-{abs(hash(request.node.nodeid))}"


def test_only_the_upgrade_that_was_named_is_cancelled(request_of: CancelRequest) -> None:
    write(request_of.fd, 3, pid=4711)
    assert [request_of.asked_by(number) for number in (2, 3, 4)] == [None, 4711, None]
    take_back(request_of.fd, 4)
    assert request_of.asked_by(3) == 4711
    take_back(request_of.fd, 3)
    assert request_of.asked_by(3) is None


def test_nothing_is_asked_of_a_takeover_before_the_first_upgrade(request_of: CancelRequest) -> None:
    # Its number is that of the last SIGUSR2, which is 0 then.
    assert request_of.asked_by(0) is None
    write(request_of.fd, 0, pid=4711)
    assert request_of.asked_by(0) == 4711
    request_of.clear()
    assert request_of.asked_by(0) is None


@pytest.mark.parametrize("written", [b"", b"\3", b"\xff" * 64, os.urandom(1000)])
def test_whatever_is_written_there_cancels_nothing_else(request_of: CancelRequest, written: bytes) -> None:
    os.pwrite(request_of.fd, written, 0)
    assert request_of.asked_by(3) is None
    os.ftruncate(request_of.fd, 0)
    assert request_of.asked_by(0) is None


def test_a_child_that_has_closed_it_asks_nothing(request_of: CancelRequest) -> None:
    def child() -> object:
        request_of.close()
        request_of.close()
        request_of.clear()
        return request_of.asked_by(3)

    assert in_child(child) is None


def test_no_program_that_is_started_inherits_it(request_of: CancelRequest) -> None:
    assert not os.get_inheritable(request_of.fd)


def can_be_asked(board: Board) -> None:
    # Kept by a reference for as long as the process runs.
    board.request = CancelRequest()  # type: ignore[attr-defined]


def test_master_is_asked_by_its_user_and_an_older_one_cannot_be(masters: Masters, name: str) -> None:
    new = service.find(pid=masters.start(name, edit=can_be_asked))
    old = service.find(pid=masters.start(f"{name}-old"))
    assert (new.ask_to_cancel(1), old.ask_to_cancel(1)) == (True, False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_asks_a_master_of_another_user_and_not_the_other_way_round(masters: Masters, name: str) -> None:
    theirs = service.find(pid=masters.start(name, uid=NOBODY_UID, edit=can_be_asked))
    ours = service.find(pid=masters.start(f"{name}-root", edit=can_be_asked))
    assert theirs.ask_to_cancel(1)

    def as_nobody() -> object:
        become(NOBODY_UID)
        try:
            return ours.ask_to_cancel(1)
        except PermissionError as error:
            return type(error).__name__

    assert in_child(as_nobody) == "PermissionError"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_memfd_that_a_master_was_passed_by_another_user_is_not_written(masters: Masters, name: str) -> None:
    def passed(board: Board) -> None:
        os.seteuid(NOBODY_UID)
        can_be_asked(board)
        os.seteuid(0)

    generation = service.find(pid=masters.start(name, edit=passed))
    assert not generation.ask_to_cancel(1)


def test_master_that_has_ended_is_not_asked(masters: Masters, name: str) -> None:
    generation = service.find(pid=masters.start(name, edit=can_be_asked))
    masters.stop()
    assert not generation.ask_to_cancel(1)


def test_cancel_of_an_older_master_says_that_it_cannot(masters: Masters, name: str) -> None:
    def boots(board: Board) -> None:
        board.header.upgrade_state, board.header.upgrade_number = UpgradeState.BOOTING, 1

    pid = masters.start(name, edit=boots)
    result = zdd("cancel", "--name", name)
    assert result.exit_code == 1
    assert f"the master {pid} cannot be asked: its zdd_web is older" in result.output


def test_cancel_that_comes_too_late_says_which_generation_serves(
    masters: Masters, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commits(board: Board) -> None:
        board.header.upgrade_state, board.header.upgrade_number = UpgradeState.COMMITTING, 1
        board.header.phase = Phase.RETIRING

    masters.start(name, 4, edit=commits)
    result = zdd("cancel", "--name", name)
    assert result.exit_code == 1
    assert "too late: generation 5 serves" in result.output


def test_upgrade_of_an_older_master_that_hangs_says_that_its_signal_waits(
    masters: Masters, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ANSWER_WITHIN", 0.05)

    def hang(board: Board) -> None:
        os.read(os.pipe()[0], 1)

    masters.start(name, on_usr2=hang)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("its SIGUSR2 still waits: it may upgrade when it runs again")
    assert "serves on" not in result.output


def test_upgrade_withdraws_what_was_asked_before_it(masters: Masters, name: str) -> None:
    def obey(board: Board) -> None:
        asked = board.request.asked_by(1)  # type: ignore[attr-defined]
        board.header.upgrade_state = UpgradeState.DONE if asked is None else UpgradeState.REFUSED

    generation = service.find(pid=masters.start(name, edit=can_be_asked, on_usr2=obey))
    assert generation.ask_to_cancel(1)
    assert zdd("upgrade", "--name", name).exit_code == 0
