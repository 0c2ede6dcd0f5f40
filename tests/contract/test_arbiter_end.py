"""gunicorn.arbiter: how it stops."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from tests.contract.stock import Arbiter, Calls, a_worker, an_arbiter, in_order, module


def stopping(monkeypatch: pytest.MonkeyPatch, calls: Calls, **settings: Any) -> tuple[Any, list[bool]]:
    """Return an arbiter with a worker, and what it says of unlinking; time passes when it sleeps."""
    arbiter, unlinks, now = an_arbiter(**settings), [], [1000.0]

    def sleep(seconds: float) -> None:
        calls.append("sleep")
        now[0] += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(module.sock, "close_sockets", lambda listeners, unlink=True: unlinks.append(bool(unlink)))
    arbiter.kill_workers = lambda sig: calls.append(signal.Signals(sig).name)
    arbiter.reap_workers = calls.noting("reap")
    arbiter.WORKERS = {11: a_worker()}
    return arbiter, unlinks


@pytest.mark.parametrize(("predecessor", "successor", "unlinks"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_stop_unlinks_sockets_without_predecessor_and_successor(
    monkeypatch: pytest.MonkeyPatch, predecessor: int, successor: int, unlinks: bool
) -> None:
    arbiter, said = stopping(monkeypatch, Calls(), graceful_timeout=1)
    arbiter.master_pid, arbiter.reexec_pid = predecessor, successor
    arbiter.stop()
    assert said == [unlinks]


def test_stop_unlinks_no_socket_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    arbiter, said = stopping(monkeypatch, Calls(), graceful_timeout=1)
    arbiter.systemd = True
    arbiter.stop()
    assert said == [False]


def test_stop_closes_listeners_before_it_signals_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    arbiter, _ = stopping(monkeypatch, calls, graceful_timeout=1)
    monkeypatch.setattr(module.sock, "close_sockets", calls.noting("close_sockets"))
    arbiter.stop()
    assert calls[:2] == ["close_sockets", "SIGTERM"]


def test_stop_kills_after_the_graceful_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    arbiter, _ = stopping(monkeypatch, calls, graceful_timeout=2)
    arbiter.stop()
    assert [call for call in calls if call.startswith("SIG")] == ["SIGTERM", "SIGKILL"]
    assert 19 <= calls.count("sleep") <= 21


def test_stop_sleeps_once_more_when_all_are_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    arbiter, _ = stopping(monkeypatch, calls, graceful_timeout=30)
    arbiter.reap_workers = arbiter.WORKERS.clear
    arbiter.kill_workers = calls.noting("kill")
    if not hasattr(Arbiter, "wait_for_signals"):
        # 23 reaps in a signal handler, in the middle of the sleep that follows.
        sleep = module.time.sleep
        module.time.sleep = lambda seconds: (arbiter.WORKERS.clear(), sleep(seconds))
    arbiter.stop()
    assert calls == ["kill", "sleep", "kill"]


def test_halt_ends_in_this_order() -> None:
    calls, arbiter = Calls(), an_arbiter(on_exit=lambda server: None)
    arbiter.cfg.set("on_exit", lambda server: calls.append("on_exit"))
    arbiter._stop_control_server = calls.noting("control")
    arbiter.stop = calls.noting("stop")
    arbiter.pidfile = SimpleNamespace(unlink=calls.noting("pid file"))
    with pytest.raises(SystemExit) as end:
        arbiter.halt(exit_status=7)
    assert end.value.code == 7
    assert [call for call in calls if call != "control"] == ["stop", "pid file", "on_exit"]
    if hasattr(Arbiter, "_stop_control_server"):
        assert calls[0] == "control"


def test_loop_waits_in_one_place() -> None:
    if hasattr(Arbiter, "wait_for_signals"):
        assert in_order(Arbiter.run, "self.wait_for_signals(timeout=1.0)")
        assert hasattr(an_arbiter().SIG_QUEUE, "get_nowait")
        assert in_order(Arbiter.wait_for_signals, "self.SIG_QUEUE.get(block=True, timeout=timeout)", "get_nowait()")
    else:
        assert in_order(Arbiter.run, "self.SIG_QUEUE.pop(0)", "self.sleep()")
        assert in_order(Arbiter.sleep, "select.select([self.PIPE[0]], [], [], 1.0)", "os.read(self.PIPE[0], 1)")
