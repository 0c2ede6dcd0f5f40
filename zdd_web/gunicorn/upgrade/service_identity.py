"""The identity of the service: what tells other processes which master it is.

Three things name it: the pid file, systemd's MAINPID, and gunicorn's control socket. They change hands in the commit,
and come back to a master that lost its successor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.systemd_notifier import SystemdNotifier


class ServiceIdentity:
    """What this master holds of it, or hands over."""

    def __init__(self, server: ArbiterFacade, supervisor: SystemdNotifier) -> None:
        self._server, self._supervisor = server, supervisor
        self._prepared = ""

    def prepare(self, pid: int, pid_file: str) -> None:
        """Write the pid file of a successor that has this one as well: a full disk shall be found out in time.

        Raises OSError, while nothing has been promised yet.
        """
        ours = self._server.pid_file
        if ours is not None and os.path.abspath(ours.fname) == pid_file:
            self._prepared = ours.prepare(pid)

    def discard(self) -> None:
        """Remove what was prepared for a successor that will not come."""
        if self._prepared:
            with contextlib.suppress(OSError):
                os.unlink(self._prepared)
            self._prepared = ""

    def hand_over(self, pid: int, *, workers: int, is_child: bool) -> None:
        """Give everything to a successor with so many workers; raises whatever stands in the way, some of it done."""
        if self._prepared and self._server.pid_file is not None:
            self._server.pid_file.commit(self._prepared)
            self._prepared = ""
        self._server.suspend_control_server()
        if is_child:
            # Sent by the old main process, before it ends: systemd reads its messages alone, and ends the unit with it.
            self._supervisor.hand_over(pid, workers)
        else:
            # A successor that has taken over is of another unit, and sends READY=1 for that itself.
            guarded("systemd", self._supervisor.superseded)(pid)

    def take_back(self) -> None:
        """Make everything this master's again, each for itself: to serve without is better than not to serve."""
        steps: list[tuple[str, Callable[[], object]]] = [
            ("systemd", self._supervisor.take_back),
            ("control socket", self._server.resume_control_server),
        ]
        pid_file = self._server.pid_file
        if pid_file is not None:
            steps.append(("pid file", lambda: pid_file.create(os.getpid())))
        for where, step in steps:
            guarded(where, step)()

    def forget_attempt(self, pid: int) -> None:
        """Remove the pid file that a release without install() writes, as gunicorn does in an upgrade of its own."""
        if self._server.pid_file is not None:
            PidFile(f"{self._server.pid_file.fname}.2", pid).unlink()
