"""What the tests without a server share: a board to stand on, and the proof that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator

import pytest

from zdd_web import process
from zdd_web.board import Board
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings
from zdd_web.system import pauses
from zdd_web.waitgroup import all_groups


def descriptors() -> set[tuple[int, str]]:
    """Return the open descriptors of this process and what is behind them."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add((int(entry), os.readlink(f"/proc/self/fd/{entry}")))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a descriptor open or a child process unreaped."""
    # A board that another test has closed is not this one's.
    process.use(None)
    all_groups.observer = None
    # Nor is a loop that another test has played: its turns do not come any more, which looks like a pause.
    pauses.forget()
    before = descriptors()
    yield
    process.use(None)
    all_groups.observer = None
    give_up = time.monotonic() + 5
    while descriptors() - before and time.monotonic() < give_up:
        gc.collect()  # a mapping that is part of a cycle is not a leak
        # Nor is what a thread closes that is about to end, such as the loop of an asynchronous check that was late.
        time.sleep(0.01)
    assert descriptors() - before == set()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def no_handle() -> Iterator[None]:
    """Have this process make its handle anew, from the environment as it is then."""
    before = process._current
    process.use(None)
    yield
    process.use(before)


@pytest.fixture
def service() -> Iterator[Callable[..., Board]]:
    """Make a board this process's own, as a worker does after its fork: `service(Phase.SERVING, health_path="/up")`."""
    before = process._current
    boards = []

    def attach(phase: Phase = Phase.SERVING, successor: Phase | None = None, **settings: object) -> Board:
        board = Board.private("unit")
        board.header.phase, board.header.successor_phase = phase, successor or 0
        process.attach(board, None, Settings(**settings))  # type: ignore[arg-type]
        boards.append(board)
        return board

    yield attach
    process.use(before)
    for board in boards:
        board.close()
