"""The keeper: what a retired master becomes where its pid must stay (`KEEP_PID`).

    python -m zdd_web.keeper NAME

PID 1 of a container, tini, supervisord and their like take the end of the process they know for the end of the service.
So the retired master does not exit but execs into this: the same pid, the same children, a few megabytes. It forwards
the signals that an operator sends to "the service" to the master that is in office now, waits for every
orphan that the kernel hands it (it is a subreaper), and ends with the exit status of the last master.

Signals arrive blocked across the exec: one that came in between would have killed the process that must not end. They
are taken synchronously with `sigtimedwait`, so there is no handler that could race with the rest.
"""

from __future__ import annotations

import os
import signal
import sys

from zdd_web import proc
from zdd_web.cli import service

FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN,
    signal.SIGTTOU, signal.SIGWINCH,
)  # fmt: skip

WAITED = (*FORWARDED, signal.SIGCHLD)

#: How often the keeper looks whether the office has changed hands when no signal says so, seconds.
LOOK = 1.0


def become(name: str) -> None:
    """Replace this process, a retired master of the service `name`, by its keeper. Raises OSError; does not return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)
    os.execv(sys.executable, [sys.executable, "-m", "zdd_web.keeper", name])


def in_office(name: str) -> service.Generation | None:
    """Return the generation of a service that a signal must go to; None when it has ended."""
    candidates = [each for each in service.generations() if each.board.header.name == name]
    return service.in_office(candidates) if candidates else None


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


def main(name: str) -> int:
    """Keep until the service is gone; return its exit status, 128 + N when signal N killed it."""
    proc.become_subreaper()
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)
    statuses: dict[int, int] = {}
    last = 0
    while True:
        reap(statuses)
        generation = in_office(name)
        if generation is None:
            status = statuses.get(last, 0)
            return 128 - status if status < 0 else status
        last = generation.pid
        caught = signal.sigtimedwait(WAITED, LOOK)
        if caught is None or caught.si_signo == signal.SIGCHLD:
            continue
        # The office may have changed hands since the last look.
        generation = in_office(name)
        if generation is not None:
            proc.kill(generation.pid, generation.board.header.master_start, signal.Signals(caught.si_signo))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
