"""Find a running service by the boards that its masters hold open."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from zdd_web import proc
from zdd_web.board import MEMFD_PREFIX, Board, Snapshot
from zdd_web.errors import BoardError, ServiceNotFound
from zdd_web.lifecycle import Phase

_LINK = f"/memfd:{MEMFD_PREFIX}"

#: The module that a retired master runs where its pid must stay: `python -m zdd_web.keeper NAME PID`.
KEEPER = "zdd_web.keeper"


@dataclass(frozen=True)
class Generation:
    """One master and its board, mapped read-only."""

    pid: int
    board: Board

    def snapshot(self) -> Snapshot:
        """Read the board."""
        return self.board.snapshot()

    @property
    def alive(self) -> bool:
        """Whether the master still runs."""
        return proc.alive(self.pid, self.board.header.master_start)

    @property
    def serves(self) -> bool:
        """Whether nobody has succeeded it yet, and it has not ended."""
        return self.board.header.phase not in (Phase.RETIRING, Phase.STOPPED)

    def open_descriptor(self, number: int) -> int:
        """Open what the master has open as descriptor `number`. Raises OSError."""
        return os.open(f"/proc/{self.pid}/fd/{number}", os.O_RDONLY)


def generation_of(pid: int) -> Generation | None:
    """Return the generation whose master is `pid`, None when it is no master of zdd_web.

    Raises PermissionError when this user may not look.
    """
    directory = f"/proc/{pid}/fd"
    for number in os.listdir(directory):
        try:
            if not os.readlink(f"{directory}/{number}").startswith(_LINK):
                continue
            fd = os.open(f"{directory}/{number}", os.O_RDONLY)
        except OSError:
            continue  # closed in between
        try:
            board = Board.open(fd)
        except (BoardError, OSError, ValueError):
            continue
        finally:
            os.close(fd)
        # A master holds its successor's board too, and a worker its master's.
        if board.header.master_pid == pid:
            return Generation(pid, board)
        board.close()
    return None


def generations() -> Iterator[Generation]:
    """Return every generation on this machine that this user may look at, oldest first in each service."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            generation = generation_of(int(entry))
        except OSError:
            continue
        if generation is not None:
            found.append(generation)
    return iter(sorted(found, key=lambda each: (each.board.header.name, each.board.header.generation)))


def find(*, name: str | None = None, pid: int | None = None, pid_file: str | None = None) -> Generation:
    """Return the generation that is in office in the service that the operator named.

    Raises `ServiceNotFound` with what there is instead.
    """
    if pid_file is not None:
        try:
            with open(pid_file) as file:
                pid = int(file.read())
        except (OSError, ValueError) as error:
            raise ServiceNotFound(f"--pid-file {pid_file}: {error}: is the service running?") from None
    if pid is not None:
        return _by_pid(pid)
    named = lines(name)
    # One that only retires, while another of its name serves, is over: what joined it to its successors has ended.
    in_service = {each.board.header.name for line in named for each in line if each.serves}
    found = [line for line in named if in_office(line).serves or line[0].board.header.name not in in_service]
    if len(found) > 1:
        raise ServiceNotFound(_several(name, found))
    if not found:
        others = sorted({each.board.header.name for each in generations()})
        there = f"running here: {', '.join(others)}" if others else "this user sees no service of zdd_web here"
        raise ServiceNotFound(f"no service{f' named {name!r}' if name else ''}: {there}")
    return in_office(found[0])


def _several(name: str | None, found: list[list[Generation]]) -> str:
    offices = [in_office(line) for line in found]
    names = sorted({each.board.header.name for each in offices})
    if name is None and len(names) > 1:
        return f"several services run here: {', '.join(names)}: name one with --name"
    masters = ", ".join(str(each.pid) for each in offices)
    return (
        f"{len(offices)} services named {name or names[0]!r} run here, of the masters {masters}: "
        f"name one with --pid or --pid-file"
    )


def _by_pid(pid: int) -> Generation:
    try:
        generation = generation_of(pid)
    except PermissionError:
        raise ServiceNotFound(f"process {pid} belongs to another user: run this as that user or as root") from None
    except OSError:
        raise ServiceNotFound(f"no process {pid}: is the service running?") from None
    if generation is not None and generation.serves:
        return generation
    # With KEEP_PID the pid stays, and means the service: whoever is in office among those who came after it.
    kept = (generation.board.header.name, generation.board.header.successor_pid) if generation else kept_by(pid)
    found = (Line(pid, *kept).in_office() if kept is not None else None) or generation
    if found is not None:
        return found
    raise ServiceNotFound(f"process {pid} is no gunicorn master with zdd_web: does its configuration call install()?")


