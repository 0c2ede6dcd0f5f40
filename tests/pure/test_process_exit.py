"""Which threads the end of a process would wait for, and for how long it does."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from zdd_web import log
from zdd_web.gunicorn import process_exit
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.system import clock

PATIENCE = 30


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def names(**options: bool) -> list[str]:
    """Return the threads of the test, whatever other tests have left behind."""
    return sorted(t.name for t in process_exit.waited_for(**options) if t.name.startswith("here"))  # type: ignore[arg-type]


def test_a_thread_counts_unless_it_is_a_daemon_or_not_the_apps(released: threading.Event) -> None:
    threads = [
        threading.Thread(target=released.wait, args=(PATIENCE,), name=f"here-{daemon}", daemon=daemon)
        for daemon in (True, False)
    ]
    for thread in threads:
        thread.start()
    assert names() == ["here-False"]
    assert names(pools_only=True) == []
    assert [t for t in process_exit.waited_for(but=threads) if t.name.startswith("here")] == []
    released.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert names() == []


def test_a_pool_counts_while_it_has_a_call_in_hand_or_queued(released: threading.Event) -> None:
    begun = threading.Event()

    def call() -> None:
        begun.set()
        released.wait(PATIENCE)

    with ThreadPoolExecutor(1, "here") as pool:
        running = pool.submit(call)
        assert begun.wait(PATIENCE)
        assert names() == names(pools_only=True) == ["here_0"]
        queued = pool.submit(len, "x")
        assert names() == ["here_0"]
        released.set()
        running.result(PATIENCE)
        queued.result(PATIENCE)
        # The result is there a moment before the thread has come back for the next call.
        assert process_exit.wait(lambda: [t for t in process_exit.waited_for() if t.name == "here_0"],
                                 lambda: clock.after_ns(PATIENCE), lambda: None) == []  # fmt: skip


def test_the_wait_beats_and_returns_what_is_left_at_the_deadline() -> None:
    thread = threading.Thread(name="left")
    beats: list[int] = []
    deadlines = iter([clock.NEVER, clock.NEVER, clock.after_ns(60), 1])
    assert process_exit.wait(lambda: [thread], deadlines.__next__, lambda: beats.append(1)) == [thread]
    assert len(beats) == 3


def test_many_threads_are_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_sink", logging.getLogger("zdd_web"))
    process_exit.name([threading.Thread(name=f"left-{number}") for number in range(1_000)])
    lines = [vars(record) for record in caplog.records]
    assert len(lines) == process_exit.NAMED_AT_MOST + 1
    assert lines[0]["zdd_thread"] == "left-0" and lines[-1]["zdd_more"] == 1_000 - process_exit.NAMED_AT_MOST


def test_the_status_of_an_exit_under_way_survives_what_a_hook_raises() -> None:
    found: list[int] = []

    def hook() -> None:
        try:
            raise ValueError("a hook")
        finally:
            found.append(process_exit.status_under_way())

    for code in (None, 0, 3, -1, "text"):
        with pytest.raises(ValueError, match="a hook"):
            try:
                sys.exit(code)
            finally:
                hook()
    assert found == [0, 0, 3, 255, 1]
    assert process_exit.status_under_way(default=7) == 7


def test_the_last_heartbeat_needs_no_open_file_of_gunicorns(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    dup = os.dup
    with tempfile.TemporaryFile() as file:
        os.utime(file.fileno(), (0, 0))
        monkeypatch.setattr(os, "dup", lambda fd: (copies.append(dup(fd)), copies[-1])[1])
        beat = WorkerFacade(SimpleNamespace(tmp=file)).lasting_heartbeat()
    beat()
    assert os.fstat(copies[0]).st_mtime > 0
    os.close(copies[0])
