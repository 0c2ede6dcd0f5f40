"""Time in which the watching process itself was paused."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from tests.helpers.forks import status_of
from zdd_web.gunicorn.adapter.arbiter import discount_pauses
from zdd_web.system import pauses
from zdd_web.system.pauses import DUE_WITHIN, HEARTBEAT, Pauses

SECOND = 10**9


def paused(*turns: float) -> Pauses:
    loop = Pauses()
    for turn in turns:
        loop.turn(int(turn * SECOND))
    return loop


@pytest.mark.parametrize(
    ("turns", "instant", "now", "seconds"),
    [
        # Without a loop, and with one that comes round, time is time.
        ([], 0, 90, 90),
        ([0, 1, 2, 3], 0, 3, 3),
        ([0, 1, 2, 3], 2, 3, 1),
        # A pause that the loop has noted, one that it has not yet, and a heartbeat's time after it.
        ([0, 61], 0, 61, DUE_WITHIN),
        ([0], 0, 61, DUE_WITHIN),
        ([0, 61, 62], 0, 62, DUE_WITHIN),
        ([0, 61, 62, 63], 0, 63, DUE_WITHIN + 1),
        # What came before the pause counts, and what began in it or after it does too.
        ([9, 69], 0, 69, 9 + DUE_WITHIN),
        ([0, 61, 62, 63], 61.9, 62.9, 1 - (61 + HEARTBEAT - 61.9)),
        ([0, 61, 62, 63, 64], 63, 64, 1),
        # Two pauses.
        ([0, 10, 20], 0, 20, DUE_WITHIN + (DUE_WITHIN - HEARTBEAT)),
        # gunicorn's heartbeat file of a worker that has sent none has the wall clock's time.
        ([0, 61], 1_700_000_000, 61, 61 - 1_700_000_000),
    ],
)
def test_pauses_are_not_counted(turns: list[float], instant: float, now: float, seconds: float) -> None:
    since = paused(*turns).since(int(instant * SECOND), int(now * SECOND))
    assert since == pytest.approx(seconds)


def test_loop_that_is_always_late_sees_a_silent_process_all_the_same() -> None:
    # Each round takes four seconds, of which one and a half count: less one for the heartbeat after each pause.
    loop = paused(*range(0, 201, 4))
    assert loop.since(0, 200 * SECOND) > 20


def test_fork_begins_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = paused(0, time.monotonic() - 1)
    monkeypatch.setattr(pauses, "_own", loop)
    assert pauses.since(0) < 5
    pid = os.fork()
    if pid == 0:
        os._exit(0 if pauses.since(0) > 5 or time.monotonic() < 10 else 1)
    assert status_of(pid) == 0


def test_gunicorn_is_told_a_heartbeat_without_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    last = {"update": now - 60}
    worker = SimpleNamespace(tmp=SimpleNamespace(last_update=lambda: last["update"]))
    discount_pauses(worker)
    assert time.monotonic() - worker.tmp.last_update() > 59
    monkeypatch.setattr(pauses, "_own", paused(now - 60, now))
    assert time.monotonic() - worker.tmp.last_update() < 10
    last["update"] = now - 90
    assert 30 < time.monotonic() - worker.tmp.last_update() < 40

    def gone() -> float:
        raise ValueError("closed")

    worker.tmp.last_update = gone
    discount_pauses(worker)
    with pytest.raises(ValueError, match="closed"):
        worker.tmp.last_update()
