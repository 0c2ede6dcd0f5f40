"""The next program inherits what it is given, and what the first one was started with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.forks import in_child
from zdd_web.system import descriptors

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SHOW = "import os; print([fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{fd}')])"


def test_only_what_is_given_or_passed_on_is_inherited() -> None:
    def child() -> object:
        null = os.open(os.devnull, os.O_RDONLY)
        fds = given, passed, closed, leaked, private = (40, 41, 42, 43, 44)
        for fd in fds:
            os.dup2(null, fd, inheritable=fd in (passed, closed, leaked))
        before = descriptors.inheritable()
        os.close(closed)
        descriptors.inherit_only([given], [passed, closed, private])
        shown = subprocess.run(
            [sys.executable, "-c", SHOW], close_fds=False, capture_output=True, text=True, check=True
        )
        return [[fd in before for fd in fds], [f"{fd}" in shown.stdout for fd in fds]]

    assert in_child(child) == [[False, True, True, True, False], [True, True, False, False, False]]


def test_standard_streams_are_left_as_they_are() -> None:
    def child() -> object:
        descriptors.inherit_only([], [])
        return [[os.get_inheritable(fd) for fd in (0, 1, 2)], descriptors.inheritable()]

    assert in_child(child) == [[True, True, True], []]


def test_descriptors_are_found_when_no_other_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(path: str) -> list[str]:
        raise OSError(24, "Too many open files")

    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", exhausted)
            found = descriptors.inheritable()
        assert writer in found
        assert reader not in found
    finally:
        os.close(reader)
        os.close(writer)


def test_given_descriptor_that_is_not_open_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        descriptors.inherit_only([9999], descriptors.inheritable())
