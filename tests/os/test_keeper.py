"""The keeper finds whose turn it is, passes signals on, and ends as the last master did: with real processes.

Each test forks a process that is the keeper, and has the masters as its children, as it would in a service.
"""

from __future__ import annotations

import functools
import os
import signal
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.forks import in_child, spawn
from zdd_web import keeper, service
from zdd_web.board import Board
from zdd_web.lifecycle import Phase
from zdd_web.system import proc

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NAME = f"unit-{uuid.uuid4().hex[:12]}"


def eventually(probe: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := probe()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def master(
    generation: int = 2,
    *,
    name: str = NAME,
    predecessor: int = 0,
    phase: Phase = Phase.SERVING,
    on_signal: Callable[[int], object] = lambda sig: os._exit(0),
) -> int:
    """Fork a process with a board as a master has one; it does `on_signal` for each signal. Returns its pid."""

    def live() -> None:
        board = Board.create(name)
        header = board.header
        header.generation, header.predecessor_pid, header.phase = generation, predecessor, phase
        header.master_start = proc.start_time(os.getpid())
        signals = [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGUSR1]
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        header.master_pid = os.getpid()
        while True:
            on_signal(signal.sigwait(signals))

    pid = spawn(live)
    eventually(lambda: service.generation_of(pid))
    return pid


def leave(status: int) -> Callable[[int], object]:
    return lambda sig: os._exit(status)


def keep(successor: int, signals: list[tuple[float, signal.Signals, int]] | None = None) -> int:
    """Be the keeper in this process and return its status; each signal is sent to a pid after some seconds."""
    # As become() does: one that comes before the keeper waits for it would kill it. Whether it waits yet cannot be read
    # off /proc/PID/status: the kernel takes what sigtimedwait() waits for out of SigBlk.
    signal.pthread_sigmask(signal.SIG_BLOCK, keeper.WAITED)

    def send(delay: float, sig: signal.Signals, pid: int) -> None:
        time.sleep(delay)
        os.kill(pid, sig)

    for each in signals or []:
        spawn(functools.partial(send, *each))
    return keeper.main(NAME, successor)


@pytest.mark.parametrize("status", [0, 1, 3])
def test_keeper_ends_with_the_status_of_the_last_master(status: int) -> None:
    def child() -> int:
        return keep(master(on_signal=leave(status)), [(0.05, signal.SIGTERM, os.getpid())])

    assert in_child(child) == status


def test_keeper_tells_which_signal_killed_the_last_master() -> None:
    def child() -> int:
        pid = master()
        return keep(pid, [(0.05, signal.SIGKILL, pid)])

    assert in_child(child) == 128 + signal.SIGKILL


def test_keeper_knows_the_status_of_a_master_that_ended_before_its_first_look() -> None:
    def child() -> int:
        pid = spawn(lambda: os._exit(7))
        eventually(lambda: proc.state(pid) == "Z")
        return keeper.main(NAME, pid)

    assert in_child(child) == 7


def test_keeper_without_anybody_to_keep_ends() -> None:
    assert in_child(lambda: keeper.main(NAME, 0)) == 0


def test_signals_are_passed_on_to_the_master_in_office_only() -> None:
    def child() -> int:
        # The one that retires must not hear it: it would end with 5, and the other would never end.
        retiring = master(2, phase=Phase.RETIRING, on_signal=leave(5))
        current = master(3, predecessor=retiring, on_signal=leave(6))
        return keep(retiring, [(0.05, signal.SIGUSR2, os.getpid()), (0.5, signal.SIGKILL, retiring)]) or current * 0

    assert in_child(child) == 6


def test_stranger_of_the_same_name_is_left_alone() -> None:
    stranger = master(on_signal=leave(9))
    try:
        assert in_child(lambda: keep(master(on_signal=leave(4)), [(0.05, signal.SIGTERM, os.getpid())])) == 4
        assert proc.state(stranger) == "S"
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)


