"""Two releases of the app as a deploy by symlink lays them out: `releases/a`, `releases/b`, and `current`.

    current -> releases/a
    releases/a/gunicorn.conf.py     a copy
    releases/a/shop -> the app's    a link, as all else

Both have the code that is rehearsed. A copy of everything could be gigabytes, and would have another SQLite file. The
configuration alone is copied, and the directories that lead to it and to `chdir` are real: a link would lead out of the
release, as with `chdir = Path(__file__).resolve().parent`.

Not in the rehearsal's own directory, which no other user may enter: workers may be another user's (`user` in gunicorn's
settings), and import the app from here.
"""

from __future__ import annotations

import os
import shutil
import tempfile


class Releases:
    """The layout; a context manager that removes it. `inner` is the configuration's path below a release, or ""."""

    def __init__(self, app: str, configuration: str, chdir: str = "") -> None:
        """Lay out `app`, the app's directory, with its configuration file and gunicorn's `chdir`.

        The last two are not copied where they are outside of the first. Raises OSError.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="zdd-web-releases-")
        # As the kernel names a process's working directory, whatever $TMPDIR is a link to.
        base = os.path.realpath(self._directory.name)
        self.current = os.path.join(base, "current")
        self.a, self.b = (os.path.join(base, "releases", name) for name in ("a", "b"))
        self.inner = _below(configuration, app)
        real = _above(os.path.dirname(self.inner)) | _above(_below(os.path.join(app, chdir), app))
        try:
            os.chmod(base, 0o755)  # noqa: S103 - it holds what the app's own directory shows
            os.mkdir(os.path.join(base, "releases"), 0o755)
            for release in (self.a, self.b):
                _mirror(app, release, real, self.inner)
            os.symlink(self.a, self.current)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove everything; of the app's own files only links to them."""
        self._directory.cleanup()


def _below(path: str, directory: str) -> str:
    """Return a path relative to a directory that it is in, and "" for any other.

    >>> _below("/srv/shop/deploy/conf.py", "/srv/shop"), _below("/etc/conf.py", "/srv/shop")
    ('deploy/conf.py', '')
    """
    found = os.path.relpath(path, directory)
    return "" if found == os.curdir or found.split(os.sep)[0] == os.pardir else found


def _above(path: str) -> set[str]:
    """Return a relative path and all that lead to it.

    >>> sorted(_above("deploy/production")), _above("")
    (['deploy', 'deploy/production'], set())
    """
    found = set()
    while path:
        found.add(path)
        path = os.path.dirname(path)
    return found


def _mirror(source: str, target: str, real: set[str], copied: str, inside: str = "") -> None:
    """Make a directory with a link to each entry of another one, but `real` directories and a copy of one file.

    Both are paths below the outermost `source`, and `inside` is where this call is in it.
    """
    os.mkdir(target, 0o755)
    for name in os.listdir(source):
        here, there, path = os.path.join(source, name), os.path.join(target, name), os.path.join(inside, name)
        if path in real:
            _mirror(here, there, real, copied, path)
        elif path == copied:
            shutil.copy2(here, there)
        # A release compiles its own: it would write through the link, with its own paths in them.
        elif name != "__pycache__":
            os.symlink(os.path.abspath(here), there)
