"""A boot that makes no progress: its step, and where it stands."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.processes.harness import until
from zdd_web.gunicorn.workers import boot_watch
from zdd_web.gunicorn.workers.boot_watch import BootWatch

#: Python gets no turn while this matches: the engine of `re` keeps the interpreter's lock.
HANGS_IN_C = """
import re
from zdd_web.gunicorn.workers import boot_watch
boot_watch.SLOW_AFTER, boot_watch.SLACK = 0.2, 0.3
boot_watch.BootWatch(print).step("importing the app")
def import_app():
    re.match(r"(x+x+)+y", "x" * 60)
import_app()
"""


@pytest.fixture
def steps() -> list[str]:
    return []


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, steps: list[str]) -> Iterator[BootWatch]:
    monkeypatch.setattr(boot_watch, "SLOW_AFTER", 0.05)
    monkeypatch.setattr(boot_watch, "SLACK", 60)
    watch = BootWatch(steps.append)
    yield watch
    watch.over()


def slow(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "event=boot.slow" in each.getMessage()]


def test_each_step_without_progress_is_logged_once_with_the_stack(
    watch: BootWatch, steps: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    watch.step("importing the app")
    until("the first line", lambda: slow(caplog))
    assert caplog.records[0].levelname == "WARNING"
    assert 'step="importing the app" seconds=0.' in slow(caplog)[0]
    assert "raise it if this step needs as long" in slow(caplog)[0]
    assert "test_each_step_without_progress_is_logged_once_with_the_stack" in slow(caplog)[0]
    assert "thread zdd_web-boot" not in slow(caplog)[0]
    watch.step("warming up (/)")
    until("the second line", lambda: len(slow(caplog)) == 2)
    assert 'step="warming up (/)"' in slow(caplog)[1]
    assert len([line for line in slow(caplog) if "importing" in line]) == 1
    watch.over()
    assert steps == ["importing the app", "warming up (/)", ""]


def test_stack_of_a_check_that_hangs_is_there_too(watch: BootWatch, caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    def ask_the_database() -> None:
        released.wait(30)

    check = threading.Thread(target=ask_the_database, name="zdd_web-check-database")
    check.start()
    watch.step("waiting for its checks (database)")
    until("the line", lambda: slow(caplog))
    released.set()
    check.join()
    assert "thread zdd_web-check-database:" in slow(caplog)[0]
    assert "in ask_the_database" in slow(caplog)[0]


def test_boot_that_hangs_in_c_leaves_its_stack() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGS_IN_C], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as hanging:
        assert hanging.stderr is not None
        stack: list[str] = []
        while not any("in import_app" in line for line in stack):
            line = hanging.stderr.readline()
            assert line, stack
            stack.append(line)
        assert "Timeout" in stack[0]
        hanging.kill()
