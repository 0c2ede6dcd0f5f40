"""Find a running service by the boards that its masters hold open."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zdd_web import lookup
from zdd_web.errors import ServiceNotFound
from zdd_web.lookup import Generation, Note, Survey, generation_of, ignore, user
from zdd_web.system import proc

__all__ = ["Generation", "generation_of"]

#: The module that a retired master runs where its pid must stay: `python -m zdd_web.keeper NAME PID`.
KEEPER = "zdd_web.keeper"

#: How many names of services an error lists.
MOST_NAMES = 100


def generations(owner: int | None = None, note: Note = ignore) -> Survey:
    """Return every generation on this machine that this user believes, oldest first in each service.

    With an `owner`, those of that uid only. lookup.py says what is believed; `note` is called with what is not and why.
    """
    found = lookup.survey(owner, note)
    found.sort(key=lambda each: (each.header.name, each.header.generation))
    return found


def find(
    *,
    name: str | None = None,
    pid: int | None = None,
    pid_file: str | None = None,
    owner: int | None = None,
    note: Note = ignore,
) -> Generation:
    """Return the active generation of the service that the operator named.

    Root's own services come before those of other users; with an `owner`, only those of that uid count. Raises
    `ServiceNotFound` with what there is instead.
    """
    if pid_file is not None:
        pid, writer = _read_pid_file(pid_file)
        generation = _by_pid(pid, owner, note)
        # Its owner can write any pid into it, and must not direct root to another user's service.
        if writer not in (0, os.geteuid(), generation.owner):
            raise ServiceNotFound(
                f"--pid-file {pid_file} belongs to {user(writer)}, and process {pid} to {user(generation.owner)}: "
                f"name the service with --pid or --name"
            )
        return generation
    if pid is not None:
        return _by_pid(pid, owner, note)
    everything = generations(owner, note)
    named = [line for line in descent(everything, note) if has_name(line, name)]
    # One that only retires, while another of its name serves, is over: what joined it to its successors has ended.
    in_service = {(each.owner, each.header.name) for line in named for each in line if each.serves}
    found = [line for line in named if is_active(line).serves or (line[0].owner, line[0].header.name) not in in_service]
    own = [line for line in found if line[0].owner == os.geteuid()]
    if own and owner is None:
        for line in found:
            if line[0].owner != os.geteuid():
                note(f"process {line[0].pid} ({user(line[0].owner)}): this user's own services come first")
        found = own
    if sum(everything.unseen[line[0].owner] for line in found) or (everything.unseen and not found):
        raise ServiceNotFound(everything.shortfall)
    if len(found) > 1:
        raise ServiceNotFound(_several(name, found))
    if not found:
        others = sorted({each.header.name for each in everything})
        there = f"running here: {_listed(others)}" if others else "this user sees no service of zdd_web here"
        raise ServiceNotFound(f"no service{f' named {name!r}' if name else ''}: {there}")
    return is_active(found[0])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _several(name: str | None, found: list[list[Generation]]) -> str:
    offices = [is_active(line) for line in found]
    names = sorted({each.header.name for each in offices})
    if name is None and len(names) > 1:
        return f"several services run here: {_listed(names)}: name one with --name"
    several_users = len({each.owner for each in offices}) > 1
    masters = _listed([f"{each.pid} ({user(each.owner)})" if several_users else str(each.pid) for each in offices])
    return (
        f"{len(offices)} services named {name or names[0]!r} run here, of the masters {masters}: "
        f"name one with {'--user, ' if several_users else ''}--pid or --pid-file"
    )


def _read_pid_file(path: str) -> tuple[int, int]:
    """Return the pid in a pid file, and the uid of the file's owner."""
    try:
        # Not waited for, if it is a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return int(file.read(32)), os.fstat(file.fileno()).st_uid
    except (OSError, ValueError) as error:
        raise ServiceNotFound(f"--pid-file {path}: {error}: is the service running?") from None


def _by_pid(pid: int, owner: int | None, note: Note) -> Generation:
    reasons: list[str] = []
    try:
        generation = generation_of(pid, reasons.append)
    except PermissionError:
        raise ServiceNotFound(f"process {pid} belongs to another user: run this as that user or as root") from None
    except OSError:
        raise ServiceNotFound(f"no process {pid}: is the service running?") from None
    for reason in reasons:
        note(reason)
    if generation is None or not generation.serves:
        # With KEEP_PID the pid stays, and means the service: the active generation among those that descend from it.
        kept = (generation.header.name, generation.header.successor_pid) if generation else kept_by(pid)
        generation = (Line(pid, *kept).is_active() if kept is not None else None) or generation
    if generation is None:
        why = "".join(f"; {reason}" for reason in reasons)
        raise ServiceNotFound(
            f"process {pid} is not a gunicorn master with zdd_web: does its configuration call install()?{why}"
        )
    if owner not in (None, generation.owner):
        raise ServiceNotFound(f"process {pid} belongs to {user(generation.owner)}, which --user excludes")
    return generation


