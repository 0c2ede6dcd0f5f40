"""The standard streams of a process that may have lost them: a closed pipe or terminal, a full disk, no stream at all.

What is written there is lost then, and nothing else happens.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

STDERR = 2


def fill_closed_descriptors() -> None:
    """Open /dev/null in place of each standard descriptor that is closed.

    Otherwise the next file or socket of this process gets its number, and whatever is printed is written into that.
    """
    for fd in (0, 1, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                nothing = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which may be this one
                os.dup2(nothing, fd)
                if nothing != fd:
                    os.close(nothing)
                os.set_inheritable(fd, True)


def duplicate_stderr() -> int:
    """Return another descriptor of stderr, or of /dev/null where it has been closed."""
    try:
        return os.dup(STDERR)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def write_stderr(text: str) -> None:
    """Write a text to descriptor 2, past Python's stream, as far as that is possible."""
    data = text.encode("utf-8", "backslashreplace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(STDERR, data) :]


def print_error(text: str) -> None:
    """Write a line to stderr, as far as that is possible; past Python's stream where there is none."""
    if sys.stderr is None:
        write_stderr(f"{text}\n")
    else:
        stream = TolerantStream(sys.stderr)
        stream.write(f"{text}\n")
        stream.flush()


def flush_streams() -> None:
    """Flush Python's streams before the process ends: one that cannot be would make its exit status 120."""
    for stream in (sys.stdout, sys.stderr):
        TolerantStream(stream).flush()


class TolerantStream:
    """A text stream whose writes never raise OSError; `lost` is the first one. None stands for no stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        self._attempt("write", text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts, if that is possible."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._attempt("flush")

    def isatty(self) -> bool:
        """Tell whether a person may be reading."""
        return self._stream is not None and bool(self._stream.isatty())

    def _attempt(self, method: str, *arguments: str) -> None:
        if self._stream is None or self.lost is not None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except OSError as error:
            self.lost = error
            self._discard()
        except (ValueError, AttributeError):  # closed, as a Python object; an object of the app's that cannot do this
            self._stream = None

    def _discard(self) -> None:
        # What is left in its buffer would fail again when Python ends.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
