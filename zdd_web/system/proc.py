"""What the kernel says about processes: /proc, and the two prctl calls that Python does not offer."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when there is no such process or no /proc.

    Pids are reused, so a pid alone does not name a process for long; a pid and its start time name one process forever.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def owner(pid: int) -> int:
    """Return the uid that a process runs as (its effective one); -1 when there is no such process or it is hidden."""
    try:
        # Of the directory itself this holds also where the process is not dumpable, whose files are root's.
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def state(pid: int) -> str:
    """Return a process's state as one letter ("Z" for a zombie); "" when there is none."""
    fields = _stat(pid)
    return fields[0].decode() if fields else ""


def parent(pid: int) -> int:
    """Return the pid of a process's parent; 0 when there is no such process or no /proc."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def name(pid: int) -> str:
    """Return what the kernel calls a process (at most 15 characters); "" when there is none."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def words(pid: int) -> tuple[str, ...]:
    """Return the base names of the words of a command line that may name its program: a script is the second.

    After `-m` it is the last part of the module's name: `python -m supervisor.supervisord`.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            first = [os.fsdecode(word) for word in file.read().split(b"\0")[:3]]
    except OSError:
        return ()
    if first[1:2] == ["-m"]:
        return (os.path.basename(first[0]), *(module.rpartition(".")[2] for module in first[2:]))
    return tuple(os.path.basename(word) for word in first[:2])


def alive(pid: int, start: int) -> bool:
    """Tell whether the process that had `pid` when it started at `start` still runs. A zombie does not."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X") and int(fields[19]) == start


def _stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/<pid>/stat from the third (state) on; [] when there are none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in parentheses and may hold spaces and parentheses itself.
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError, PermissionError):
        return []  # PermissionError: another user's, and /proc is mounted with hidepid=1; with 2 it is not found


def die_with_parent(sig: signal.Signals, parent: int) -> bool:
    """Ask the kernel to send this process `sig` when its parent ends; False when `parent` is gone already.

    The kernel forgets it when the process changes its uid, so it must be said after that. Where the call does not
    exist nothing happens: it is the second line of defence, after the pids on the board.
    """
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    except (OSError, AttributeError):
        pass
    # A parent that ended before the call sends nothing any more.
    return os.getppid() == parent


def ancestors(pid: int) -> tuple[int, ...]:
    """Return the pids of a process's parent, its parent's and so on: one of them adopts the orphans of the process."""
    found: list[int] = []
    while (pid := parent(pid)) and pid not in found:
        found.append(pid)
    return tuple(found)


def kill(
    pid: int,
    start: int,
    sig: signal.Signals,
    *,
    parents: Collection[int] | None = None,
    users: Collection[int] | None = None,
) -> bool:
    """Signal the process that had `pid` at `start`; False when it is gone, or is not what is expected.

    With `parents` only a process is signalled whose parent is one of them, with `users` one that runs as one of these
    users. The process is held by a pidfd from before the look until the signal, so a pid that is used again in between
    is not hit.
    """
    try:
        held = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except (OSError, AttributeError):
        held = -1  # Linux before 5.3, a sandbox, or no descriptor left
    try:
        try:
            if not alive(pid, start):
                return False
            if parents is not None and parent(pid) not in parents:
                return False
            if users is not None and owner(pid) not in users:
                return False
        except OSError:
            # No descriptor left to look with: rather one signal too many than a successor that outlives its end. A
            # process that is not known by this one's own fork is left alone.
            if parents is not None:
                return False
        if held >= 0:
            signal.pidfd_send_signal(held, sig)
        else:
            os.kill(pid, sig)
    except ProcessLookupError:
        return False
    finally:
        if held >= 0:
            os.close(held)
    return True


def become_subreaper() -> None:
    """Have the kernel hand this process the orphans among its descendants, so that it can wait for them."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        pass


def describe(status: int) -> str:
    """Say how a process ended, from its wait status.

    >>> describe(3 << 8), describe(signal.SIGKILL)
    ('exit status 3', 'killed by SIGKILL')
    """
    if not os.WIFSIGNALED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {number}"
