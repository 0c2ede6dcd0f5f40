"""The pid file, replaced in one step.

gunicorn's own unlinks before it creates (test_pid_file_is_renamed_by_removing_it_first): a reader in between finds no
service. This one writes beside it and renames, and can be prepared while a full disk is still no harm. It has the names
that gunicorn's loop calls.
"""

from __future__ import annotations

import contextlib
import os

from zdd_web import lookup, service
from zdd_web.system import proc


def is_master(pid: int) -> bool:
    """Tell whether a process is a master with zdd_web, or of a gunicorn without it, as far as can be known.

    The board decides: a master has its own, and its workers have their master's. Without one it may be gunicorn all the
    same, which only its command line can tell.
    """
    try:
        generation = service.generation_of(pid)
        if generation is not None:
            return generation.alive
        if lookup.has_a_masters_board(pid):
            return False
    except PermissionError:
        return True  # not dumpable: it cannot be known
    except OSError:
        return False  # ended in between
    if service.kept_by(pid) is not None:
        return True
    words = proc.words(pid)
    # An app that embeds gunicorn has the command line of this process.
    if words != proc.words(os.getpid()) and not any(word.startswith("gunicorn") for word in words):
        return False
    # Workers have their master's command line, or, with setproctitle, one that tells.
    return words != proc.words(proc.parent(pid)) and not words[0].startswith("gunicorn: worker")


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
        # Exclusive: in a directory that others can write to, the name may be a link by now.
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
        """Remove a file that names a process which cannot have written it: a zombie, or a pid that was reused since.

        gunicorn asks only whether the pid exists (test_pid_file_of_any_process_that_exists_stops_a_start), and refuses
        to start (#3383). The file's time proves nothing: a step of the wall clock moves it to before the start of a
        service that runs.
        """
        pid = self.read()
        if not pid or not self._is_stale(pid):
            return False
        # The service may have been upgraded, or started, meanwhile.
        if self.read() != pid:
            return False
        os.unlink(self.fname)
        return True

    def _is_stale(self, pid: int) -> bool:
        state = proc.state(pid)
        if state in ("Z", "X") or pid == os.getpid():
            return True
        try:
            os.kill(pid, 0)
            return bool(state) and not is_master(pid)
        except ProcessLookupError:
            return False  # gunicorn replaces the file itself
        except PermissionError:
            # Another user's, perhaps hidden (hidepid): what belongs to this user was not written by that one.
            return os.stat(self.fname).st_uid == os.geteuid()

    def unlink(self) -> None:
        """Remove the file if it still names this process."""
        if self.read() == self.pid:
            try:
                os.unlink(self.fname)
            except OSError:
                pass