def is_active(candidates: list[Generation]) -> Generation:
    """Return the generation that a signal to "the service" must go to: the oldest that has no successor yet."""
    seniors = [each for each in candidates if each.serves]
    # During an upgrade both are here; until the commit the older one rules.
    return (seniors or candidates)[0]


def lines(name: str | None = None) -> list[list[Generation]]:
    """Return the services on this machine that this user believes: the generations of each, oldest first.

    With a `name`, only those that have it in one of their generations, since a release may change it.
    """
    return [line for line in descent(generations()) if has_name(line, name)]


def has_name(line: list[Generation], name: str | None) -> bool:
    """Tell whether one of a service's generations has that name; each has the name None."""
    return name is None or any(each.header.name == name for each in line)


def line_of(generation: Generation) -> list[Generation]:
    """Return all generations of the service that a generation is of, oldest first."""
    found = descent(generations(generation.owner))
    return next((line for line in found if any(each.pid == generation.pid for each in line)), [generation])


def descent(everything: Sequence[Generation], note: Note = ignore) -> list[list[Generation]]:
    """Return generations by service, those of each oldest first.

    By descent: two masters that were started separately are two services, also where both have the same NAME. A
    service is one user's: a generation that names another user's master as its predecessor is a service of its own.
    """
    by_pid = {each.pid: each for each in everything}
    by_successor = {(each.owner, each.header.generation, each.header.successor_pid): each for each in everything}
    found: dict[int, list[Generation]] = {}
    for each in sorted(everything, key=lambda each: each.header.generation):
        pid, number = each.header.predecessor_pid, each.header.generation
        older = by_pid.get(pid) if pid else None
        if older is not None and older.owner != each.owner:
            note(
                f"process {each.pid} ({user(each.owner)}) as a successor of process {pid} ({user(older.owner)}): "
                f"a service is one user's"
            )
            older = None
        if pid and (older is None or older.header.generation != number - 1):
            # The one between the two has ended.
            older = by_successor.get((each.owner, number - 2, pid))
        # Pids are reused: what has started after it is not its predecessor.
        if older is not None and older.header.master_start > each.header.master_start:
            older = None
        line = found[older.pid] if older is not None else []
        line.append(each)
        found[each.pid] = line
    lines = {id(line): line for line in found.values()}.values()
    return sorted(lines, key=lambda line: (line[0].header.name, line[0].header.master_start, line[0].pid))


class Line:
    """The generations that descend from a process, a retired master or its keeper: whose turn it is.

    By descent, which tells them from another service that happens to have the same NAME; and by their predecessors,
    since a release may change its NAME.
    """

    def __init__(self, root: int, name: str, successor: int) -> None:
        self._root, self._owner = root, proc.owner(root)
        self._names, self._pids = {name}, {successor}
        self._current: Generation | None = None

    def is_active(self) -> Generation | None:
        """Return the generation that a signal must go to; None when all have ended."""
        current = self._current
        if current is not None and current.alive and current.serves:
            return current
        ours = self._find()
        if ours:
            self._current = is_active(ours)
            return self._current
        # It cannot be looked at just now; to end here would end the service.
        return current if current is not None and current.alive else None

    def _find(self) -> list[Generation]:
        # Workers are among them, which may run as another user and can have a board as well.
        own = [pid for pid in descendants(self._root) if proc.owner(pid) == self._owner]
        foreign_listeners = [each for each in map(_look, own) if each is not None]
        ours: list[Generation] = []
        while found := [each for each in foreign_listeners if self._belongs(each)]:
            ours += found
            foreign_listeners = [each for each in foreign_listeners if each not in found]
            self._names.update(each.header.name for each in found)
            self._pids.update(each.pid for each in found)
            self._pids.update(each.header.successor_pid for each in found)
        for stranger in foreign_listeners:
            stranger.close()
        return sorted(ours, key=lambda each: each.header.generation)

    def _belongs(self, generation: Generation) -> bool:
        header = generation.header
        return header.name in self._names or not self._pids.isdisjoint((generation.pid, header.predecessor_pid))


def kept_by(pid: int) -> tuple[str, int] | None:
    """Return the name of the service that a keeper keeps and its first successor's pid; None when `pid` is none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return None
    if words[1:3] != [b"-m", KEEPER.encode()] or len(words) < 5 or not words[4].isdigit():
        return None
    return os.fsdecode(words[3]), int(words[4])


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