def in_office(candidates: list[Generation]) -> Generation:
    """Return the generation that a signal to "the service" must go to: the oldest that nobody has succeeded yet."""
    seniors = [each for each in candidates if each.serves]
    # During an upgrade both are here; until the commit the older one rules.
    return (seniors or candidates)[0]


def lines(name: str | None = None) -> list[list[Generation]]:
    """Return the services on this machine that this user may look at: the generations of each, oldest first.

    By descent: two masters that were started separately are two services, also where both have the same NAME. With a
    `name`, only those that have it in one of their generations, since a release may change it.
    """
    found: list[list[Generation]] = []
    for each in generations():
        kin = [line for line in found if any(_are_related(each, other) for other in line)]
        found = [line for line in found if line not in kin] + [[*itertools.chain(*kin), each]]
    for line in found:
        line.sort(key=lambda each: each.board.header.generation)
    found.sort(key=lambda line: (line[0].board.header.name, line[0].board.header.master_start, line[0].pid))
    return [line for line in found if name is None or name in (each.board.header.name for each in line)]


def line_of(generation: Generation) -> list[Generation]:
    """Return all generations of the service that a generation is of, oldest first."""
    return next((line for line in lines() if any(each.pid == generation.pid for each in line)), [generation])


def _are_related(one: Generation, other: Generation) -> bool:
    """Tell whether one has come after the other, at once or after a third that has ended."""
    older, younger = sorted((one.board.header, other.board.header), key=lambda header: header.generation)
    # Pids are used again: what is no older by its start, or by its number, is somebody else.
    if not younger.predecessor_pid or older.master_start > younger.master_start:
        return False
    if younger.generation == older.generation + 1:
        return younger.predecessor_pid == older.master_pid
    return younger.generation == older.generation + 2 and younger.predecessor_pid == older.successor_pid


class Line:
    """The generations that descend from a process, a retired master or its keeper: whose turn it is.

    By descent, which tells them from another service that happens to have the same NAME; and by their predecessors,
    since a release may change its NAME.
    """

    def __init__(self, root: int, name: str, successor: int) -> None:
        self._root = root
        self._names, self._pids = {name}, {successor}
        self._current: Generation | None = None

    def in_office(self) -> Generation | None:
        """Return the generation that a signal must go to; None when all have ended."""
        current = self._current
        if current is not None and current.alive and current.serves:
            return current
        ours = self._find()
        if ours:
            self._current = in_office(ours)
            return self._current
        # It cannot be looked at just now; to end here would end the service.
        return current if current is not None and current.alive else None

    def _find(self) -> list[Generation]:
        strangers = [each for each in map(_look, descendants(self._root)) if each is not None]
        ours: list[Generation] = []
        while found := [each for each in strangers if self._belongs(each)]:
            ours += found
            strangers = [each for each in strangers if each not in found]
            self._names.update(each.board.header.name for each in found)
            self._pids.update(each.pid for each in found)
            self._pids.update(each.board.header.successor_pid for each in found)
        for stranger in strangers:
            stranger.board.close()
        return sorted(ours, key=lambda each: each.board.header.generation)

    def _belongs(self, generation: Generation) -> bool:
        header = generation.board.header
        return header.name in self._names or not self._pids.isdisjoint((generation.pid, header.predecessor_pid))


def kept_by(pid: int) -> tuple[str, int] | None:
    """Return the name of the service that a keeper keeps and its first successor's pid; None when `pid` is none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return None
    return (os.fsdecode(words[3]), int(words[4])) if words[1:3] == [b"-m", KEEPER.encode()] else None


def _look(pid: int) -> Generation | None:
    try:
        return generation_of(pid)
    except OSError:
        return None


def descendants(pid: int) -> list[int]:
    """Return the pids of a process's children, grandchildren and so on."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            children.setdefault(proc.parent(int(entry)), []).append(int(entry))
    found, open_ends = [], [pid]
    while open_ends:
        born = children.pop(open_ends.pop(), [])
        found += born
        open_ends += born
    return found
