"""What a new generation says until it serves is kept, in order, and not without limit."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

import pytest

from tests.unit.forks import in_child, spawn, status_of
from zdd_web.gunicorn import bootlog
from zdd_web.gunicorn.bootlog import LIMIT_BYTES, TAIL_BYTES, Handler, create, give_back_stderr, tail

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create()
    yield fd
    os.close(fd)


@pytest.fixture
def logger(fd: int) -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.bootlog")
    logger.propagate = False
    handler = Handler(fd)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    handler.close()


def test_new_log_is_empty_and_not_inherited(fd: int) -> None:
    assert tail(fd) == ""
    assert not os.get_inheritable(fd)


def test_log_without_memfd_is_a_file_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    fd = create()
    os.write(fd, b"said\n")
    assert tail(fd) == "said\n"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_tail_is_the_end_in_whole_lines(fd: int) -> None:
    lines = [f"line {number}" for number in range(2_000)]
    os.write(fd, "".join(f"{line}\n" for line in lines).encode())
    found = tail(fd).splitlines()
    assert found == lines[-len(found) :]
    assert TAIL_BYTES - 20 < len(tail(fd)) <= TAIL_BYTES
    assert tail(fd, 1 << 20).splitlines() == lines


def test_tail_of_bytes_that_are_no_text_is_a_text(fd: int) -> None:
    os.write(fd, b"caf\xe9 \xff\n")
    assert tail(fd) == "caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}\n"


def test_tail_of_one_very_long_line_is_its_end(fd: int) -> None:
    os.write(fd, b"x" * TAIL_BYTES + b" and the reason\n")
    assert tail(fd).endswith("and the reason\n")


def test_records_are_copied_with_process_level_and_traceback(fd: int, logger: logging.Logger) -> None:
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logger.exception("worker %s did not boot", 7)
    text = tail(fd)
    assert text.startswith(f"[{os.getpid()}] [ERROR] worker 7 did not boot\nTraceback (most recent call last):\n")
    assert text.endswith("ZeroDivisionError: division by zero\n")


def test_text_that_cannot_be_encoded_is_kept_as_far_as_it_can(fd: int) -> None:
    # Not through a logger: pytest would capture the record, and xdist cannot send it to its controller.
    Handler(fd).write("path caf\udce9")
    assert tail(fd) == "path caf?\n"


def test_record_that_cannot_be_formatted_does_not_raise_into_the_app(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger.error("%d workers", "many")


def test_closed_descriptor_does_not_raise_into_the_app(logger: logging.Logger) -> None:
    gone = create()
    handler = Handler(gone)
    logger.addHandler(handler)
    os.close(gone)
    logger.error("said to nobody")
    logger.removeHandler(handler)


def test_processes_write_one_after_the_other_and_not_over_each_other(fd: int, logger: logging.Logger) -> None:
    def child() -> None:
        for number in range(1_000):
            logger.error("line %s", number)

    logger.error("first")
    children = [spawn(child) for _ in range(3)]
    assert [status_of(pid) for pid in children] == [0, 0, 0]
    logger.error("last")
    lines = tail(fd, LIMIT_BYTES).splitlines()
    expected = [f"[{os.getpid()}] [ERROR] first"]
    expected += [f"[{pid}] [ERROR] line {number}" for pid in children for number in range(1_000)]
    expected += [f"[{os.getpid()}] [ERROR] last"]
    assert (lines[0], lines[-1]) == (expected[0], expected[-1])
    assert sorted(lines) == sorted(expected)


def test_boot_loop_does_not_fill_the_memory(fd: int, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootlog, "LIMIT_BYTES", 1_000)
    for _ in range(100):
        logger.error("x" * 200)
    assert os.fstat(fd).st_size < 1_000 + 300


def test_stderr_is_given_back_with_all_that_was_said_meanwhile(fd: int) -> None:
    reader, writer = os.pipe()

    def child() -> object:
        # As `upgrade._exec` does it: the real stderr is put aside, descriptor 2 is the boot log.
        os.dup2(writer, 2)
        stderr = os.dup(2)
        os.dup2(fd, 2)
        os.write(2, b"a broken configuration file\n")
        give_back_stderr(stderr, fd)
        os.write(2, b"from now on\n")
        print("by print, too", file=sys.__stderr__, flush=True)
        try:
            os.fstat(stderr)
        except OSError:
            return tail(fd)
        return "the copy is still open"

    assert in_child(child) == "a broken configuration file\n"
    os.close(writer)
    with open(reader) as said:
        assert said.read() == "a broken configuration file\nfrom now on\nby print, too\n"


def test_nothing_said_meanwhile_is_nothing_to_repeat(fd: int) -> None:
    reader, writer = os.pipe()

    def child() -> None:
        os.dup2(writer, 2)
        give_back_stderr(os.dup(2), fd)

    in_child(child)
    os.close(writer)
    with open(reader) as said:
        assert said.read() == ""
