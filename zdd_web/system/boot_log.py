"""The boot log: what a new generation prints and logs until it is active, kept by the old one.

An operator whose upgrade failed wants the traceback where the command ran, not in a log somewhere. A broken
configuration file is only ever printed, to stderr; an app that does not load is logged.

Theory of operation
-------------------
Two things are handed to a successor that is forked:

- as its stderr the writer's end of a pipe (captured_output.py), which the predecessor drains from its tick into bounded
  memory. When the successor has its own stderr again it sends `speaks`, and the predecessor writes the kept end there;
- a memfd, `boot_log`, to which the successor's processes append what goes to gunicorn's error log from then on
  (`Handler`), each of them within `LIMIT_BYTES`. A successor that is not a child (a takeover) is sent only this.

`publish()` joins the two in the memfd when the upgrade has failed, and the successor is dead: `zdd-web upgrade` reads
it there. The stderr cannot be the memfd itself: a process whose stderr is a file can fill the memory of the host.

A process that the successor started before `speaks` (a helper of the configuration file) keeps the pipe as its stderr
for life. It must neither block nor get SIGPIPE while that release is in service. So the reader's end is inherited too
(`Inheritance.stderr_pipes`), and `StderrRelay` in each later master writes what comes there to its own stderr, until
the last such process is gone. The predecessor does so from `speaks` on, the successor once it is active or alone: a
pipe has no harm from two readers that write to the same place. It also keeps a successor whose predecessor was killed
from EPIPE: it may print as much as the pipe holds, before it comes to drain it itself. What a *rejected* successor
has left behind gets EPIPE.

With other versions: an older predecessor hands the memfd as stderr as well, and `give_back_stderr()` repeats what it
holds; from a newer one it is empty at that time. An older successor does not drain the pipe, and its helpers block when
it is full and the predecessor has gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Sequence

from zdd_web.system import stdio
from zdd_web.system.captured_output import DRAIN_BYTES, CapturedOutput, end_of, last_line

#: Commands open nothing else as a boot log.
MEMFD_NAME = "zdd_web-boot-log"
#: `zdd-web upgrade` shows the end of it.
TAIL_BYTES = 8_192
#: How much of gunicorn's error log the memfd holds before it begins anew, bytes: a boot loop must not fill the memory.
LIMIT_BYTES = 1 << 20
#: How much of one record, bytes: an exception may quote anything.
RECORD_BYTES = 65_536


def create() -> int:
    """Return the descriptor of an empty boot log."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
        # The offset is shared by all processes that inherit it, but only appending moves it and writes in one step.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
        return fd
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def tail(fd: int, size: int = TAIL_BYTES) -> str:
    """Return the end of a boot log, whole lines."""
    # One byte more, to tell whether there is more.
    length = os.fstat(fd).st_size
    return end_of(os.pread(fd, size + 1, max(0, length - size - 1)), size).decode("utf-8", "replace")


class BootLog:
    """The predecessor's side: the memfd, and the stderr of a successor that is forked."""

    def __init__(self) -> None:
        """Raises OSError."""
        self.fd = create()
        try:
            self.output = CapturedOutput()
        except OSError:
            os.close(self.fd)
            raise
        self._spoke = False

    @property
    def spoke(self) -> bool:
        """Whether the successor has its own stderr again."""
        return self._spoke

    def drain(self) -> None:
        """Keep the end of what the successor has printed; what comes after `speaks` goes to this process's stderr."""
        if self._spoke and self.output.reader >= 0:
            _pass_on(self.output.reader)
        else:
            self.output.drain()

    def speaks(self) -> None:
        """The successor has its own stderr: write there what it printed before, which is this process's too."""
        if not self._spoke:
            self.output.drain_all()
            self._spoke = True
            _write_to_stderr(self.output.text().encode(errors="replace"))

    def text(self, size: int = TAIL_BYTES) -> str:
        """Return the end of all that the successor has printed and logged."""
        logged = tail(self.fd, size)
        if self.output.reader < 0:  # published, or there never was a pipe
            return logged
        if not self._spoke:
            self.output.drain_all()
        return end_of(f"{self.output.text()}{logged}".encode(errors="replace"), size).decode("utf-8", "replace")

    def last_line(self) -> str:
        """Return the last line that holds anything: of a release that does not start, the reason."""
        return last_line(self.text())

    def publish(self) -> None:
        """Write all of it to the memfd, for the commands, and close the pipe; for a successor that is dead."""
        if self.output.reader >= 0:
            whole = self.text(2 * RECORD_BYTES).encode(errors="replace")
            self.output.close()
            os.ftruncate(self.fd, 0)
            os.write(self.fd, whole)

    def close(self) -> None:
        """Close the memfd and the pipe."""
        self.output.close()
        os.close(self.fd)


class StderrRelay:
    """The pipes that processes of this master, or of earlier ones, still have as their stderr."""

    def __init__(self, pipes: Sequence[int]) -> None:
        self.pipes = list(pipes)
        #: Whether something came at the last look: there may be more.
        self.busy = False

    def follow(self) -> None:
        """Write to stderr what has come, and close the pipes that have no writer any more; the tick's call."""
        self.busy = False
        for pipe in list(self.pipes):
            count, ended = _pass_on(pipe)
            self.busy = self.busy or count > 0
            if ended:
                self.pipes.remove(pipe)
                os.close(pipe)

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        for pipe in self.pipes:
            os.close(pipe)
        self.pipes = []


def _pass_on(pipe: int) -> tuple[int, bool]:
    """Write what a pipe has to stderr; return how many bytes, and whether it has no writer any more."""
    count = 0
    while count < DRAIN_BYTES:
        try:
            data = os.read(pipe, RECORD_BYTES)
        except BlockingIOError:
            return count, False
        if not data:
            return count, True
        count += len(data)
        _write_to_stderr(data)
    return count, False


def _write_to_stderr(data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


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
        """Append the end of a text and a line's end."""
        if os.fstat(self.fd).st_size > LIMIT_BYTES:
            # The end is what tells why: begin anew rather than stop.
            os.ftruncate(self.fd, 0)
        os.write(self.fd, f"{text}\n".encode(errors="replace")[-RECORD_BYTES:])

    def end(self) -> None:
        """Copy no more, and close this process's descriptor of the boot log."""
        logging.getLogger("gunicorn.error").removeHandler(self)
        os.close(self.fd)
        # Another file may get its number, and something may still hold this handler.
        self.fd = -1


def give_back_stderr(stderr: int, boot_log: int) -> None:
    """Make descriptor 2 the real stderr again, and repeat there what an older predecessor has kept in the memfd."""
    os.dup2(stderr, 2)
    os.close(stderr)
    said = tail(boot_log, LIMIT_BYTES)
    if said:
        stdio.write_stderr(said)
