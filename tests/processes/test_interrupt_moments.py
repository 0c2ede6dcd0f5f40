"""Ctrl-C and SIGTERM at more moments of an upgrade and of a stop, each held by a condition; see test_interrupts.py."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.harness import Held, Service, until
from tests.processes.test_interrupts import (
    CANCELLED_BOOTING,
    CANCELLED_IN_WINDOW,
    GO_ON,
    Command,
    hold_boot,
    let_go,
    serves,
    until_state,
)
from zdd_web.board import Snapshot, UpgradeState, WorkerState
from zdd_web.cli.upgrade import LEFT
from zdd_web.lifecycle import Phase
from zdd_web.system import proc

CANCELLING = "cancelling: waiting for what becomes of it"
GOES_ON = "a stop cannot be cancelled: it goes on"
NOTHING_LOST = "nothing was cut off"


@pytest.fixture
def service(make_service) -> Iterator[Service]:
    service = make_service("gthread", upgrade_timeout=60, grace_period=60)
    yield service
    if service.processes():
        service.stop(None)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(f"the stop of process {pid}", lambda: proc.state(pid) == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def pending(pid: int, sig: signal.Signals) -> bool:
    """Tell whether a signal waits for a process that stands still."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) >> (sig - 1) & 1 for mask in re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", status))


def until_pending(service: Service, pid: int, sig: signal.Signals) -> None:
    until(f"{sig.name} waits for process {pid}", lambda: pending(pid, sig), service)


def newest(service: Service) -> Snapshot | None:
    found = service.generations()
    return found[-1].snapshot() if len(found) > 1 else None


def until_new_workers(service: Service, *states: WorkerState) -> None:
    """Wait until the workers of the new generation are in these states, in any order."""

    def are() -> bool:
        snapshot = newest(service)
        return snapshot is not None and sorted(worker.state for worker in snapshot.workers) == sorted(states)

    until(f"workers {[state.label for state in states]}", are, service)


# -- an upgrade


def test_upgrade_in_the_warm_up(service: Service):
    let_go(service)
    service.configure(warmup=["/hold?go"]).start()
    (service.directory / "go").unlink()
    service.deploy("2")
    command = Command(service, "upgrade")
    command.says("worker 0 of 2 is ready; waiting for: warming up (/hold?go)")
    command.interrupt(signal.SIGTERM)
    said = command.ends(1)
    assert CANCELLING in said
    assert re.search(CANCELLED_BOOTING, said.splitlines()[-1])
    serves(service, 1)


def test_upgrade_with_one_worker_at_the_gate_and_one_in_its_import(service: Service):
    service.start()
    first = "import fcntl; LOCK = open('first', 'w')"
    only_one = f"{first}\ntry: fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError:\n    {GO_ON}"
    service.deploy("2", at_import=only_one)
    command = Command(service, "upgrade")
    until_new_workers(service, WorkerState.READY, WorkerState.BOOTING)
    command.interrupt()
    assert re.search(CANCELLED_BOOTING, command.ends(1).splitlines()[-1])
    serves(service, 1)


def test_upgrade_with_all_workers_at_the_gate(service: Service):
    service.start()
    hold_boot(service)
    command = Command(service, "upgrade")
    until_new_workers(service, WorkerState.BOOTING, WorkerState.BOOTING)
    with stopped(service.pid):
        # The one that could let them pass.
        let_go(service)
        until_new_workers(service, WorkerState.READY, WorkerState.READY)
        command.interrupt()
        command.says(CANCELLING)
    assert re.search(CANCELLED_BOOTING, command.ends(1).splitlines()[-1])
    serves(service, 1)
    assert service.matches(r"generation=2 event=phase\.serving") == []


def test_upgrade_whose_signal_the_master_has_not_taken(service: Service):
    service.start()
    service.deploy("2")
    master = service.pid
    with stopped(master):
        command = Command(service, "upgrade")
        until_pending(service, master, signal.SIGUSR2)
        command.interrupt()
        command.says(CANCELLING)
    said = command.ends(1)
    assert re.search(r"^upgrade refused: it was cancelled by process \d+ before it began", said, re.MULTILINE)
    assert "generation 1 serves on" in said
    assert service.matches(r"event=upgrade\.started") == []
    serves(service, 1)


def test_upgrade_in_the_watch_of_a_canary(service: Service):
    service.start()
    service.deploy("2")
    with service.under_load(clients=4):
        command = Command(service, "upgrade", "--watch", "600", "--canary", "1")
        command.says("watched as a canary of 1 of 2 workers")
        command.interrupt(signal.SIGTERM)
        said = command.ends(1)
        service.until_alone()
    assert re.search(CANCELLED_IN_WINDOW, said.splitlines()[-1])
    serves(service, 1)


def test_upgrade_while_a_canary_grows(service: Service):
    service.start()
    service.deploy("2", at_import="while os.path.exists('held'): time.sleep(0.02)")
    with service.under_load(clients=4):
        command = Command(service, "upgrade", "--watch", "2", "--canary", "1")
        until_state(service, UpgradeState.COMMITTING)
        (service.directory / "held").touch()
        command.says("it grows: 1 of 2 workers serve")
        command.interrupt()
        said = command.ends(1)
        service.until_alone()
    assert re.search(
        r"^upgrade failed: cancelled by process \d+ while it grew to its full size$", said.splitlines()[-1]
    )
    serves(service, 1)


