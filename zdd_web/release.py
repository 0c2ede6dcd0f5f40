"""Which code a generation runs: the setting `RELEASE`, or else what its directory tells.

`RELEASE` is a version or a build number that a deploy puts into the environment. Where it is not set the release is the
directory that the code is in, without symlinks, and the git commit that is checked out there. git itself is not run: it
may not be installed, it refuses a directory of another user (`safe.directory`), and a repository's configuration can
name programs, which a master that is root must not start. The commit stands in three small files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

#: Of a file in `.git`; a longer one is not what it should be. packed-refs has a line for each branch and tag.
MOST_BYTES, MOST_PACKED = 4096, 1 << 20

#: How much of a commit is shown: what git itself takes for enough in a large repository.
COMMIT_DIGITS = 12

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_REF = re.compile(r"refs/(?!.*(?:\.\.|//))[^\x00-\x20\x7f]+\Z")

#: Takes a path and a number of bytes; returns that much of the beginning of the file as text, "" if it does not exist.
Read = Callable[[str, int], str]


def label(setting: str, directory: str, commit: str) -> str:
    """Return what a release is called.

    >>> label("", "/srv/shop/releases/7", "3f2a1b9c4d5e6f708192a3b4c5d6e7f801234567")
    '/srv/shop/releases/7@3f2a1b9c4d5e'
    >>> label("2026.11.3", "/srv/shop/releases/7", "")
    '2026.11.3'
    """
    return setting or (f"{directory}@{commit[:COMMIT_DIGITS]}" if commit else directory)


def short(text: str) -> str:
    """Return a release as it fits a column: of a directory its last name.

    >>> short("/srv/shop/releases/7@3f2a1b9c4d5e"), short("2026.11.3")
    ('7@3f2a1b9', '2026.11.3')
    """
    if not text.startswith("/"):
        return text
    directory, at, commit = text.rpartition("@") if re.search(r"@[0-9a-f]{12}\Z", text) else (text, "", "")
    return (directory.rstrip("/").rpartition("/")[2] or "/") + at + commit[:7]


def commit_of(directory: str, read: Read | None = None) -> str:
    """Return the commit that is checked out in a directory, or in the one above it; "" when none is found.

    `REVISION`, which Capistrano writes into releases that have no `.git`, counts too. Directories further up are not
    looked at: they may be a repository of something else, such as a user's home.
    """
    read = read or read_file
    for place in (directory, os.path.dirname(directory)):
        found = _checked_out(place, read) or _hash(read(f"{place}/REVISION", MOST_BYTES))
        if found:
            return found
    return ""


def _checked_out(place: str, read: Read) -> str:
    git = f"{place}/.git"
    # In a worktree and in a submodule it is a file that says where the directory is.
    link = read(git, MOST_BYTES)
    if link.startswith("gitdir: "):
        git = os.path.join(place, link.removeprefix("gitdir: ").strip())
    head = read(f"{git}/HEAD", MOST_BYTES).strip()
    if not head.startswith("ref: "):
        return _hash(head)
    ref = head.removeprefix("ref: ").strip()
    if not _REF.match(ref):
        return ""
    # A worktree has a HEAD of its own, and shares the branches with the others.
    common = read(f"{git}/commondir", MOST_BYTES).strip()
    for home in (git, os.path.join(git, common) if common else ""):
        found = home and (
            _hash(read(f"{home}/{ref}", MOST_BYTES)) or _packed(read(f"{home}/packed-refs", MOST_PACKED), ref)
        )
        if found:
            return found
    return ""


def _hash(text: str) -> str:
    text = text.strip()
    return text if _COMMIT.match(text) else ""


def _packed(text: str, ref: str) -> str:
    for line in text.splitlines():
        commit, _, name = line.partition(" ")
        if name == ref:
            return _hash(commit)
    return ""


def read_file(path: str, most: int) -> str:
    """Return the beginning of a regular file, "" when there is none that this process may read."""
    try:
        # Not waited for, if it is a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.read(fd, most).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
