"""The keeper: what a retired master becomes where its pid must stay (`KEEP_PID`).

    python -m zdd_web.keeper NAME PID

PID 1 of a container, tini, supervisord and their like take the end of the process they know for the end of the service.
So the retired master does not exit but execs into this: the same pid, the same children, a few megabytes. It forwards
the signals that an operator sends to "the service" to the master that is active now, waits for every
orphan that the kernel hands it (it is a subreaper), and ends with the exit status of the last master.

Signals arrive blocked across the exec: one that came in between would have killed the process that must not end. They
are taken synchronously with `sigtimedwait`, so there is no handler that could race with the rest.

Every generation after this one is a descendant of this process, which tells them from another service that happens to
have the same NAME; and each is known by its predecessor, since a release may change its NAME.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from zdd_web import service
from zdd_web.system import clock, proc

FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN,
    signal.SIGTTOU, signal.SIGWINCH,
)  # fmt: skip

WAITED = (*FORWARDED, signal.SIGCHLD)

#: How often the keeper looks which master is active when no signal comes, seconds.
LOOK = 1.0

#: How long the workers of a master that was killed may take for what they have in hand, seconds: the keeper's end
#: would kill them where it is PID 1, and has the service started again, beside them, elsewhere. Docker's own patience.
LAST_REPLIES = 10.0


def become(name: str, successor: int, queued: Callable[[], list[int]]) -> NoReturn:
    """Replace this process, a retired master of the service `name`, by its keeper. Does not return.

    `queued` returns the signals that were received and not handled: they wait, blocked, for the keeper to take them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)
    for sig in queued():
        os.kill(os.getpid(), sig)
    try:
        os.execv(sys.executable, [sys.executable, "-m", service.KEEPER, name, str(successor)])
    except OSError:
        # The virtualenv may have been deleted with its release: keep in this process, which is larger, that is all.
        os._exit(main(name, successor))


def reap(statuses: dict[int, int]) -> None:
    """Take note of the exit status of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        statuses[pid] = os.waitstatus_to_exitcode(status)


def main(name: str, successor: int) -> int:
    """Keep until the service is gone; return its exit status, 128 + N when signal N killed it."""
    proc.become_subreaper()
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)
    line = service.Line(os.getpid(), name, successor)
    statuses: dict[int, int] = {}
    last, board = successor, None
    while True:
        generation = line.is_active()
        if generation is None:
            break
        if generation.serves:
            # A generation that was still retiring when the service was stopped does not know how the stop went.
            last = generation.pid
        board = generation.board
        caught = signal.sigtimedwait(WAITED, LOOK)
        reap(statuses)
        if caught is None or caught.si_signo == signal.SIGCHLD:
            continue
        # Another master may have become active since the last look.
        generation = line.is_active()
        if generation is not None:
            proc.kill(generation.pid, generation.board.header.master_start, signal.Signals(caught.si_signo))
    # Its memory outlives it.
    if board is not None and board.names_its_workers:
        _wait_for(board.worker_pids(), (last, os.getpid(), *proc.ancestors(os.getpid())), statuses)
    status = statuses[last] if last in statuses else _status_of(last)
    return 128 - status if status < 0 else status


def _wait_for(workers: list[tuple[int, int]], parents: tuple[int, ...], statuses: dict[int, int]) -> None:
    """Wait for the workers of a master that has ended; they are orphans that one of `parents` has adopted."""
    deadline = clock.after_ns(LAST_REPLIES)
    while left := [worker for worker in workers if proc.alive(*worker) and proc.parent(worker[0]) in parents]:
        if clock.passed(deadline):
            for pid, start in left:
                proc.kill(pid, start, signal.SIGKILL, parents=parents)
            return
        signal.sigtimedwait([signal.SIGCHLD], 0.1)
        reap(statuses)


def _status_of(pid: int) -> int:
    # It has closed its files, so it is about to end; the order in which the kernel does that is not ours.
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except (ChildProcessError, ValueError):
        return 0  # its status was taken by another waiter


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
