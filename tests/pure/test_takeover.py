"""The running master's side of a takeover: whose connections take a place, and how many are looked at in a turn."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.generations import a_generation
from zdd_web.board import Board
from zdd_web.gunicorn.upgrade import takeover as module
from zdd_web.gunicorn.upgrade.takeover import BACKLOG, MOST_WAITING, TakeoverListener
from zdd_web.system import clock

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as another user")


@pytest.fixture
def offer() -> Iterator[TakeoverListener]:
    # An abstract address, which any user can connect to.
    board = Board.create(f"unit-{os.getpid()}", slots=1)
    offer = TakeoverListener(a_generation(board, takeover=True), lambda *request: None)
    offer.open()
    yield offer
    offer.close()
    board.close()


def connect(offer: TakeoverListener, stack: contextlib.ExitStack, *, uid: int = 0) -> None:
    end = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    end.setblocking(False)
    with contextlib.ExitStack() as user:
        if uid:
            os.seteuid(uid)
            user.callback(os.seteuid, 0)
        end.connect(offer._where)


@root_only
def test_connections_of_another_user_take_no_place_and_are_gone_in_a_turn(
    offer: TakeoverListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ACCEPTS_FOR", 60.0)
    with contextlib.ExitStack() as stack:
        for _ in range(BACKLOG):
            connect(offer, stack, uid=65534)
        connect(offer, stack)
        offer.follow()
        # The one behind them all has been let in, and the loop turns faster from now on.
        assert len(offer._waiting) == 1
        assert offer.busy
        offer._forget()
        offer.follow()
        assert not offer.busy


@root_only
def test_turn_ends_although_others_go_on_to_connect(offer: TakeoverListener, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [clock.now_ns()]

    def later() -> int:
        now[0] += int(module.ACCEPTS_FOR * 1e9 / 3)
        return now[0]

    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connect(offer, stack, uid=65534)
        monkeypatch.setattr(clock, "now_ns", later)
        monkeypatch.setattr(clock, "since", lambda instant: (later() - instant) / 1e9)
        offer.follow()
        assert offer.busy
        monkeypatch.undo()
        assert offer._rendezvous is not None
        left = offer._rendezvous.accept()
        assert left is not None
        left.close()


def test_no_more_of_ours_are_let_in_than_have_a_place(offer: TakeoverListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACCEPTS_FOR", 60.0)
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_WAITING + 2):
            connect(offer, stack)
        offer.follow()
        assert len(offer._waiting) == MOST_WAITING
        assert offer.busy


def test_path_belongs_to_this_user_alone(tmp_path: Path) -> None:
    where = tmp_path / "takeover"
    board = Board.create("unit", slots=1)
    generation = a_generation(board, takeover=True, takeover_socket=str(where))
    offer = TakeoverListener(generation, lambda *request: None)
    offer.open()
    try:
        assert where.stat().st_mode & 0o777 == 0o600
    finally:
        offer.close()
        board.close()
    assert not where.exists()