def test_successor_under_another_name_is_found() -> None:
    def child() -> int:
        retiring = master(2, phase=Phase.RETIRING)
        renamed = master(3, name=f"{NAME}-renamed", predecessor=retiring, on_signal=leave(8))
        return keep(retiring, [(0.0, signal.SIGKILL, retiring), (0.3, signal.SIGTERM, os.getpid())]) or renamed * 0

    assert in_child(child) == 8


def test_master_that_cannot_be_looked_at_for_a_moment_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def child() -> int:
        pid = master(on_signal=leave(2))
        line = service.Line(os.getpid(), NAME, pid)
        assert line.is_active() is not None
        monkeypatch.setattr(service, "generation_of", lambda pid: (_ for _ in ()).throw(OSError("EMFILE")))
        line._current.board.header  # noqa: B018 - still mapped
        found = line.is_active()
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        return 0 if found is not None and found.pid == pid and line.is_active() is None else 1

    assert in_child(child) == 0


def test_workers_of_a_killed_master_are_waited_for_and_at_last_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LAST_REPLIES", 0.3)

    def child() -> object:
        patient = spawn(lambda: time.sleep(600))
        quick = spawn(lambda: time.sleep(0.1))
        statuses: dict[int, int] = {}
        workers = [(pid, proc.start_time(pid)) for pid in (patient, quick)]
        keeper._wait_for(workers, (os.getpid(),), statuses)
        eventually(lambda: keeper.reap(statuses) or len(statuses) == 2)
        return [statuses[patient], statuses[quick]]

    assert in_child(child) == [-signal.SIGKILL, 0]


def test_descendants_are_children_and_theirs_and_nobody_else() -> None:
    def child() -> bool:
        reader, writer = os.pipe()

        def parent() -> None:
            inner = spawn(lambda: time.sleep(600))
            os.write(writer, str(inner).encode())
            time.sleep(600)

        outer = spawn(parent)
        inner = int(os.read(reader, 32))
        found = service.descendants(os.getpid())
        os.kill(inner, signal.SIGKILL)
        os.kill(outer, signal.SIGKILL)
        os.waitpid(outer, 0)
        return sorted(found) == sorted([outer, inner]) and os.getpid() not in found

    assert in_child(child)


def test_every_ended_child_is_reaped_with_its_status() -> None:
    def child() -> bool:
        ended = {spawn(lambda status=status: os._exit(status)): status for status in (0, 3, 70)}
        killed = spawn(lambda: time.sleep(600))
        os.kill(killed, signal.SIGKILL)
        statuses: dict[int, int] = {}
        eventually(lambda: keeper.reap(statuses) or len(statuses) == 4)
        return statuses == {**ended, killed: -signal.SIGKILL}

    assert in_child(child)


def test_keeper_is_known_by_its_command_line() -> None:
    assert service.kept_by(os.getpid()) is None
    assert service.kept_by(999_999_999) is None


def test_retired_master_keeps_in_its_own_process_where_the_interpreter_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def child() -> None:
        monkeypatch.setattr(keeper.sys, "executable", "/nowhere/bin/python")
        own = Board.create(NAME)
        own.header.master_pid, own.header.phase = os.getpid(), Phase.STOPPED
        own.header.successor_pid = spawn(lambda: os._exit(12))
        eventually(lambda: proc.state(own.header.successor_pid) == "Z")
        keeper.become(NAME, own.header.successor_pid, list)

    pid = spawn(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 12


def test_signal_that_came_before_the_keeper_was_ready_is_not_lost() -> None:
    def child() -> int:
        pid = master(on_signal=leave(11))
        # As between become() and main(): blocked, and pending across the exec.
        signal.pthread_sigmask(signal.SIG_BLOCK, keeper.WAITED)
        os.kill(os.getpid(), signal.SIGTERM)
        return keeper.main(NAME, pid)

    assert in_child(child) == 11
