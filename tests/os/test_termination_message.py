"""What stands in the termination message of a start, at each moment at which it may be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gunicorn.errors import HaltServer

from tests.helpers.forks import spawn, status_of
from zdd_web.board import Board, WorkerState
from zdd_web.gunicorn import boot_progress, termination_message
from zdd_web.gunicorn.termination_message import StartMessage
from zdd_web.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "termination-log"
    place.write_text("of the container's life before")
    return place


def test_start_that_is_killed_has_left_what_it_was_doing(place: Path) -> None:
    message = StartMessage(str(place))
    message.doing("importing the app (preload_app)")
    assert place.read_text() == "zdd_web: ended before it served, while importing the app (preload_app)"


def test_first_reason_stays(place: Path) -> None:
    message = StartMessage(str(place))
    message.failed("no such order\n")
    message.failed("the loop was ended")
    message.doing("its workers booted")
    assert place.read_text() == "zdd_web: the start failed: no such order\n"


def test_service_that_serves_leaves_nothing(place: Path) -> None:
    message = StartMessage(str(place))
    message.doing("starting")
    message.served()
    message.failed("what ends it now is another matter")
    assert place.read_text() == ""


ENDS: dict[str, tuple[BaseException, str]] = {
    "an error": (RuntimeError("boom"), "zdd_web: the start failed: RuntimeError: boom"),
    "an exit": (SystemExit(1), "zdd_web: the start failed: SystemExit: 1"),
    "a halt": (HaltServer("worker 7 ended", 3), "zdd_web: the start failed: worker 7 ended"),
    "an end of the loop": (StopIteration(), "of the container's life before"),
}


@pytest.mark.parametrize("how", ENDS)
def test_what_ends_a_start_goes_through_and_is_left(place: Path, how: str) -> None:
    error, left = ENDS[how]
    with pytest.raises(type(error)) as caught, StartMessage(str(place)).reporting():
        raise error
    assert caught.value is error
    assert place.read_text() == left


def test_worker_that_exits_leaves_nothing(place: Path) -> None:
    message = StartMessage(str(place))
    message.doing("its workers booted")
    before = place.read_text()

    def worker() -> None:
        with message.reporting():
            raise SystemExit(0)

    assert status_of(spawn(worker)) == 0
    assert place.read_text() == before


def test_upgrade_leaves_no_message(tmp_path: Path) -> None:
    message = StartMessage("")
    message.doing("starting")
    message.failed("not here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "environ", "path"),
    [
        ({}, {}, Settings().termination_log),
        ({"termination_log": "/a"}, {}, "/a"),
        ({"termination_log": "/a"}, {"ZDD_WEB_TERMINATION_LOG": "/b"}, "/b"),
        ({"termination_log": ""}, {}, ""),
        ({"termination_log": 7}, {}, Settings().termination_log),
    ],
)
def test_place_is_known_before_the_settings_are(installed: dict[str, Any], environ: dict[str, str], path: str) -> None:
    assert termination_message.path(installed, environ) == path


def test_progress_names_states_and_what_is_wrong() -> None:
    board = Board.create("unit", slots=3)
    board.header.workers_wanted = 3
    for age, (state, error) in enumerate(
        [(WorkerState.BOOTING, "check 'database': no answer"), (WorkerState.READY, ""), (WorkerState.BOOTING, "")], 1
    ):
        slot = board.claim(age)
        slot.pid, slot.state, slot.error = 4710 + age, state, error
    assert boot_progress.progress(board.snapshot()) == "workers: 2 booting, 1 ready of 3; check 'database': no answer"
    board.close()


def test_progress_of_a_start_without_workers() -> None:
    board = Board.private(name="unit")
    board.header.workers_wanted = 2
    assert boot_progress.progress(board.snapshot()) == "workers: none yet of 2"
