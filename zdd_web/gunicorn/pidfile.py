"""The pid file, replaced in one step.

gunicorn's own unlinks before it creates (pidfile.py:49): a reader in between finds no service. This one writes beside
it and renames, and can be prepared while a full disk is still no harm. It has the names that gunicorn's loop calls.
"""

from __future__ import annotations

import contextlib
import os

from zdd_web import proc

#: A process's start is known in ticks since a boot that is known in whole seconds.
CLOCK_SLACK = 2.0


class PidFile:
    """A pid file that names one process at every instant."""

    def __init__(self, fname: str, pid: int) -> None:
        self.fname, self.pid = fname, pid

    def prepare(self, pid: int) -> str:
        """Write the file for `pid` beside the pid file and return its path; raises OSError.

        The path is always the same: what a killed master had prepared is overwritten by the next one.
        """
        directory, name = os.path.split(os.path.abspath(self.fname))
        path = os.path.join(directory, f".{name}.zdd_web")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        # Exclusive: in a directory that others can write to, the name may be somebody's link by now.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.fchmod(fd, 0o644)
            os.write(fd, f"{pid}\n".encode())
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        return path

    def commit(self, prepared: str) -> None:
        """Put a prepared file in the pid file's place."""
        os.replace(prepared, self.fname)

    def create(self, pid: int) -> None:
        """Make the pid file name `pid`."""
        self.commit(self.prepare(pid))

    def read(self) -> int:
        """Return the pid that the file names; 0 when there is none."""
        try:
            with open(self.fname, "rb") as file:
                return int(file.read(32))
        except (OSError, ValueError):
            return 0

    def remove_if_stale(self) -> bool:
        """Remove a file that names nobody who can have written it: a zombie, or a pid that was used again since.

        gunicorn asks only whether the pid exists (pidfile.py:63), and refuses to start (#3383).
        """
        pid = self.read()
        state = proc.state(pid) if pid else ""
        if not state:
            return False  # nobody at all: gunicorn replaces that itself
        if state not in "ZX" and proc.started_at(pid) <= os.stat(self.fname).st_mtime + CLOCK_SLACK:
            return False
        os.unlink(self.fname)
        return True

    def unlink(self) -> None:
        """Remove the file if it still names this process."""
        if self.read() == self.pid:
            try:
                os.unlink(self.fname)
            except OSError:
                pass
