"""Which releases a generation can go back to, and how each of them was started.

A *release* is a directory of its own: `named` is the path by which the service reaches it (`/srv/shop/current`), `real`
is where that led when the generation was started (`/srv/shop/releases/7`). To start it again once `current` leads
elsewhere, every word and variable that names one of the two is made to name `real`.

The earlier releases are a stack: a deploy puts the release that served on it, a rollback takes one off. So a second
rollback goes further back, and never to the release that the first one has left.

A generation that was started from a named release (`upgrade --to`, `rollback`) does not follow the symlink; it keeps,
as `configured`, the launch that does, for the next upgrade. Environments may hold secrets: a lineage is handed to the
next generation in a memfd of its own, which both close at once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff import release_paths
from zdd_web.gunicorn.handoff.launch import Launch

#: How many earlier releases are kept: each has an environment, and deploys keep about as many directories.
MOST_EARLIER = 5

#: Of an environment the kernel takes at most a quarter of the stack's limit, 2 MB by default; escaped by JSON.
MOST_BYTES = 1 << 24


class Release(NamedTuple):
    """A release, and the launch of a generation of it; see the module's text."""

    launch: Launch
    named: str
    real: str
    #: What `status` calls it.
    label: str = ""
    #: The program, by a path whose directory has no symlinks: `venv` may be one too, and lead elsewhere by now.
    program: str = ""
    #: The variables that ENV_FILE had given it: an upgrade takes out those that the file does not have any more.
    from_env_file: tuple[str, ...] = ()

    def started_from(self, directory: str) -> Launch:
        """Return the launch moved to another directory, which holds a release as `real` does."""
        launch = self.launch
        inside = _below(launch.directory, self.named)
        where = directory + inside if inside is not None else launch.directory
        relative = os.path.relpath(self.named, launch.directory) if os.path.isabs(self.named) else ""
        command = tuple(self._word(word, directory, relative) for word in launch.command)
        environ, left = launch.environ, set(launch.left)
        for old in dict.fromkeys((self.named, self.real)):
            environ, lacking = release_paths.move_environ(environ, old, directory)
            left.update(lacking)
        if "PWD" in environ:
            environ = {**environ, "PWD": where}
        # What it names now it names in any release, by a path of `named` or `real` that the other one lacks.
        return launch._replace(
            directory=where, command=command, environ=environ, real_directory=os.path.realpath(where),
            left=tuple(sorted(left)),
        )  # fmt: skip

    def as_it_was(self) -> Launch:
        """Return the launch that starts this very release again, wherever `named` leads now."""
        launch = self.started_from(self.real)
        program = self.program if os.path.isfile(self.program) else launch.command[0]
        return launch._replace(command=(program, *launch.command[1:]))

    def _word(self, word: str, directory: str, relative: str) -> str:
        option, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
        for old in (self.named, self.real, *([relative] if relative and not relative.startswith(".") else ())):
            inside = _below(path, old)
            if inside is not None:
                return f"{option}{equals}{directory}{inside}"
        return word


def _below(path: str, directory: str) -> str | None:
    """Return the rest of a path below a directory, "" for the directory itself, None for any other path.

    >>> _below("/srv/current/venv", "/srv/current"), _below("/srv/currently", "/srv/current")
    ('/venv', None)
    """
    if path.rstrip("/") == directory:
        return ""
    return path[len(directory) :] if directory != "/" and path.startswith(f"{directory}/") else None


def find(launch: Launch, chdir: str, label: str = "", realpath: Callable[[str], str] = os.path.realpath) -> Release:
    """Return the release that a generation runs; `chdir` is where its code is, gunicorn's setting.

    The directory that it was started in, or one below it that `--chdir` names, whichever is reached by a symlink.
    """
    real = realpath(chdir)
    inside = _below(real, launch.real_directory)
    if inside is not None and launch.directory != launch.real_directory:
        named, real = launch.directory, launch.real_directory
    elif chdir != real:
        named, real = release_paths.roots(chdir, real)
    else:
        named = real
    program = launch.command[0]
    found = shutil.which(os.path.join(launch.directory, program) if os.sep in program else program)
    # Its directory alone: the interpreter of a virtualenv is a symlink by which it knows that it is one.
    where = os.path.join(realpath(os.path.dirname(found)), os.path.basename(found)) if found else ""
    return Release(launch, named, real, label, where)


class Lineage(NamedTuple):
    """What a generation knows of the releases before its own; the oldest first."""

    earlier: tuple[Release, ...] = ()
    #: How an upgrade is started when nothing else is asked for, if not as this generation was.
    configured: Release | None = None

    def previous(self, own: Release) -> Release:
        """Return the release that served before. Raises `UpgradeError` when there is none, or it is gone."""
        found = next((each for each in reversed(self.earlier) if each.real != own.real), None)
        if found is None:
            raise UpgradeError(
                f"no other release has served since this service was started: each generation ran in {own.real}, "
                f"which a deploy changes in place: put the earlier code there, and use an upgrade"
            )
        if not os.path.isdir(found.real):
            raise UpgradeError(
                f"the release that served before is gone: {found.real}: restore it, or name another one with "
                f"`zdd-web upgrade --to DIR`"
            )
        return found

    def after_deploy(self, own: Release, to: str, *, follows: bool) -> Lineage:
        """Return the lineage of the next generation, in the directory `to`; `follows` the symlink, or does not."""
        configured = None if follows else self.configured or own
        if to == own.real:
            return self._replace(configured=configured)
        others = tuple(each for each in self.earlier if each.real not in (own.real, to))
        return Lineage((*others, own)[-MOST_EARLIER:], configured)

    def after_rollback(self, own: Release, back: Release) -> Lineage:
        """Return the lineage of the next generation, which is of the release `back`."""
        return Lineage(self.earlier[: self.earlier.index(back)], self.configured or own)

    def encode(self) -> bytes:
        """Return it as it is handed on."""
        configured = None if self.configured is None else _plain(self.configured)
        return json.dumps({"earlier": [_plain(each) for each in self.earlier], "configured": configured}).encode()

    @classmethod
    def decode(cls, text: bytes) -> Lineage:
        """Read what was handed on. Raises ValueError, TypeError or KeyError for what is not a lineage.

        >>> Lineage.decode(Lineage().encode()) == Lineage()
        True
        """
        fields = json.loads(text)
        configured = fields["configured"]
        earlier = tuple(_release(each) for each in fields["earlier"])
        return cls(earlier[-MOST_EARLIER:], None if configured is None else _release(configured))


def _plain(release: Release) -> dict[str, Any]:
    return {**release._asdict(), "launch": release.launch._asdict()}


def _release(fields: dict[str, Any]) -> Release:
    launch = fields["launch"]
    for name in ("command", "descriptors", "left"):
        launch[name] = tuple(launch[name])
    found = _known(Release, fields)
    variables = tuple(found.get("from_env_file", ()))
    return Release(**{**found, "launch": Launch(**_known(Launch, launch)), "from_env_file": variables})


def _known(kind: type[Release] | type[Launch], fields: dict[str, Any]) -> dict[str, Any]:
    # Another version may have more.
    return {name: fields[name] for name in kind._fields if name in fields}
