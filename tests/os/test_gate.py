"""Nobody passes a gate that is shut, everybody one that is open, and the master's death ends the wait."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.forks import read_to_end, spawn, status_of
from zdd_web.board import Board
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.lifecycle import Phase

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create("unit", slots=1)
    yield board
    board.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.keep_reader()
    gate.leave()


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def say(self, text: str) -> None:
        os.write(self.writer, f"{text}\n".encode())

    def hear(self) -> str:
        """Return what comes next; a line is written at once."""
        return os.read(self.reader, 100).decode().strip()

    def rest(self) -> list[str]:
        """Return all that is said until nobody is left who could say anything."""
        os.close(self.writer)
        return read_to_end(self.reader).decode().split()


def test_worker_waits_until_the_gate_opens(board: Board, gate: Gate) -> None:
    pipe = Pipe()

    def worker() -> None:
        gate.keep_reader()
        gate.wait(board, lambda: pipe.say("beat"), 3600.0)
        pipe.say(f"passed in phase {Phase(board.header.phase).label}".replace(" ", "_"))

    pid = spawn(worker)
    assert pipe.hear() == "beat"
    board.header.phase = Phase.SERVING
    gate.open()
    assert status_of(pid) == 0
    assert pipe.rest() == ["passed_in_phase_serving"]


def test_open_gate_stands_open_for_all_who_come_later(board: Board, gate: Gate) -> None:
    board.header.phase = Phase.SERVING
    gate.open()
    gate.open()
    pipe = Pipe()

    def worker() -> None:
        gate.keep_reader()
        gate.wait(board, lambda: None, 3600.0)
        gate.leave()
        pipe.say("passed")

    for _ in range(3):
        assert status_of(spawn(worker)) == 0
    assert pipe.rest() == ["passed"] * 3


def test_heart_beats_while_a_worker_waits(board: Board, gate: Gate) -> None:
    board.header.phase = Phase.SERVING
    beats = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 5:
            gate.open()

    gate.wait(board, beat, 0.001)
    assert len(beats) == 5


def test_worker_ends_when_its_master_dies_before_the_gate_opened(board: Board) -> None:
    pipe = Pipe()

    def worker(gate: Gate) -> None:
        gate.keep_reader()
        try:
            gate.wait(board, lambda: pipe.say("waits"), 3600.0)
        except SystemExit as stop:
            pipe.say(f"exit-{stop.code}")
            raise
        pipe.say("passed")

    def master() -> None:
        gate = Gate()
        for _ in range(2):
            spawn(lambda: worker(gate))
        os.read(pipe_to_master[0], 1)
        os._exit(9)

    pipe_to_master = os.pipe()
    pid = spawn(master)
    heard = ""
    while heard.count("waits") < 2:
        heard += pipe.hear()
    os.write(pipe_to_master[1], b".")
    assert status_of(pid) == 9
    assert pipe.rest() == ["exit-0", "exit-0"]
    for fd in pipe_to_master:
        os.close(fd)


def test_worker_that_keeps_only_the_reader_does_not_hold_the_gate_for_others(board: Board) -> None:
    gate = Gate()
    reader = os.dup(gate._reader)
    gate.keep_reader()
    gate.keep_reader()
    assert os.read(reader, 1) == b""
    os.close(reader)
    gate.leave()


def test_gate_is_inherited_by_forks_and_not_by_programs(gate: Gate) -> None:
    assert not os.get_inheritable(gate._reader)
    assert not os.get_inheritable(gate._writer)
