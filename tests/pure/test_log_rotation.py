"""A rotation of logs reaches every generation once, and no file that cannot be opened ends anything."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.gunicorn.log_rotation import Rotation, reopening
from zdd_web.gunicorn.upgrade.successor_process import Upgrade
from zdd_web.system import log_files
from zdd_web.system.boot_log import BootLog


class Generation:
    """A master as far as rotations go, with a channel to its neighbours in which a message waits for a turn."""

    def __init__(self) -> None:
        self.reopened = 0
        self.links: list[Link] = []
        self.rotation = Rotation(self._reopen, lambda: self.links)

    def _reopen(self) -> None:
        self.reopened += 1


class Link:
    """One generation's end of a channel."""

    def __init__(self) -> None:
        self.reopen_number = 0
        self.other: Link = self
        self.sent = 0

    def reopen(self, number: int) -> None:
        self.sent += 1
        self.other.reopen_number = max(self.other.reopen_number, number)


def line_of(count: int) -> list[Generation]:
    generations = [Generation() for _ in range(count)]
    for older, younger in itertools.pairwise(generations):
        ours, theirs = Link(), Link()
        ours.other, theirs.other = theirs, ours
        older.links.append(ours)
        younger.links.append(theirs)
    return generations


@given(st.integers(1, 5), st.data())
def test_one_signal_reaches_every_generation_once(count: int, data: st.DataObject) -> None:
    line = line_of(count)
    data.draw(st.sampled_from(line)).rotation.request()
    for each in data.draw(st.permutations(line * count)):
        each.rotation.follow()
    for _ in range(count):
        for each in line:
            each.rotation.follow()
    assert [each.reopened for each in line] == [1] * count
    # Nobody goes on sending.
    assert all(link.sent == 1 for each in line for link in each.links)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_each_signal_reaches_every_generation(signalled: list[int]) -> None:
    line = line_of(4)
    for index in signalled:
        line[index].rotation.request()
        for _ in line:
            for each in line:
                each.rotation.follow()
    assert [each.reopened for each in line] == [len(signalled)] * 4


def test_rotation_after_one_of_a_clock_that_is_ahead_is_passed_on() -> None:
    first, second = line_of(2)
    first.links[0].reopen_number = 1 << 62
    first.rotation.follow()
    second.rotation.follow()
    first.rotation.request()
    second.rotation.follow()
    assert (first.reopened, second.reopened) == (2, 2)


def test_rotation_waits_on_the_channel_for_a_successor_that_boots() -> None:
    ours, theirs = Channel.pair()
    boot_log = BootLog()
    upgrade = Upgrade(os.getpid(), ours, boot_log, 60, 0)
    upgrade.reopen(7)
    message = theirs.receive()
    assert message is not None
    assert (message.kind, message.number("number"), message.number("nothing")) == ("reopen", 7, 0)
    for number in (9, 8, "x"):
        theirs.send("reopen", number=number)
    assert upgrade.poll() is None
    assert upgrade.reopen_number == 9
    boot_log.close()
    theirs.close()
    ours.close()


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[logging.FileHandler]:
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("tests.rotation").addHandler(handler)
    yield handler
    logging.getLogger("tests.rotation").removeHandler(handler)
    handler.close()


def test_files_that_were_renamed_are_seen(handler: logging.FileHandler, tmp_path: Path) -> None:
    assert not log_files.were_renamed()
    (tmp_path / "log").rename(tmp_path / "log.1")
    assert log_files.were_renamed()
    (tmp_path / "log").touch()
    assert log_files.were_renamed()


def test_handler_that_opens_its_file_at_the_first_record_is_left_alone(tmp_path: Path) -> None:
    later = logging.FileHandler(tmp_path / "later", delay=True)
    logging.getLogger("tests.rotation").addHandler(later)
    reopening(lambda: None)()
    assert later.stream is None
    assert not log_files.were_renamed()
    logging.getLogger("tests.rotation").removeHandler(later)
    later.close()


def test_file_that_cannot_be_opened_again_is_given_up_until_it_can(
    handler: logging.FileHandler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reopen() -> None:
        handler.close()
        handler.stream = handler._open()

    handle = reopening(reopen)
    path = handler.baseFilename
    handler.baseFilename = str(tmp_path / "missing" / "log")
    handle()
    assert 'where="log files"' in caplog.text
    handler.emit(logging.LogRecord("tests", logging.INFO, "", 0, "lost", (), None))
    handler.baseFilename = path
    handle()
    handler.emit(logging.LogRecord("tests", logging.INFO, "", 0, "found", (), None))
    assert Path(path).read_text() == "found\n"


def test_failure_to_look_at_the_open_files_does_not_end_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a worker it is called by the signal handler itself, in the middle of a request.
    def fails(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    reopened: list[int] = []
    handle = reopening(lambda: reopened.append(1))
    monkeypatch.setattr(log_files, "opened", fails)
    handle()
    monkeypatch.undo()
    monkeypatch.setattr(log_files, "discard_failed", fails)
    handle()
    assert reopened == [1, 1]
