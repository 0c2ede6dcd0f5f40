"""Whether this master may be replaced, judged by whose child it is.

A successor is a new process. Where the old one's exit means the end of the service (it is PID 1 of its container, or
its parent ends or restarts the service with its child) a "successful" upgrade would be an outage.

Not every parent can be judged. On a machine an unknown one is taken to stay, as a shell or an init does. In a container
everything ends with PID 1, so there an unknown PID 1 is an obstacle for a master that is its child, or the child of
processes that wait for theirs.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from zdd_web.gunicorn.handoff import process_tree
from zdd_web.system import proc

KEEP = "set KEEP_PID = True, which leaves a keeper with this pid"
STAYS = "PARENT_STAYS = True if it stays"
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


class Parentage(NamedTuple):
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
    #: everything ends with PID 1, which is not an init that is known to stay
    container: bool = False
    #: another process has forked it, and has ended: its parent does not wait for it
    adopted: bool = False

    @classmethod
    def of_this_process(cls, *, adopted: bool = False) -> Parentage:
        """Look at this process and its parent; `adopted` when its own predecessor has forked it."""
        pid, parent, through = os.getpid(), os.getppid(), []
        started_by_systemd = [pid]
        while parent > 1 and _waits(parent, pid):
            through.append(proc.name(parent))
            started_by_systemd.append(parent)
            pid, parent = parent, proc.parent(parent)
        return cls(
            pid=os.getpid(),
            parent=parent,
            name=proc.name(parent),
            words=proc.words(parent),
            unit=os.environ.get("SYSTEMD_EXEC_PID") in [str(pid) for pid in started_by_systemd],
            # systemd hears MAINPID from the main process alone, which is not this one when a shell started it.
            notify=bool(os.environ.get("NOTIFY_SOCKET")) and not through,
            through=tuple(through),
            container=process_tree.is_in_a_container(),
            adopted=(adopted and not through) or (parent == 1 and process_tree.is_adopted(pid)),
        )

    def obstacle(self, *, parent_stays: bool = False) -> str | None:
        """Say why this master must not be replaced, and what to use instead; None when it may.

        With `parent_stays` (PARENT_STAYS) the parent is not judged.

        >>> print(Parentage(pid=7, parent=1, name="tini").obstacle())
        the parent tini (pid 1) watches this pid and acts when it ends: set KEEP_PID = True, which leaves a keeper \
with this pid, or restart by tini
        >>> Parentage(pid=4711, parent=1, name="systemd", unit=True, notify=True).obstacle() is None
        True
        """
        if self.pid == 1:
            return f"this master is PID 1, whose exit ends the container: {KEEP}, or {POD}"
        obstacle = None if parent_stays else self._parents_obstacle()
        if obstacle is None and self.unit and not self.notify:
            return (
                f"systemd ends the unit with this pid, since it is not told of another: use Type=notify, or {KEEP}, "
                f"or systemctl restart"
            )
        return obstacle

    def _parents_obstacle(self) -> str | None:
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
        if self.parent != 1 or self.adopted:
            return None
        if self.name in SHELLS:
            return f"the parent is a shell at PID 1 ({self.name}) and may end with this master: {KEEP}, or {POD}"
        if self.name in WAITERS:
            return f"the parent is {self.name} at PID 1 and ends with this master: {KEEP}, or {POD}"
        if self.container:
            name = self.name or "a process"
            between = f"{', '.join(self.through)}, the child of " if self.through else ""
            return (
                f"the parent is {between}{name} at PID 1, with which the container ends, and which may end with this "
                f"master: {KEEP}, or {STAYS}, or {POD}"
            )
        return None


def _waits(pid: int, child: int) -> bool:
    name = proc.name(pid)
    if name in SHELLS:
        # A shell at a terminal gives each command a process group of its own, and goes on when it ends.
        return _group(pid) == _group(child)
    return name in WAITERS or process_tree.waits_for(pid, child)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0
