"""Which processes are masters with a board, and which of them a command believes.

Every user can make a memfd with the name of a board and write anything into it. A process counts as a master if

- it is this user's. Root looks at every user's processes; service.py never joins those of two users to one service.
- its memfd was made by the user that the process runs as, and it runs as one user only. The kernel knows who made a
  memfd. Without this, a memfd that is passed to a daemon, or inherited by a setuid program, would speak for root.
- the memfd is one (system/memfd.py), and what it says of its size can be true (`board.shape`).
- it names this process as its master. A worker has its master's board, and a master its successor's.

A look-up ends after `LOOK_UP_WITHIN`, however many processes and descriptors others have made for it to look at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

from zdd_web.board import MAGIC, MEMFD_PREFIX, Board, Header, Snapshot, cancel_request, shape
from zdd_web.board.copy import BoardCopy
from zdd_web.board.record import WORD
from zdd_web.errors import BoardError
from zdd_web.lifecycle import Phase
from zdd_web.system import memfd, proc

#: For all processes together, seconds.
LOOK_UP_WITHIN = 5.0

#: Is called with what was skipped and why.
Note = Callable[[str], None]


def ignore(text: str) -> None:
    """Take no note of what was skipped."""


class Generation:
    """One master and its board, which is mapped if it is this user's own, and copied when it is read if it is not.

    `owner` is the uid of both.
    """

    def __init__(self, pid: int, board: Board | None, owner: int | None = None, header: Header | None = None) -> None:
        self.pid, self.owner = pid, os.geteuid() if owner is None else owner
        self._board, self._header = board, header

    @property
    def board(self) -> Board:
        """The board; another user's as it was when this was asked for first, or at the last `refresh()`.

        Raises `BoardError` when that has ended, or it is not a board any more.
        """
        if self._board is None:
            self._board = self._copy()
        return self._board

    @property
    def header(self) -> Header:
        """The board's header; of another user's board only the words before `Header.FIXED` and the name."""
        if self._board is not None:
            return self._board.header
        assert self._header is not None
        return self._header

    def refresh(self) -> None:
        """Read another user's board again; one that is mapped needs no such thing. Raises `BoardError`."""
        if isinstance(self._board, BoardCopy):
            self._board.refresh()

    def snapshot(self) -> Snapshot:
        """Read the board as it is now. Raises `BoardError`."""
        if self._board is not None:
            return self._board.snapshot()
        with contextlib.closing(self._copy()) as board:
            return board.snapshot()

    def _copy(self) -> BoardCopy:
        try:
            for directory, fd, _ in _own_boards(self.pid):
                if _owner(directory) == self.owner:
                    return BoardCopy(os.dup(fd))
        except OSError as error:
            raise BoardError(f"the board of process {self.pid} cannot be read: {error}") from None
        raise BoardError(f"process {self.pid} has closed its board")

    @property
    def alive(self) -> bool:
        """Whether the master still runs."""
        return proc.alive(self.pid, self.header.master_start)

    @property
    def serves(self) -> bool:
        """Whether it has neither been succeeded nor ended."""
        # The phase follows a moment later: a signal that came in between would end the old generation alone.
        return not self.header.successor_pid and self.header.phase not in (Phase.RETIRING, Phase.STOPPED)

    def close(self) -> None:
        """Let go of the board."""
        if self._board is not None:
            self._board.close()

    def signal(self, number: signal.Signals) -> None:
        """Send the master a signal. Raises ProcessLookupError when it has ended, and PermissionError."""
        if not proc.kill(self.pid, self.header.master_start, number):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def ask_to_cancel(self, number: int, *, take_back: bool = False) -> bool:
        """Ask the master to give up the upgrade with that number, begun or not; or take such a request back.

        False when its version of zdd_web cannot be asked, or it has ended. Raises OSError when this user may not.
        """
        if not self.alive:
            return False
        try:
            for descriptor, _ in memfd.named(self.pid, cancel_request.MEMFD_NAME):
                try:
                    fd = self.open_memfd(descriptor, cancel_request.MEMFD_NAME, os.O_RDWR)
                except memfd.NotAMemfd:
                    continue
                try:
                    if take_back:
                        cancel_request.take_back(fd, number)
                    else:
                        cancel_request.write(fd, number, os.getpid())
                finally:
                    os.close(fd)
                return True
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended meanwhile
        return False

    def open_memfd(self, number: int, name: str, flags: int = os.O_RDONLY) -> int:
        """Open what the master has as descriptor `number`, to read, if it is a memfd of that name which it made.

        Raises `NotAMemfd` with what it is instead, and OSError when it is closed.
        """
        with memfd.process_directory(self.pid) as directory:
            fd = memfd.open_named(directory, number, name, flags)
        maker = os.fstat(fd).st_uid
        if maker != self.owner:
            os.close(fd)
            raise memfd.NotAMemfd(f"it belongs to {user(maker)}, and the master to {user(self.owner)}")
        return fd


