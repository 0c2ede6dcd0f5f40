"""The history: the last of what was done, bounded, and believed only as far as it can be true."""

from __future__ import annotations

import json
import os

import pytest

from zdd_web import history
from zdd_web.history import Entry, appended, decode, encode
from zdd_web.system import shared_text
from zdd_web.system.shared_text import Document

DEPLOY = Entry(at=1.0, kind="deploy", outcome="done", generation=2, release="7", seconds=3.5)
REFUSED = DEPLOY._replace(outcome="refused", reason="an upgrade is under way")


def test_only_the_last_ones_are_kept():
    entries: tuple[Entry, ...] = ()
    for number in range(2 * history.MOST):
        entries = appended(entries, DEPLOY._replace(generation=number))
    assert [each.generation for each in entries] == list(range(history.MOST, 2 * history.MOST))


def test_what_is_refused_again_and_again_pushes_nothing_out():
    entries = appended((), DEPLOY)
    for second in range(1000):
        entries = appended(entries, REFUSED._replace(at=float(second), seconds=second / 1e6))
    assert entries == (DEPLOY, REFUSED._replace(at=999.0, seconds=999 / 1e6, times=1000))
    other = REFUSED._replace(reason="another")
    assert appended(entries, other)[-1] == other
    # What was done twice was done twice.
    assert len(appended(appended((), DEPLOY), DEPLOY)) == 2


def test_texts_are_bounded_and_all_of_them_fit():
    worst = Entry(1.0, "deploy", "failed", 1 << 62, *["\U0001f600" * 10_000] * 3, 1.0, *["\U0001f600" * 10_000] * 2)
    entries: tuple[Entry, ...] = ()
    for number in range(history.MOST):
        entries = appended(entries, worst._replace(generation=number))
    assert len(entries) == history.MOST
    assert len(encode(entries)) <= history.SIZE
    assert decode(encode(entries)) == entries


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"at": 1.0, "kind": "deploy", "outcome": "done"}, True),
        ({"at": 1, "kind": "deploy", "outcome": "done", "of_a_later_version": [1]}, True),
        ({"at": "1", "kind": "deploy", "outcome": "done"}, False),
        ({"at": 1.0, "kind": ["deploy"], "outcome": "done"}, False),
        ({"kind": "deploy", "outcome": "done"}, False),
        ([], False),
    ],
)
def test_what_is_not_an_entry_is_left_out(fields, kept):
    assert len(decode(json.dumps({"entries": [fields]}).encode())) == kept


def test_what_was_never_written_is_empty_and_garbage_raises():
    assert decode(b"") == ()
    for garbage in (b"{}", b"[]", b"1", b"{", b'{"entries": 1}'):
        with pytest.raises(ValueError):
            decode(garbage)


def test_later_text_is_read_whole_and_no_reader_can_write():
    shared = Document("zdd_web-test", 10_000)
    try:
        for text in (b"x" * 9_000, b"short", b""):
            shared.write(text)
            assert shared_text.read(shared.fd) == text
        with pytest.raises(ValueError, match="and there is room for"):
            shared.write(bytes(shared.size + 1))
        with pytest.raises(PermissionError):
            os.pwrite(shared.fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, 0)
    finally:
        shared.close()


def test_child_that_has_closed_it_has_no_way_to_write():
    shared = Document("zdd_web-test", 100)
    shared.write(b"the master's")
    fd = os.dup(shared.fd)
    shared.close()
    shared.write(b"too late")
    assert shared_text.read(fd) == b"the master's"
    os.close(fd)


@pytest.mark.parametrize("size", [0, 10, 4096])
def test_what_is_not_such_a_memory_raises(size: int):
    fd = os.memfd_create("other")
    os.write(fd, b"\xff" * size)
    with pytest.raises(ValueError):
        shared_text.read(fd)
    os.close(fd)
