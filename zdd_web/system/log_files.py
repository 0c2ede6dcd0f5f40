"""The files behind this process's loggers: which there are, whether they were rotated, and what if one is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterable


def loggers() -> list[logging.Logger]:
    """Return every standard logger that there is."""
    # A copy: threads make loggers meanwhile.
    known = list(logging.root.manager.loggerDict.values())
    return [logging.root, *(each for each in known if isinstance(each, logging.Logger))]


def opened() -> list[logging.FileHandler]:
    """Return the handlers that have a file open; one with `delay` opens it at its first record."""
    handlers = {id(each): each for logger in loggers() for each in logger.handlers}
    return [each for each in handlers.values() if isinstance(each, logging.FileHandler) and each.stream is not None]


def were_renamed() -> bool:
    """Tell whether a file that is written to is not the one of its name any more.

    A process that is forked while logs are rotated has no handler for the signal that tells the others.
    """
    for handler in opened():
        with contextlib.suppress(OSError, ValueError):
            written = os.fstat(handler.stream.fileno())  # type: ignore[union-attr]
            try:
                named = os.stat(handler.baseFilename)
            except FileNotFoundError:
                return True
            if (written.st_dev, written.st_ino) != (named.st_dev, named.st_ino):
                return True
    return False


def discard_failed(before: Iterable[logging.FileHandler]) -> None:
    """Have those handlers that had a file before, and have none now, write to /dev/null until the next attempt.

    Left as it is, such a handler tries to open its file at each record, and raises out of the call that logs.
    """
    for handler in before:
        if handler.stream is None:
            handler.stream = open(os.devnull, "a")  # noqa: SIM115 - stays open


def descriptors() -> set[int]:
    """Return the descriptors of files with a name that are open for nothing but writing: what a logger may write to."""
    import fcntl  # which Windows does not have; apps that run there without gunicorn import this module

    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd = int(entry)
            status = os.fstat(fd)
            is_file = stat.S_ISREG(status.st_mode) and status.st_nlink > 0
            if is_file and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                found.add(fd)
    return found