def test_upgrade_in_the_commit_window_left_by_a_second_one_while_the_master_hangs(service: Service):
    service.configure(commit_window=60).start()
    service.deploy("2")
    command = Command(service, "upgrade")
    until_state(service, UpgradeState.COMMITTING)
    with stopped(service.generations()[0].pid):
        command.interrupt()
        command.says(CANCELLING)
        command.interrupt(signal.SIGTERM)
        assert "left: the master was asked to cancel, and its answer was not waited for" in command.ends(LEFT)
    service.wait_for(r"event=upgrade\.cancelled .*in the commit window")
    service.until_alone()
    serves(service, 1)


def test_upgrade_after_the_commit_while_the_old_workers_may_still_accept(service: Service):
    service.start()
    service.deploy("2")
    old = service.is_active()
    worker = old.snapshot().workers[0].pid
    with stopped(worker):
        command = Command(service, "upgrade")
        # A worker that stands still has not said that it leaves: the upgrade is not done for a while.
        until("retiring", lambda: old.snapshot().phase is Phase.RETIRING, service)
        with stopped(old.pid):
            assert old.snapshot().upgrade_state is UpgradeState.COMMITTING
            command.interrupt()
            command.says(CANCELLING)
    said = command.ends(0)
    assert "too late to cancel: the upgrade is done" in said
    assert "generation 2 serves" in said.splitlines()[-1]
    serves(service, 2)


# -- a stop


def in_phase(service: Service, phase: Phase) -> None:
    until(phase.label, lambda: service.generations()[-1].snapshot().phase is phase, service)


@pytest.mark.parametrize("leaves", [False, True])
def test_drain_whose_signal_the_master_has_not_taken(service: Service, leaves: bool):
    service.start()
    master = service.pid
    with stopped(master):
        command = Command(service, "drain")
        until_pending(service, master, signal.SIGTERM)
        command.interrupt()
        command.says(GOES_ON)
        assert service.snapshot().phase is Phase.SERVING
        if leaves:
            command.interrupt()
            assert "left: the stop goes on" in command.ends(LEFT)
    if not leaves:
        assert NOTHING_LOST in command.ends(0).splitlines()[-1]
    service.ends(0)


@pytest.mark.parametrize("leaves", [False, True])
def test_drain_in_the_lame_duck(service: Service, leaves: bool):
    service.configure(drain_delay=600, grace_period=700).start()
    command = Command(service, "drain")
    command.says("lame_duck: readiness is 503")
    command.interrupt()
    command.says(GOES_ON)
    # It is as was said: nothing has ended, and the lame duck goes on.
    assert service.get().generation == 1
    if leaves:
        command.interrupt(signal.SIGTERM)
        assert "left: the stop goes on" in command.ends(LEFT)
    in_phase(service, Phase.LAME_DUCK)
    service.signal(signal.SIGTERM)
    if not leaves:
        assert NOTHING_LOST in command.ends(0).splitlines()[-1]
    service.ends(0)


@pytest.mark.parametrize("leaves", [False, True])
def test_drain_with_background_work(service: Service, leaves: bool):
    service.start()
    service.get("/job?seconds=6")
    command = Command(service, "drain")
    command.says("draining: 1 background task in hand")
    command.interrupt(signal.SIGTERM)
    command.says(GOES_ON)
    if leaves:
        command.interrupt()
        assert "left: the stop goes on" in command.ends(LEFT)
    else:
        assert NOTHING_LOST in command.ends(0).splitlines()[-1]
    service.ends(0)
    assert "job finished" in service.log()


def test_drain_that_waits_for_a_generation_which_retires(service: Service):
    service.start()
    with Held(service) as held:
        service.deploy("2")
        service.upgrade()
        command = Command(service, "drain")
        until("one generation", lambda: [each.header.generation for each in service.generations()] == [1], service)
        command.interrupt()
        command.says(GOES_ON)
        assert command.process.poll() is None
        assert held.is_answered()
    assert NOTHING_LOST in command.ends(0).splitlines()[-1]
    service.ends(None)


def test_drain_while_an_upgrade_is_under_way(service: Service):
    service.start()
    with Held(service) as held:
        hold_boot(service)
        upgrade = Command(service, "upgrade")
        until_new_workers(service, WorkerState.BOOTING, WorkerState.BOOTING)
        command = Command(service, "drain")
        command.says("draining: 1 request")
        command.interrupt()
        command.says(GOES_ON)
        assert "upgrade failed: the service was stopped" in upgrade.ends(1)
        assert held.is_answered()
    assert NOTHING_LOST in command.ends(0).splitlines()[-1]
    service.ends(0)


def test_drain_that_cuts_off_a_request_says_so_after_an_interrupt(service: Service):
    service.configure(grace_period=5).start()
    with Held(service) as held:
        command = Command(service, "drain")
        command.says("draining: 1 request")
        command.interrupt()
        command.says(GOES_ON)
        said = " ".join(command.ends(1).split())
        assert "cut off: 1 request and 0 background tasks" in said
        assert not held.is_answered()
    service.ends(None)


def test_drain_of_a_service_that_boots(service: Service):
    service.deploy("1", at_import=GO_ON)
    service.spawn()
    # Before gunicorn has handlers, a moment after `boot.started`, SIGTERM ends the master as it ends any process.
    service.wait_for("Booting worker", times=service.workers)
    with stopped(service.generations()[0].pid):
        command = Command(service, "drain")
        until_pending(service, service.generations()[0].pid, signal.SIGTERM)
        command.interrupt()
        command.says(GOES_ON)
    assert NOTHING_LOST in command.ends(0).splitlines()[-1]
    service.ends(None)
    assert service.matches(r"event=phase\.serving") == []
