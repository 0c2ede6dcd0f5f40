"""What another process prints is kept in bounded memory, and never makes that process fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from zdd_web.system.captured_output import DRAIN_BYTES, KEPT_BYTES, PIPE_BYTES, CapturedOutput, last_line

#: Prints 20 MB, which no pipe holds, then the reason, and says how it fared by its exit status.
CHATTY = """
import os, sys
line = b"could not connect to the database, trying again\\n" * 4096
for _ in range(100):
    assert os.write(2, line) == len(line)
print("gave up", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def output() -> Iterator[CapturedOutput]:
    output = CapturedOutput()
    yield output
    output.close()


def test_nothing_is_printed_yet(output: CapturedOutput) -> None:
    assert output.drain() == 0
    assert output.text() == ""
    assert not os.get_inheritable(output.reader)
    assert not os.get_inheritable(output.writer)


def test_all_of_a_little_is_kept_as_it_came(output: CapturedOutput) -> None:
    os.write(output.writer, b"caf\xe9\nno end of line")
    assert output.drain() == 19
    assert output.text() == "caf\N{REPLACEMENT CHARACTER}\nno end of line"


def test_process_that_prints_without_end_waits_and_the_end_is_kept(output: CapturedOutput) -> None:
    with subprocess.Popen([sys.executable, "-c", CHATTY], stderr=output.writer) as child:
        output.close_writer()
        most = 0
        while child.poll() is None:
            most = max(most, output.drain())
            assert len(output.text()) < KEPT_BYTES + 100
    output.drain_all()
    # It was never told that it cannot write.
    assert child.returncode == 7, output.text()
    assert most <= DRAIN_BYTES + KEPT_BYTES
    first, *lines = output.text().splitlines()
    assert first.startswith("[zdd_web: ") and first.endswith(" bytes before this are not shown]")
    assert lines[-1] == last_line(output.text()) == "gave up"
    assert set(lines[:-1]) == {"could not connect to the database, trying again"}
    assert KEPT_BYTES - 100 < len("\n".join(lines)) <= KEPT_BYTES


def test_what_was_dropped_is_counted_to_the_byte(output: CapturedOutput) -> None:
    line = b"x" * 99 + b"\n"
    for _ in range(1000):
        os.write(output.writer, line)
    output.drain_all()
    first, *lines = output.text().splitlines(keepends=True)
    assert first == f"[zdd_web: {100_000 - len(''.join(lines))} bytes before this are not shown]\n"
    assert set(lines) == {line.decode()}


def test_less_than_is_kept_can_be_had_in_whole_lines(output: CapturedOutput) -> None:
    os.write(output.writer, b"first\nsecond\nthird\n")
    output.drain()
    assert output.text(14) == "[zdd_web: 6 bytes before this are not shown]\nsecond\nthird\n"
    assert output.text(13) == output.text(8) == "[zdd_web: 13 bytes before this are not shown]\nthird\n"


def test_one_line_without_end_is_its_end(output: CapturedOutput) -> None:
    for _ in range(10):
        os.write(output.writer, b"x" * KEPT_BYTES)
    os.write(output.writer, b" and the reason")
    output.drain_all()
    assert output.text().endswith("xxx and the reason")


def test_writer_that_the_reader_cannot_keep_up_with_does_not_hold_it(output: CapturedOutput) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: print('x' * 9999)"], stdout=output.writer) as child:
        output.close_writer()
        while output.drain() < DRAIN_BYTES:
            pass
        output.drain_all()
        child.kill()
    assert len(output.text()) < KEPT_BYTES + 100


def test_pipe_holds_what_is_printed_while_its_reader_does_not_run(output: CapturedOutput) -> None:
    os.set_blocking(output.writer, False)
    size = 0
    while size < PIPE_BYTES:
        try:
            size += os.write(output.writer, b"x" * 4096)
        except BlockingIOError:
            break
    assert size >= KEPT_BYTES
    output.drain_all()
    assert len(output.text()) >= KEPT_BYTES


def test_end_of_the_pipe_is_not_waited_for_and_closing_twice_is_nothing(output: CapturedOutput) -> None:
    os.write(output.writer, b"said\n")
    output.close_writer()
    output.drain_all()
    output.drain_all()
    output.close()
    output.close()
    output.drain_all()
    assert output.text() == "said\n"
