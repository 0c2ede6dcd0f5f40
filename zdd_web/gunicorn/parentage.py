"""Whether this master may be replaced, judged by whose child it is.

A successor is a new process. Where the old one's exit means the end of the service (it is PID 1 of its container, or
its parent ends or restarts the service with its child) a "successful" upgrade would be an outage.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from zdd_web import proc

KEEP = "set KEEP_PID = True, which leaves a keeper with this pid"
POD = "replace the container instead (a rolling update; zdd_web drains on SIGTERM)"

#: Programs that end, or restart the service, when the child they started ends. tini, docker-init, dumb-init and
#: catatonit exit with it (seen with dumb-init); the others start it anew, beside the successor that holds the port.
WATCHERS = (
    "tini", "docker-init", "dumb-init", "catatonit", "conmon", "containerd-shim", "supervisord", "runsv",
    "s6-supervise", "honcho", "foreman", "circusd", "pm2", "god",
)  # fmt: skip

SHELLS = ("sh", "bash", "dash", "ash", "busybox", "zsh")

#: These wait for their child and end with it, as a shell does that runs a script: whose child *they* are matters.
WAITERS = ("su", "sudo", "runuser", "timeout", "uv")


@dataclass(frozen=True)
class Parentage:
    """Whose child a master is.

    `words` are the first base names of the parent's command line: supervisord and honcho are Python scripts, which the
    kernel may call "python". `through` names what stands between the two and waits, such as a shell that runs a script.
    """

    pid: int
    parent: int
    name: str
    words: tuple[str, ...] = ()
    #: systemd started this very process as a unit's main process
    unit: bool = False
    #: ... and listens for MAINPID
    notify: bool = False
    through: tuple[str, ...] = ()

    @classmethod
    def of_this_process(cls) -> Parentage:
        """Look at this process and its parent."""
        parent, through = os.getppid(), []
        started_by_systemd = [os.getpid()]
        while parent > 1 and _waits(parent):
            through.append(proc.name(parent))
            started_by_systemd.append(parent)
            parent = proc.parent(parent)
        return cls(
            pid=os.getpid(),
            parent=parent,
            name=proc.name(parent),
            words=proc.words(parent),
            unit=os.environ.get("SYSTEMD_EXEC_PID") in [str(pid) for pid in started_by_systemd],
            # systemd hears MAINPID from the main process alone, which is not this one when a shell started it.
            notify=bool(os.environ.get("NOTIFY_SOCKET")) and not through,
            through=tuple(through),
        )

    def obstacle(self) -> str | None:
        """Say why this master must not be replaced, and what to use instead; None when it may.

        >>> print(Parentage(pid=7, parent=1, name="tini").obstacle())
        the parent tini (pid 1) watches this pid and acts when it ends: set KEEP_PID = True, which leaves a keeper \
with this pid, or restart by tini
        >>> Parentage(pid=4711, parent=1, name="systemd", unit=True, notify=True).obstacle() is None
        True
        """
        if self.pid == 1:
            return f"this master is PID 1, whose exit ends the container: {KEEP}, or {POD}"
        watcher = next((name for name in WATCHERS if name in (self.name, *self.words)), None)
        if watcher is not None:
            who = f"the parent {watcher} (pid {self.parent}) watches this pid"
            if self.through:
                who = f"the parent {self.through[0]} ends with this master: {watcher} (pid {self.parent}) watches it"
            return f"{who} and acts when it ends: {KEEP}, or restart by {watcher}"
        if self.parent == 0:
            return (
                f"this master was started from outside its pid namespace, as a container's main process is, whose exit "
                f"ends the container: {KEEP}, or {POD}"
            )
        if self.parent == 1 and self.name in SHELLS:
            return f"the parent is a shell at PID 1 ({self.name}) and may end with this master: {KEEP}, or {POD}"
        if self.parent == 1 and self.name in WAITERS:
            return f"the parent is {self.name} at PID 1 and ends with this master: {KEEP}, or {POD}"
        if self.unit and not self.notify:
            return (
                f"systemd ends the unit with this pid, since it is not told of another: use Type=notify, or {KEEP}, "
                f"or systemctl restart"
            )
        return None


def _waits(pid: int) -> bool:
    name = proc.name(pid)
    # A shell at a terminal gives each command a process group of its own, and goes on when it ends.
    return name in WAITERS or (name in SHELLS and _group(pid) == os.getpgrp())


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0
