"""What the processes of a service have at an instant: descriptors, memory, environment. Read from /proc."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.soak.service import Service
from zdd_web.service import Generation
from zdd_web.system import proc

#: Turns of the master's loop before a look, and how long one is waited for, seconds.
TURNS, TURN_WITHIN = 2, 5.0

#: A state in /proc/net/tcp: LISTEN. All others are of connections, which come and go with the load.
_LISTEN = "0A"


def take(service: Service) -> dict[str, int]:
    """Return the figures of the active generation; of its workers, those of the one that has most."""
    generation = service.generation()
    with contextlib.closing(generation):
        _wait_for_turns(generation)
        master, workers = generation.pid, [worker.pid for worker in generation.snapshot().workers]
    probes = [pid for pid in service.processes() if pid not in (master, *workers)]
    everything = [master, *workers, *probes]
    return {
        "descriptors of the master": len(descriptors(master)),
        "descriptors of a worker": _most(len(descriptors(pid)) for pid in workers),
        "memfds of the master": _memfds(master),
        "memfds of a worker": _most(map(_memfds, workers)),
        "environment of the master, bytes": environment(master),
        "environment of a worker, bytes": _most(map(environment, workers)),
        "threads of the master": _status(master, "Threads"),
        "threads of a worker": _most(_status(pid, "Threads") for pid in workers),
        "resident memory of the master, KiB": _status(master, "VmRSS"),
        "resident memory of a worker, KiB": _most(_status(pid, "VmRSS") for pid in workers),
        "proportional memory of all, KiB": sum(map(_pss, everything)),
        "processes": len(everything),
        "zombies": sum(map(_zombies, everything)),
        "entries in /dev/shm": _entries(Path("/dev/shm")),
        "files in its directory": _entries(service.directory),
        "resident memory of this program, KiB": _status(os.getpid(), "VmRSS"),
    }


def _wait_for_turns(generation: Generation) -> None:
    # What a predecessor leaves is closed in the turns of the master's loop that follow its end: one a second.
    for _ in range(TURNS):
        seen, give_up = generation.header.tick_at, time.monotonic() + TURN_WITHIN
        while generation.header.tick_at == seen and time.monotonic() < give_up:
            time.sleep(0.05)


def of_clients(pid: int) -> dict[str, int]:
    """Return the memory of the clients' process."""
    return {"resident memory of the clients, KiB": _status(pid, "VmRSS")}


def _most(values: Iterable[int]) -> int:
    return max(values, default=0)


def descriptors(pid: int) -> list[str]:
    """Return what is behind a process's descriptors, connections to clients aside."""
    best: list[str] | None = None
    # One that is accepted or closed between the two looks is taken for something else: the lowest counts.
    for _ in range(3):
        links = _links(pid)
        with Path(f"/proc/{pid}/net/tcp").open() as table:
            # Line by line: with all connections that wait for their end (TIME_WAIT) it is megabytes, which this program
            # would keep, now more and now less.
            listening = {row.split()[9] for row in table if row.split()[3] == _LISTEN}
        unix = {row.split()[6] for row in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
        own = [link for link in links if not link.startswith("socket:") or link[8:-1] in listening | unix]
        if best is None or len(own) < len(best):
            best = own
    return best or []


def _links(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def _memfds(pid: int) -> int:
    return sum(link.startswith("/memfd:") for link in _links(pid))


def environment(pid: int) -> int:
    """Return the size of a process's environment; a number counts as one byte, since it may get a digit longer."""
    return len(re.sub(rb"\d+", b"0", Path(f"/proc/{pid}/environ").read_bytes()))


def _status(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _pss(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _zombies(pid: int) -> int:
    # Of its children alone: a master that has retired is a child of PID 1, which may take its time.
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(proc.state(int(child)) == "Z" for child in children)


def _entries(directory: Path) -> int:
    return sum(1 for _ in directory.iterdir())
