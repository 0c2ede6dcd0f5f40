"""A reload that cannot be tried is refused with its reason, and leaves nothing behind."""

from __future__ import annotations

import errno
import logging
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.forks import status_of
from tests.helpers.generations import a_generation
from zdd_web.board import Board
from zdd_web.gunicorn.master import reload as module
from zdd_web.gunicorn.master.reload import Proof, Reload
from zdd_web.settings import Settings
from zdd_web.system import proc
from zdd_web.system.captured_output import KEPT_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def a_reload(*, has_room: bool = True) -> tuple[Reload, list[str]]:
    """Return one, and the reasons of the refusals that systemd was sent."""
    refused: list[str] = []
    notifier: Any = SimpleNamespace(refused=lambda what, reason: refused.append(reason))
    server: Any = SimpleNamespace(cfg=SimpleNamespace(preload_app=False))
    listening: Any = SimpleNamespace(unreachable_paths=list)
    generation = a_generation(Board.private(), upgrade_timeout=60)
    generation.header.slot_count = 4
    reload = Reload(
        server,
        generation,
        listening,
        notifier,
        forwards=lambda sig: False,
        obstacle=lambda: "",
        has_room=lambda: has_room,
        done=lambda: None,
        note=lambda outcome, seconds, reason: None,
        release=lambda: "7",
    )
    return reload, refused


@pytest.mark.parametrize("what", ["pipe", "fork"])
@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EMFILE, "nofile"), (errno.ENFILE, "fs.file-max"), (errno.EAGAIN, "pids.max")]
)
def test_reload_that_cannot_be_tried_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, number: int, remedy: str
) -> None:
    def fails() -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, what, fails)
    reload, refused = a_reload()
    with caplog.at_level(logging.INFO, "zdd_web"):
        reload.request()
    assert not reload.under_way
    assert "event=refused signal=HUP" in caplog.text
    assert remedy in caplog.text
    assert "reload.started" not in caplog.text
    assert len(refused) == 1


def test_reload_without_a_slot_for_one_more_worker_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    reload, _ = a_reload(has_room=False)
    reload.request()
    assert not reload.under_way
    assert "all 4 slots of the board are taken" in caplog.text
    assert "use an upgrade (SIGUSR2" in caplog.text


def begin(monkeypatch: pytest.MonkeyPatch, script: Any, timeout: float = 60) -> Proof:
    monkeypatch.setattr(module, "_try", lambda server, settings, slots, output: script(output))
    return Proof.begin(None, Settings(upgrade_timeout=timeout), 4)


def hang(output: int) -> None:
    while True:
        signal.pause()


def test_child_is_tracked_although_no_descriptor_is_left_to_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(proc, "start_time", exhausted)
    proof = begin(monkeypatch, hang)
    assert proof.poll() is None
    proof.end()
    proof.reaped(os.waitpid(proof.pid, 0)[1])
    assert proof.poll() == f"the child that tried it ended with status {int(signal.SIGKILL)}"
    proof.end()
    proof.close()


def test_what_a_child_prints_without_end_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(output: int) -> None:
        for _ in range(500):
            os.write(output, b"trying again\n" * 5000)
        os.write(output, b"RuntimeError: gave up\n")
        os._exit(1)

    proof = begin(monkeypatch, chatty)
    while (ended := os.waitpid(proof.pid, os.WNOHANG)) == (0, 0):
        assert proof.poll() is None
    proof.reaped(ended[1])
    assert proof.poll() == "RuntimeError: gave up"
    printed = proof.close()
    assert printed.endswith("trying again\nRuntimeError: gave up\n")
    assert len(printed) < KEPT_BYTES


def test_child_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = begin(monkeypatch, hang, timeout=1)
    while (reason := proof.poll()) is None:
        os.sched_yield()
    assert reason == "config and app did not load within UPGRADE_TIMEOUT = 1 s"
    assert status_of(proof.pid) == -signal.SIGKILL
    proof.close()
