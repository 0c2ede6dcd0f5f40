"""A process that has lost its standard streams goes on, and writes into nothing else by mistake."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forks import in_child
from zdd_web.system import boot_log, stdio

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


UNWRITABLE: dict[str, Callable[[], int]] = {
    "a pipe without a reader": closed_pipe,
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "a descriptor that is not for writing": lambda: os.open(os.devnull, os.O_RDONLY),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_stderr_that_cannot_be_written_loses_what_is_written(kind: str) -> None:
    def child() -> str:
        os.dup2(UNWRITABLE[kind](), 2)
        stdio.write_stderr("said to nobody\n")
        return "goes on"

    assert in_child(child) == "goes on"


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_boot_log_that_cannot_be_repeated_on_stderr_does_not_end_a_start(kind: str) -> None:
    def child() -> str:
        memfd, stderr = boot_log.create(), UNWRITABLE[kind]()
        os.dup2(memfd, 2)
        os.write(2, b"Starting gunicorn\n")
        boot_log.give_back_stderr(stderr, memfd)
        return boot_log.tail(memfd)

    assert in_child(child) == "Starting gunicorn\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_closed_descriptors_are_filled_before_anything_else_takes_their_numbers(closed: tuple[int, ...]) -> None:
    def child() -> tuple[list[str], bool, int]:
        for fd in closed:
            os.close(fd)
        stdio.fill_closed_descriptors()
        where = [os.readlink(f"/proc/self/fd/{fd}") for fd in closed]
        return where, all(os.get_inheritable(fd) for fd in closed), os.open(os.devnull, os.O_RDONLY)

    where, inheritable, following = in_child(child)
    assert (where, inheritable) == (["/dev/null"] * len(closed), True)
    assert following > 2


def test_streams_that_are_open_are_left_alone(tmp_path: Path) -> None:
    def child() -> list[str]:
        fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        stdio.fill_closed_descriptors()
        return [os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)]

    assert in_child(child) == [str(tmp_path / "log")] * 2


def test_copy_of_a_closed_stderr_is_the_null_device() -> None:
    def child() -> str:
        os.close(2)
        return os.readlink(f"/proc/self/fd/{stdio.duplicate_stderr()}")

    assert in_child(child) == "/dev/null"


SETTLES = """
import os, sys
from zdd_web.system import stdio
print("kept in the buffer")
if "settle" in sys.argv:
    stdio.flush_streams()
"""


@pytest.mark.parametrize(("argument", "status"), [("", 120), ("settle", 0)])
def test_buffer_that_cannot_be_written_does_not_change_the_exit_status(argument: str, status: int) -> None:
    fd, environ = closed_pipe(), {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", SETTLES, argument], stdout=fd, stderr=fd, env=environ, timeout=60, check=False
    )
    os.close(fd)
    assert done.returncode == status


class Odd(io.StringIO):
    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, Odd(), object()], ids=["none", "closed", "not a stream"])
def test_forgiving_stream_takes_whatever_stands_in_a_streams_place(stream: Any) -> None:
    forgiving = stdio.TolerantStream(stream)
    assert forgiving.write("text") == 4
    forgiving.writelines(["a", "b"])
    forgiving.flush()
    assert forgiving.lost is None


def test_forgiving_stream_keeps_its_first_error() -> None:
    with open("/dev/full", "w") as file:
        forgiving = stdio.TolerantStream(file)
        forgiving.write("text")
        forgiving.flush()
        forgiving.flush()
        assert forgiving.lost is not None
        assert forgiving.lost.strerror == "No space left on device"
