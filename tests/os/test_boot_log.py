"""What a new generation says until it serves is kept, in order, and not without limit."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest

from tests.helpers.forks import in_child, spawn, status_of
from zdd_web.system import boot_log as boot_log_module
from zdd_web.system.boot_log import (
    LIMIT_BYTES,
    RECORD_BYTES,
    TAIL_BYTES,
    BootLog,
    Handler,
    StderrRelay,
    create,
    give_back_stderr,
    tail,
)
from zdd_web.system.captured_output import KEPT_BYTES, PIPE_BYTES

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


def test_boot_loop_does_not_fill_the_memory_and_its_last_reason_is_kept(
    fd: int, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot_log_module, "LIMIT_BYTES", 1_000)
    for number in range(100):
        logger.error("%s %s", "x" * 200, number)
        assert os.fstat(fd).st_size < 1_000 + 300
        assert tail(fd).endswith(f"x {number}\n")


def test_of_a_record_without_measure_the_end_is_kept(fd: int) -> None:
    Handler(fd).write("x" * (20 << 20) + " and the reason")
    assert os.fstat(fd).st_size == RECORD_BYTES
    assert tail(fd).endswith("xxx and the reason\n")


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


# -- the predecessor's side


@pytest.fixture
def boot_log() -> Iterator[BootLog]:
    boot_log = BootLog()
    yield boot_log
    boot_log.close()


def stderr_of(function: Callable[[], None]) -> str:
    """Return what a child that runs `function` has written to its stderr."""
    with tempfile.TemporaryFile() as file:

        def child() -> None:
            os.dup2(file.fileno(), 2)
            function()

        in_child(child)
        file.seek(0)
        return file.read().decode()


def test_failed_release_is_published_in_the_order_in_which_it_printed_and_logged(boot_log: BootLog) -> None:
    os.write(boot_log.output.writer, b"printed by the configuration file\n")
    boot_log.drain()
    Handler(boot_log.fd).write("logged by a worker")
    assert tail(boot_log.fd) == "logged by a worker\n"
    boot_log.publish()
    assert tail(boot_log.fd) == boot_log.text() == "printed by the configuration file\nlogged by a worker\n"
    assert boot_log.last_line() == "logged by a worker"
    boot_log.publish()
    assert tail(boot_log.fd) == "printed by the configuration file\nlogged by a worker\n"


def test_what_was_printed_without_end_is_published_within_bounds(boot_log: BootLog) -> None:
    for number in range(100):
        os.write(boot_log.output.writer, b"%05d " % number + b"x" * (PIPE_BYTES // 20))
        boot_log.drain()
    os.write(boot_log.output.writer, b"\nImportError: no module named shop\n")
    assert boot_log.last_line() == "ImportError: no module named shop"
    boot_log.publish()
    assert os.fstat(boot_log.fd).st_size < KEPT_BYTES + 100
    assert tail(boot_log.fd).endswith("\nImportError: no module named shop\n")


def test_stderr_has_all_once_the_successor_speaks_and_what_its_children_print_later(boot_log: BootLog) -> None:
    def child() -> None:
        os.write(boot_log.output.writer, b"before\n")
        boot_log.drain()
        os.write(boot_log.output.writer, b"between\n")
        boot_log.speaks()
        boot_log.speaks()
        os.write(boot_log.output.writer, b"after\n")
        boot_log.drain()
        assert boot_log.text() == "before\nbetween\n"

    assert stderr_of(child) == "before\nbetween\nafter\n"


def test_successor_of_a_takeover_has_the_memfd_alone(boot_log: BootLog) -> None:
    boot_log.output.close()
    boot_log.drain()
    boot_log.speaks()
    boot_log.drain()
    Handler(boot_log.fd).write("logged by a worker")
    boot_log.publish()
    assert boot_log.text() == tail(boot_log.fd) == "logged by a worker\n"


# -- pipes that are some process's stderr for life


def test_relay_writes_what_comes_until_no_writer_is_left() -> None:
    def child() -> None:
        first, second = BootLog().output, BootLog().output
        relay = StderrRelay([first.reader, second.reader])
        relay.follow()
        assert not relay.busy
        os.write(first.writer, b"first\n")
        os.write(second.writer, b"second\n")
        first.close_writer()
        relay.follow()
        assert relay.busy
        assert relay.pipes == [second.reader]
        relay.follow()
        assert not relay.busy
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(first.reader)
        relay.after_fork()
        assert relay.pipes == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(second.reader)

    assert stderr_of(child) == "first\nsecond\n"


def test_relay_is_not_held_by_a_writer_without_end() -> None:
    boot_log = BootLog()
    output = boot_log.output

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        relay = StderrRelay([output.reader])
        for _ in range(3):
            select.select([output.reader], [], [])
            relay.follow()
            assert relay.busy

    def flood() -> None:
        while True:
            os.write(output.writer, b"x" * 65_536)

    pid = spawn(flood)
    try:
        in_child(child)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
        boot_log.close()
