"""What a launch says by the path of the release it was started from, moved to the release that is current now.

A symlink (`current`) that is followed needs none of this. But launchers resolve it: a virtualenv's scripts name their
interpreter by its real path, and so agents (`newrelic-admin run-program`, `ddtrace-run`, `opentelemetry-instrument`)
put that of the old release into PYTHONPATH and variables of their own. In the next generation they would be of the old
release, or silently off, since they compare it with the interpreter's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence

#: Of the shell's, and no setting of anything: PWD is the launch's own directory.
NOT_MOVED = ("PWD", "OLDPWD", "_")

#: What ends a path in a value, beside its end: of a list of paths, of options, of words.
_ENDS = r":;,=\s\"'"


def roots(old: str, new: str) -> tuple[str, str]:
    """Return the directories of two releases, from the same place in each: what they have in common at the end is cut.

    >>> roots("/srv/releases/1/app", "/srv/releases/2/app")
    ('/srv/releases/1', '/srv/releases/2')
    """
    before, after = old.rstrip("/").split("/"), new.rstrip("/").split("/")
    while len(before) > 2 and len(after) > 2 and before[-1] == after[-1]:
        before.pop()
        after.pop()
    return "/".join(before), "/".join(after)


def move(text: str, old: str, new: str, exists: Callable[[str], bool] = os.path.lexists) -> tuple[str, bool]:
    """Return a value with the paths of the old release moved, and whether there is one that the new release lacks.

    >>> move("/srv/1/lib:/usr/lib", "/srv/1", "/srv/2", lambda path: True)
    ('/srv/2/lib:/usr/lib', False)
    >>> move("/srv/1/lib:/srv/10", "/srv/1", "/srv/2", lambda path: False)
    ('/srv/1/lib:/srv/10', True)
    """
    lacking = False

    def moved(match: re.Match[str]) -> str:
        nonlocal lacking
        path = new + match[0][len(old) :]
        if exists(path):
            return path
        lacking = True
        return match[0]

    return re.sub(rf"(?<![^{_ENDS}]){re.escape(old)}(?:/[^{_ENDS}]*)?(?![^{_ENDS}])", moved, text), lacking


def move_environ(
    environ: Mapping[str, str], old: str, new: str, exists: Callable[[str], bool] = os.path.lexists
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return an environment with the paths of the old release moved, and the names of variables that keep one."""
    moved, left = dict(environ), []
    for name, value in environ.items():
        if old in value and name not in NOT_MOVED:
            moved[name], lacking = move(value, old, new, exists)
            if lacking:
                left.append(name)
    return moved, tuple(sorted(left))


def move_words(words: Sequence[str], old: str, new: str) -> tuple[str, ...]:
    """Return a command line with the paths of the old release moved."""
    return tuple(move(word, old, new)[0] if old in word else word for word in words)
