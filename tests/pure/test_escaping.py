"""Text from outside begins no line of its own, steers no terminal, and can be read back."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.system.escaping import indented, printable, quoted, traceback_lines

#: Text as an attacker would send it, beside any other.
HOSTILE = st.text(alphabet=st.sampled_from("\n\r\t\x0b\x0c\x1c\x1e\x00\x1b\x7f\x85\x9b\u2028\u2029\u202e\\\"'[]= aé"))
TEXT = st.one_of(st.text(), HOSTILE)


def breaks_or_steers(text: str) -> list[str]:
    return [each for each in text if unicodedata.category(each) in ("Cc", "Zl", "Zp", "Cs")]


@given(TEXT)
def test_quoted_text_is_one_line_without_control_characters_and_can_be_read_back(text: str) -> None:
    line = quoted(text)
    assert breaks_or_steers(line) == []
    assert len(line.splitlines()) == 1
    assert json.loads(line) == text


@given(TEXT)
def test_printable_text_has_no_control_characters_but_those_that_are_kept(text: str) -> None:
    assert breaks_or_steers(printable(text, keep="")) == []
    assert set(breaks_or_steers(printable(text))) <= {"\n", "\t"}


@given(TEXT)
def test_text_that_is_printable_stays_as_it_is(text: str) -> None:
    once = printable(text)
    assert printable(once) == once


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcödé \N{SNOWMAN}", "plain, ünïcödé \N{SNOWMAN}"),
        ("two\nlines", r"two\nlines"),
        ("\r\t\0", r"\r\t\x00"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x7f\x85\x9b31m", r"\x7f\x85\x9b31m"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_escapes_are_those_of_python(text: str, shown: str) -> None:
    assert printable(text, keep="") == shown


@given(TEXT)
def test_no_line_of_indented_text_begins_at_the_margin(text: str) -> None:
    for line in indented(text).splitlines():
        assert not line or line[0] in " \t", line


def test_lines_that_are_indented_stay_where_they_are() -> None:
    stack = '  File "shop.py", line 3, in job\n    work()\n'
    assert indented(stack) == stack.rstrip("\n")


@given(st.lists(TEXT), TEXT)
def test_only_the_named_line_of_a_traceback_begins_at_the_margin(notes: list[str], message: str) -> None:
    heading = "Traceback (most recent call last):"
    chunks = [f"{heading}\n", f"shop.Broken: {message}\n", *(f"{note}\n" for note in notes)]
    first, *lines = traceback_lines(chunks, {"shop.Broken"}).splitlines()
    assert first.strip() == heading
    assert [line for line in lines if line and line[0] not in " \t" and not line.startswith("shop.Broken:")] == []
