"""Processes that hold a board as a master does: what the commands look for, without gunicorn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.helpers.forks import PATIENCE, spawn, status_of
from zdd_web.board import Board, WorkerState
from zdd_web.lifecycle import Phase
from zdd_web.system import clock, proc

#: A user that every Linux has, and no service here runs as.
NOBODY_UID = 65534


def become(uid: int) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


class Masters:
    """Processes that hold a board as a master does, and do what they are told on SIGUSR2."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def start(
        self,
        name: str,
        generation: int = 1,
        phase: Phase | int = Phase.SERVING,
        on_usr2: Callable[[Board], None] = lambda board: None,
        *,
        predecessor: int = 0,
        successor: int = 0,
        younger_by: int = 0,
        listener: str = "",
        ticked_before: float = 0.0,
        uid: int | None = None,
        edit: Callable[[Board], None] = lambda board: None,
    ) -> int:
        """Fork a master, of the user `uid` if one is given; `edit` is done to its board last. Returns its pid."""
        reader, writer = os.pipe()

        def master() -> None:
            if uid is not None:
                become(uid)
            board = Board.create(name, slots=2)
            header = board.header
            header.generation, header.phase, header.phase_since = generation, phase, 1
            header.master_start, header.workers_wanted = proc.start_time(os.getpid()) + younger_by, 2
            header.predecessor_pid, header.successor_pid = predecessor, successor
            # It takes no turn; for as long as a test may take it is not one that hangs.
            header.tick_at = clock.after_ns(-ticked_before or PATIENCE)
            header.listener_count = bool(listener)
            header.listener(0).name = listener
            slot = board.claim(1)
            slot.pid, slot.state, slot.in_flight, slot.requests = 4711, WorkerState.SERVING, 3, 12
            slot = board.claim(2)
            slot.pid, slot.state, slot.tasks, slot.order.retire = 4712, WorkerState.LEAVING, 1, 1
            slot.error = "it broke"

            def usr2(*args: object) -> None:
                on_usr2(board)
                header.upgrade_number += 1

            signal.signal(signal.SIGUSR2, usr2)
            header.master_pid = os.getpid()
            edit(board)
            os.write(writer, b".")
            signal.alarm(PATIENCE)
            while True:
                signal.pause()

        return self.run(master, reader, writer)

    def run(self, master: Callable[[], object], reader: int, writer: int) -> int:
        """Fork a process and wait until it has written to the pipe."""
        pid = spawn(master)
        self.pids.append(pid)
        os.close(writer)
        assert os.read(reader, 1) == b"."
        os.close(reader)
        return pid

    def chain(self, name: str, *phases: Phase) -> list[int]:
        """Start the generations of one service, the first of them generation 1."""
        pids: list[int] = []
        for generation, phase in enumerate(phases, 1):
            pids.append(self.start(name, generation, phase, predecessor=pids[-1] if pids else 0))
        return pids

    def stop(self) -> None:
        """Kill and reap them all."""
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
                status_of(pid)
            except (ProcessLookupError, ChildProcessError):
                pass