def user(uid: int) -> str:
    """Return how a message names a user: "user www-data"."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _owner(directory: int) -> int:
    # Of the directory itself it is the effective uid always, also where the process is not dumpable.
    return os.fstat(directory).st_uid


def _uids(directory: int) -> set[int]:
    """Return the real, effective and saved uid of a process."""
    fd = os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    with open(fd, "rb") as file:
        line = next(line for line in file if line.startswith(b"Uid:"))
    return {int(word) for word in line.split()[1:4]}


def _own_boards(pid: int, note: Note = ignore) -> Iterator[tuple[int, int, Header]]:
    """Return the boards that make a process a master: its directory, a descriptor, and the first words.

    Both descriptors are closed afterwards. Raises OSError when the process has ended, or this user may not look.
    """
    for directory, fd, start, name in _boards(pid, note):
        try:
            shape(start, os.fstat(fd).st_size)
            header = Header(memoryview(start), 0)
            if header.master_pid != pid:
                continue
            _check_maker(os.fstat(fd).st_uid, _uids(directory))
        except BoardError as error:
            note(f"process {pid} ({user(_owner(directory))}), {MEMFD_PREFIX + name!r}: {error}")
            continue
        yield directory, fd, header


def _check_maker(maker: int, runs_as: set[int]) -> None:
    if runs_as != {maker}:
        users = ", ".join(user(uid) for uid in sorted(runs_as))
        raise BoardError(f"it was made by {user(maker)}, and the process runs as {users}")


def _boards(pid: int, note: Note) -> Iterator[tuple[int, int, bytes, str]]:
    # Most processes have none, and are done with here.
    candidates = memfd.named(pid, MEMFD_PREFIX)
    if not candidates:
        return
    with memfd.process_directory(pid) as directory:
        if os.geteuid() not in (0, _owner(directory)):
            raise PermissionError(errno.EPERM, f"process {pid} belongs to {user(_owner(directory))}")
        for number, name in candidates:
            try:
                fd = memfd.open_named(directory, number, MEMFD_PREFIX)
            except memfd.NotAMemfd as error:
                note(f"process {pid} ({user(_owner(directory))}), {MEMFD_PREFIX + name!r}: {error}")
                continue
            except OSError:
                continue  # closed in between
            try:
                yield directory, fd, os.pread(fd, Header.FIXED * WORD, 0), name
            finally:
                os.close(fd)


def generation_of(pid: int, note: Note = ignore) -> Generation | None:
    """Return the generation whose master is `pid`, None when it is not a master that this user believes.

    Raises PermissionError when this user may not look, and OSError when there is no such process.
    """
    for directory, fd, header in _own_boards(pid, note):
        owner = _owner(directory)
        if owner != os.geteuid():
            return Generation(pid, None, owner, header)
        try:
            return Generation(pid, Board.open(fd), owner)
        except (BoardError, OSError, ValueError) as error:
            note(f"process {pid} ({user(owner)}): {error}")
    return None


def has_a_masters_board(pid: int) -> bool:
    """Tell whether a process has the board of a master that it is not, as workers have. Raises OSError."""
    for _, _, start, _ in _boards(pid, ignore):
        if len(start) == Header.FIXED * WORD:
            header = Header(memoryview(start), 0)
            if header.magic == MAGIC and header.master_pid != pid:
                return True
    return False


class Survey(list[Generation]):
    """The generations on this machine that this user believes; `unseen` counts processes, by uid, without a look."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen: Counter[int] = Counter()

    @property
    def shortfall(self) -> str:
        """A message for the operator where processes are unseen; "" where none is."""
        if not self.unseen:
            return ""
        return (
            f"{self.unseen.total()} processes were not looked at within {LOOK_UP_WITHIN:g} s: name the service's user "
            f"with --user, or its master with --pid or --pid-file"
        )


def survey(owner: int | None = None, note: Note = ignore) -> Survey:
    """Look at every process, or at those of one user, at most for `LOOK_UP_WITHIN`."""
    until, me = time.monotonic() + LOOK_UP_WITHIN, os.geteuid()
    found, hidden, queue = Survey(), 0, []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            uid = os.stat(f"/proc/{entry}").st_uid
        except OSError:
            continue  # ended in between
        if owner is not None and uid != owner:
            continue
        if me not in (0, uid):
            hidden += 1
            continue
        queue.append((uid != me, int(entry), uid))
    # Own processes first: others cannot use up their time.
    queue.sort()
    for index, (_, pid, _) in enumerate(queue):
        if time.monotonic() > until:
            found.unseen.update(uid for _, _, uid in queue[index:])
            break
        try:
            generation = generation_of(pid, note)
        except PermissionError as error:
            note(f"process {pid}: {error.strerror}")
        except OSError:
            continue  # ended in between
        else:
            if generation is not None:
                found.append(generation)
    if hidden:
        note(f"{hidden} processes of other users: they can be looked at by root")
    return found
