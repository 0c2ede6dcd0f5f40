"""What the kernel tells about the processes above this one: which of them wait for a child, and what PID 1 is."""

from __future__ import annotations

import os
from pathlib import Path

from zdd_web.system import proc

#: PROC_PID_INIT_INO: the inode of the machine's own pid namespace. If its PID 1 ended, the kernel would panic.
MACHINES_PID_NAMESPACE = 0xEFFFFFFC

#: PID 1 of a container that is a whole system. It reaps what it adopts, and stays.
INITS = ("systemd", "init")


def is_in_a_container() -> bool:
    """Tell whether PID 1 may end before the machine does, and all of its namespace with it."""
    try:
        machines = os.stat("/proc/self/ns/pid").st_ino == MACHINES_PID_NAMESPACE
    except OSError:
        machines = False
    return not machines and proc.name(1) not in INITS


def is_adopted(pid: int) -> bool:
    """Tell whether a child of PID 1 was certainly forked by another process, which has ended.

    It is in a session that is neither its own nor PID 1's: a session comes from the process that forks, or is new.
    """
    try:
        session = os.getsid(pid)
        return session not in (pid, os.getsid(1))
    except OSError:
        return False


def waits_for(pid: int, child: int) -> bool:
    """Tell whether a process waits for this child, as `subprocess.call()` does, at this very moment.

    False where that cannot be seen: another user's process, or one that waits in a sandbox.
    """
    for task in _listed(f"/proc/{pid}/task"):
        if _text(f"{task}/wchan") != "do_wait":
            continue
        # The arguments of wait4(pid, ...) or waitid(P_PID, pid, ...), which only a tracer may see.
        if f"{child:#x}" in _text(f"{task}/syscall").split()[1:3]:
            return True
        if _children(pid) == {child}:
            return True
    return False


def _children(pid: int) -> set[int]:
    everything = (int(path.name) for path in _listed("/proc") if path.name.isdecimal())
    return {each for each in everything if proc.parent(each) == pid}


def _listed(directory: str) -> list[Path]:
    try:
        return list(Path(directory).iterdir())
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
