"""How this master was started, so that its successor can be started the same way.

Recorded when `install()` first runs: later gunicorn changes the directory (`--chdir`), and `GUNICORN_*` and its own
variables get into the environment.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

#: Said to one process by its parent and meant for it alone.
ONCE = ("GUNICORN_PID", "GUNICORN_FD", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SERVER_SOFTWARE")


@dataclass(frozen=True)
class Launch:
    """A command line, the directory it was given in, and its environment."""

    directory: str
    command: tuple[str, ...]
    environ: dict[str, str]

    @classmethod
    def record(cls) -> Launch:
        """Record how this process was started."""
        environ = {key: value for key, value in os.environ.items() if key not in ONCE}
        return cls(directory=_directory(), command=command(sys.orig_argv, sys.executable), environ=environ)

    def obstacle(self) -> str | None:
        """Say what keeps this command from being run again; None when nothing does."""
        if not os.path.isdir(self.directory):
            return f"the directory it was started in is gone: {self.directory}"
        program = self.command[0]
        found = shutil.which(os.path.join(self.directory, program) if os.sep in program else program)
        if found is None:
            return f"the program is gone or not executable: {program}"
        return None


def _directory() -> str:
    # The shell's view keeps a symlink (`current`) that the kernel's has resolved; it counts only while it is true.
    logical = os.environ.get("PWD", "")
    try:
        if os.path.isabs(logical) and os.path.samefile(logical, os.curdir):
            return logical
    except OSError:
        pass
    return os.getcwd()


def command(orig_argv: Sequence[str], executable: str) -> tuple[str, ...]:
    """Return the command that starts this program again.

    A console script is started by its own path and not by the interpreter that runs it now: its first line names the
    interpreter of *its* virtualenv, which a flipped symlink has moved to the new release. Everything else is started
    by this interpreter with the same arguments, among them `-m`, `-X` and `-W` (gunicorn's own re-exec loses those).
    """
    if len(orig_argv) > 1 and _is_script_of(orig_argv[1], orig_argv[0]):
        return tuple(orig_argv[1:])
    return (executable, *orig_argv[1:])


def _is_script_of(path: str, interpreter: str) -> bool:
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        return False
    with open(path, "rb") as file:
        first, second = file.readline(4096), file.readline(4096)
    # pip writes `#!/bin/sh` and `'''exec' <interpreter>` when the path is too long for the kernel or holds spaces.
    line = second if first.startswith(b"#!/bin/sh") and second.startswith(b"'''exec'") else first
    return first.startswith(b"#!") and os.fsencode(interpreter) in line
