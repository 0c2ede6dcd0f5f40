"""What another process prints, kept in bounded memory: the last 64 KiB of it.

Theory of operation
-------------------
The other process writes to a pipe; its reader drains the pipe from a loop of its own, and keeps the end of what came.
A writer that is faster than the reader waits in `write()`, so neither side needs more than the pipe and the kept end,
however much is printed. The alternatives for a file descriptor 2 that is handed to arbitrary code:

- a memfd or a file grows without limit (1.2 GB in 1.4 s, charged to the reader's cgroup);
- a memfd sealed against growth, or RLIMIT_FSIZE, makes the writer fail: `print()` raises in the app;
- a memfd whose old pages the reader frees is bounded only while the reader runs often enough;
- a thread or a process that drains has to be kept out of every later fork, and reaped.

Only the reader's end is non-blocking. O_NONBLOCK belongs to the open file description, and the ends of a pipe have one
each: a writer never sees EAGAIN. It gets EPIPE only when no process holds the reader's end any more, which matters to
processes that inherited the writer's end and outlive the one that was captured (see boot_log.py).

The end of the pipe's data is never waited for: such processes may keep it open for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

#: How much of the end is kept, bytes.
KEPT_BYTES = 65_536

#: How much the pipe itself may hold, bytes: what can be printed while the reader does not run. Linux's default limit
#: for unprivileged processes; its pages are allocated when they are written.
PIPE_BYTES = 1 << 20

#: How much is read at a time, bytes. A writer without end must not hold up the reader's loop: 50 MB/s at 50 turns/s.
DRAIN_BYTES = 1 << 20


class CapturedOutput:
    """The pipe and the kept end.

    >>> output = CapturedOutput()
    >>> count = os.write(output.writer, b"Traceback ...\\nImportError: no module named shop\\n")
    >>> output.drain()
    48
    >>> last_line(output.text())
    'ImportError: no module named shop'
    >>> output.close()
    """

    def __init__(self) -> None:
        """Make the pipe; neither end is inherited over exec. Raises OSError."""
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: a smaller one works too
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._kept = bytearray()
        self._dropped = 0

    def close_writer(self) -> None:
        """Close this process's copy of the writer's end, once the other process has its own."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def drain(self, limit: int = DRAIN_BYTES) -> int:
        """Read what is there, at most about `limit` bytes; return how many came. Never blocks."""
        count = 0
        while count < limit and (data := read_now(self.reader)):
            count += len(data)
            self._kept += data
            if len(self._kept) > KEPT_BYTES:
                self._dropped += len(self._kept) - KEPT_BYTES
                del self._kept[:-KEPT_BYTES]
        return count

    def drain_all(self) -> None:
        """Read all that a process that has ended, or writes no more, can have left in the pipe. Never blocks."""
        # Others may go on writing: not until it is empty.
        self.drain(2 * PIPE_BYTES)

    def text(self, size: int = KEPT_BYTES) -> str:
        """Return the last `size` bytes that are kept; whole lines behind a note where there was more."""
        # Where something was dropped the first line may have lost its beginning.
        kept = end_of(bytes(self._kept), min(size, len(self._kept) - bool(self._dropped)))
        dropped = self._dropped + len(self._kept) - len(kept)
        note = f"[zdd_web: {dropped} bytes before this are not shown]\n" if dropped else ""
        return note + kept.decode("utf-8", "replace")

    def close(self) -> None:
        """Close this process's descriptors. Idempotent."""
        self.close_writer()
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1


def end_of(data: bytes, size: int) -> bytes:
    """Return the end of a text, whole lines of it as far as that is possible.

    >>> end_of(b"first\\nsecond\\nthird\\n", 10)
    b'third\\n'
    """
    if len(data) <= size:
        return data
    data = data[-size:] if size > 0 else b""
    return data.partition(b"\n")[2] if b"\n" in data[:-1] else data


def read_now(fd: int) -> bytes:
    """Return what a non-blocking descriptor has; b"" for nothing, at the end too, and for a descriptor that is -1."""
    if fd < 0:
        return b""
    try:
        return os.read(fd, KEPT_BYTES)
    except BlockingIOError:
        return b""


def last_line(text: str) -> str:
    """Return the last line that holds anything; "" when there is none.

    >>> last_line("Traceback ...\\nImportError: no module named shop\\n\\n")
    'ImportError: no module named shop'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
