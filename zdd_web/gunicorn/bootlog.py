"""The boot log: what a new generation says until it serves, kept by the old one.

An operator whose upgrade failed wants the traceback where the command ran, not in a log somewhere. A memfd of the old
master is handed down. Until `install()` runs it is the new master's stderr (a broken configuration file is only ever
printed there); from then on a handler on gunicorn's error log writes to it as well, until the gate opens.
"""

from __future__ import annotations

import fcntl
import logging
import os

from zdd_web.system import stdio

#: Commands open nothing else as a boot log.
MEMFD_NAME = "zdd_web-boot-log"
#: `zdd-web upgrade` shows the end of it.
TAIL_BYTES = 8_192
#: A worker in a boot loop must not fill the memory.
LIMIT_BYTES = 1 << 20


def create() -> int:
    """Return the descriptor of an empty boot log."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
        # The offset is shared by all who inherit it, but only appending moves it and writes in one step.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
        return fd
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def tail(fd: int, size: int = TAIL_BYTES) -> str:
    """Return the end of a boot log, whole lines."""
    length = os.fstat(fd).st_size
    data = os.pread(fd, size, max(0, length - size))
    if length > size and b"\n" in data[:-1]:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


class Handler(logging.Handler):
    """Copies gunicorn's error log to a boot log."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd
        self.setFormatter(logging.Formatter("[%(process)d] [%(levelname)s] %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record; one that cannot be formatted is left to gunicorn's own handlers to complain about."""
        try:
            self.write(self.format(record))
        except Exception:
            pass

    def write(self, text: str) -> None:
        """Append a text and a line's end."""
        if os.fstat(self.fd).st_size < LIMIT_BYTES:
            os.write(self.fd, f"{text}\n".encode(errors="replace"))

    def end(self) -> None:
        """Copy no more, and close this process's descriptor of the boot log."""
        logging.getLogger("gunicorn.error").removeHandler(self)
        os.close(self.fd)
        # Another file may get its number, and something may still hold this handler.
        self.fd = -1


def last_line(fd: int) -> str:
    """Return the last line of a boot log that holds anything; "" when there is none.

    >>> fd = create()
    >>> count = os.write(fd, b"Traceback ...\\nImportError: no module named shop\\n\\n")
    >>> last_line(fd)
    'ImportError: no module named shop'
    >>> os.close(fd)
    """
    lines = [line.strip() for line in tail(fd).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def give_back_stderr(stderr: int, boot_log: int) -> None:
    """Make descriptor 2 the real stderr again, and say there what was said meanwhile."""
    os.dup2(stderr, 2)
    os.close(stderr)
    said = tail(boot_log, LIMIT_BYTES)
    if said:
        stdio.write_stderr(said)
