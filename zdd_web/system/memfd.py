"""Memfds that other processes hold open: found by their name, and opened only if they are what the name says.

A process chooses its descriptors, and with a mount namespace of its own it chooses what their links read too. Behind
`/memfd:NAME` there may be a FIFO, whose open blocks, a FUSE file, where even `stat` blocks, or an O_PATH descriptor of
a file that only root can read. So a descriptor is pinned with O_PATH first, which calls no file system; what is asked
about it is asked of the pinned one, which cannot be exchanged in between; and it is opened only if it is on the
kernel's internal mount, where every memfd is, and where nothing blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterator

_LINK = "/memfd:"

#: How many descriptors of a process are looked at, in ascending order. A memfd that is made early has a low number.
MOST_DESCRIPTORS = 4096


class NotAMemfd(OSError):
    """A descriptor is not the memfd that its name promises."""


@contextlib.contextmanager
def process_directory(pid: int) -> Iterator[int]:
    """Hold a process's directory in /proc open: the pid may be reused meanwhile, the directory never is.

    Raises OSError when there is no such process.
    """
    directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


def named(pid: int, prefix: str) -> list[tuple[int, str]]:
    """Return the descriptors whose links read like a memfd with that prefix, each with the rest of its name.

    They are to be opened by `open_named()`, which looks again. Raises PermissionError when this user may not look, and
    OSError when there is no such process.
    """
    start = _LINK + prefix
    found = []
    descriptors = f"/proc/{pid}/fd"
    with os.scandir(descriptors) as entries:
        for entry in itertools.islice(entries, MOST_DESCRIPTORS):
            try:
                link = os.readlink(entry.path)
            except OSError:
                continue  # closed in between
            if link.startswith(start):
                found.append((int(entry.name), link[len(start) :].removesuffix(" (deleted)")))
    return found


def open_named(directory: int, number: int, prefix: str, access: int = os.O_RDONLY) -> int:
    """Open what a process has as descriptor `number`, if it is a memfd whose name begins with `prefix`.

    To read, unless `access` is another of os.O_RDONLY, O_WRONLY and O_RDWR.

    Raises `NotAMemfd` with what it is instead, and OSError when it is closed, or this user may not look.
    """
    pinned = os.open(f"fd/{number}", os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
    try:
        link = os.readlink(f"/proc/self/fd/{pinned}")
        if not link.startswith(_LINK + prefix):
            raise NotAMemfd(f"it is {link!r}, not a memfd named {prefix!r}")
        mount, device = _home_of_memfds()
        if mount and _mount(pinned) != mount:
            raise NotAMemfd("it has the name of a memfd and is a file of another file system")
        found = os.fstat(pinned)
        if not stat.S_ISREG(found.st_mode) or found.st_dev != device:
            raise NotAMemfd("it has the name of a memfd and is not one")
        return os.open(f"/proc/self/fd/{pinned}", access | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(pinned)


_home: tuple[str, int] | None = None


def _home_of_memfds() -> tuple[str, int]:
    """Return the id and the device of the kernel's internal mount; the id is "" where /proc does not tell."""
    global _home
    if _home is None:
        fd = os.memfd_create("zdd_web-sample", os.MFD_CLOEXEC)
        try:
            _home = _mount(fd), os.fstat(fd).st_dev
        finally:
            os.close(fd)
    return _home


def _mount(fd: int) -> str:
    try:
        info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(info, 512).partition(b"mnt_id:")[2].partition(b"\n")[0].strip().decode()
    finally:
        os.close(info)
