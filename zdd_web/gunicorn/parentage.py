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
    "tini", "docker-init", "dumb-init", "catatonit", "supervisord", "runsv", "s6-supervise", "honcho", "foreman",
    "circusd", "pm2", "god",
)  # fmt: skip

SHELLS = ("sh", "bash", "dash", "ash", "busybox", "zsh")


@dataclass(frozen=True)
class Parentage:
    """Whose child a master is. `words` are the first base names of the parent's command line: supervisord and honcho
    are Python scripts, which the kernel may call "python"."""

    pid: int
    parent: int
    name: str
    words: tuple[str, ...] = ()
    #: systemd started this very process as a unit's main process
    unit: bool = False
    #: ... and listens for MAINPID
    notify: bool = False

    @classmethod
    def of_this_process(cls) -> Parentage:
        """Look at this process and its parent."""
        parent = os.getppid()
        return cls(
            pid=os.getpid(),
            parent=parent,
            name=proc.name(parent),
            words=proc.words(parent),
            unit=os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()),
            notify=bool(os.environ.get("NOTIFY_SOCKET")),
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
            return (
                f"the parent {watcher} (pid {self.parent}) watches this pid and acts when it ends: "
                f"{KEEP}, or restart by {watcher}"
            )
        if self.parent == 1 and self.name in SHELLS:
            return f"the parent is a shell at PID 1 ({self.name}) and may end with this master: {KEEP}, or {POD}"
        if self.unit and not self.notify:
            return (
                f"systemd ends the unit with this pid, since it is not told of another: use Type=notify, or {KEEP}, "
                f"or systemctl restart"
            )
        return None
