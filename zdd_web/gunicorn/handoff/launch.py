"""How this master was started, so that its successor can be started the same way.

Recorded when `install()` first runs: later gunicorn changes the directory (`--chdir`), and `GUNICORN_*` and its own
variables get into the environment.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.handoff import release_paths
from zdd_web.system import descriptors

#: Said to one process by its parent and meant for it alone.
ONCE = ("GUNICORN_PID", "GUNICORN_FD", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SERVER_SOFTWARE")


class Launch(NamedTuple):
    """A command line, the directory it was given in, its environment, and the descriptors that were inherited."""

    directory: str
    command: tuple[str, ...]
    environ: dict[str, str]
    #: Those that the first master was started with: a lock of flock(1), a readiness pipe of s6. The configuration file
    #: ran before, and what it has opened cannot be told from these, so this is recorded once and handed down:
    #: otherwise each generation would add what its own file opens.
    descriptors: tuple[int, ...] = ()
    #: The directory without symlinks, as it was at the start: it tells which release this is.
    real_directory: str = ""
    #: Names of variables that keep paths of the old release, which the new one lacks.
    left: tuple[str, ...] = ()

    @classmethod
    def record(cls, inherited: tuple[int, ...] | None = None) -> Launch:
        """Record how this process was started; `inherited` are the descriptors that its predecessor had recorded."""
        environ = {key: value for key, value in os.environ.items() if key not in ONCE}
        again = command(sys.orig_argv, sys.executable)
        opened = descriptors.inheritable() if inherited is None else inherited
        return cls(
            directory=_directory(again[0]), command=again, environ=environ, descriptors=opened,
            real_directory=os.getcwd(),
        )  # fmt: skip

    def following(self, release_dir: str) -> Launch:
        """Return this launch moved to `release_dir`, for launchers that resolve the symlink they were started by.

        Words of the command line that lie below the old directory are moved with it.
        """
        if not release_dir:
            return self._following_the_symlink()
        old = self.directory.rstrip("/")

        def moved(word: str) -> str:
            option, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
            if path != old and not path.startswith(f"{old}/"):
                return word
            return f"{option}{equals}{release_dir}{path[len(old) :]}"

        environ = {**self.environ, "PWD": release_dir} if "PWD" in self.environ else self.environ
        command = tuple(moved(word) for word in self.command)
        # Words as they were written; the environment by what is there, since each of its values was not asked for.
        environ, left = release_paths.move_environ(environ, old, release_dir)
        there = self._replace(directory=release_dir, command=command, environ=environ, left=left)
        return there._following_the_symlink()

    def _following_the_symlink(self) -> Launch:
        """Move what names the old release by its real path, if the directory is reached by a symlink that was flipped.

        Command and environment alike: an interpreter of one release finds nothing in the directories of another.
        """
        now = os.path.realpath(self.directory)
        if not self.real_directory or now == self.real_directory or not os.path.isdir(now):
            return self
        old, new = release_paths.roots(self.real_directory, now)
        if old.count("/") < 2:
            return self  # not a release, but a directory such as /srv
        environ, left = release_paths.move_environ(self.environ, old, new)
        command = release_paths.move_words(self.command, old, new)
        return self._replace(command=command, environ=environ, left=tuple(sorted({*self.left, *left})))

    def refreshed(self, before: dict[str, str], now: dict[str, str]) -> Launch:
        """Return this launch with the variables of an environment file as they are now; those taken out are gone."""
        environ = {key: value for key, value in self.environ.items() if key not in before}
        left = tuple(name for name in self.left if name not in before and name not in now)
        return self._replace(environ={**environ, **now}, left=left)

    def obstacle(self) -> str | None:
        """Say what keeps this command from being run again; None when nothing does."""
        if not os.path.isdir(self.directory):
            return f"the directory it is started in is gone: {self.directory}"
        program = self.command[0]
        found = shutil.which(os.path.join(self.directory, program) if os.sep in program else program)
        if found is None:
            return f"the program is gone or not executable: {program}"
        return None


def read_env_file(path: str) -> dict[str, str]:
    """Read `KEY=VALUE` lines as a shell or systemd would: quotes, `#` comments, an optional `export`.

    Raises `SettingsError` with the number of the line that is none, and never with its text: it may hold a password.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise SettingsError(f"ENV_FILE = {path!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"ENV_FILE = {path!r}: no UTF-8 text at byte {error.start}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, value, problem = _assignment(text)
        if problem:
            named = f" after {key}=" if key.isidentifier() else ""
            raise SettingsError(
                f"{path}, line {number}: {problem}{named}: must be KEY=VALUE, with quotes around spaces"
            )
        found[key] = value
    return found


def _assignment(text: str) -> tuple[str, str, str]:
    """Return key, value and what is wrong with them."""
    # Not shlex's own comments: it takes a `#` for one in the middle of a word, as in a password, too.
    stream = io.StringIO(text.removeprefix("export "))
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        word = lexer.get_token() or ""
    except ValueError as error:
        return text.partition("=")[0], "", str(error).lower()
    key, equals, value = word.partition("=")
    if not equals or not key.isidentifier():
        return key, value, "no name before a '='"
    rest = stream.read().strip()
    return key, value, "more words" if rest and not rest.startswith("#") else ""


def _directory(program: str) -> str:
    """Return the current directory by the name that a flipped symlink (`current`) changes, if anything tells it."""
    # The shell's view keeps a symlink that the kernel's has resolved; it counts only while it is true. systemd sets no
    # PWD: there the program tells, as in ExecStart=/srv/current/venv/bin/gunicorn in WorkingDirectory=/srv/current.
    for name in (os.environ.get("PWD", ""), *_above(program)):
        try:
            if os.path.isabs(name) and os.path.samefile(name, os.curdir):
                return name
        except OSError:
            continue
    return os.getcwd()


def _above(path: str) -> list[str]:
    found = []
    while os.path.isabs(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
        found.append(path)
    return found


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
    if not first.startswith(b"#!"):
        return False
    try:
        words = shlex.split(os.fsdecode(line.removeprefix(b"#!")))
    except ValueError:
        return False
    # The second word where the first is `env` or `exec`.
    return interpreter in words[:2]
