"""What a worker reads of its master's orders on the board."""

from __future__ import annotations

import functools
import os
import signal
from types import SimpleNamespace

import pytest

from tests.helpers.forks import in_child
from zdd_web import log
from zdd_web.board import Board
from zdd_web.gunicorn.workers import orders
from zdd_web.gunicorn.workers.orders import Once, Orders, describe


class Side:
    """A worker's side, as far as orders go."""

    def __init__(self, ppid: int) -> None:
        self.slot, self.pid = Board.private().slot(0), os.getpid()
        self.worker = SimpleNamespace(ppid=ppid, handle_exit=signal.getsignal(signal.SIGTERM))
        self.followed = 0

    def follow_orders(self) -> None:
        self.followed += 1


def test_one_process_of_those_that_are_forked_takes_it() -> None:
    once = Once()
    taken = [in_child(once.take) for _ in range(3)]
    assert taken == [True, False, False]
    assert not once.take()
    os.close(once._fd)


def test_a_worker_follows_the_word_on_its_slot_and_the_end_of_its_master() -> None:
    side, beats, once = Side(os.getppid()), [], Once()
    turn = Orders(side, once).turn(lambda: beats.append(1))  # type: ignore[arg-type]
    turn()
    assert (side.followed, len(beats)) == (0, 1)
    side.slot.order.retire = 1
    turn()
    assert (side.followed, len(beats)) == (1, 2)
    orphan = Side(os.getppid() + 1)
    Orders(orphan, once).turn(lambda: None)()  # type: ignore[arg-type]
    assert orphan.followed == 1
    os.close(once._fd)


def test_a_busy_loop_beats_seldom_and_follows_an_order_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "BEAT_EVERY", 10**15)
    side, beats, once = Side(os.getppid()), [], Once()
    turn = Orders(side, once).turn(lambda: beats.append(1))  # type: ignore[arg-type]
    for _ in range(5):
        turn()
    assert (side.followed, len(beats)) == (0, 1)
    side.slot.order.retire = 1
    turn()
    assert side.followed == 1
    os.close(once._fd)


@pytest.mark.parametrize(
    ("handler", "name"),
    [
        (signal.SIG_DFL, "SIG_DFL"),
        (None, "one that was not installed by Python"),
        (describe, "zdd_web.gunicorn.workers.orders.describe"),
        (functools.partial(describe), "functools.partial"),
        (Side(0).follow_orders, "tests.os.test_orders.Side.follow_orders"),
    ],
)
def test_a_handler_is_named(handler: object, name: str) -> None:
    assert describe(handler) == name
    log.format_event("handler.replaced", {"handler": name})
