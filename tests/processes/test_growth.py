"""A chain of upgrades: what one generation hands to the next must not grow.

Eight in the default run; `ZDD_WEB_TEST_UPGRADES=50` for a long chain. The figures are printed (`pytest -s`).

Each generation is a new process from a new exec, so whatever grows does so because it is handed on: descriptors,
the environment, children that nobody waits for.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes.harness import Service, answered_from, children, descriptors, until
from zdd_web.board import WorkerState
from zdd_web.system import proc

UPGRADES = int(os.environ.pop("ZDD_WEB_TEST_UPGRADES", "8"))

#: The generation that all later ones are compared with. The first was not started by an upgrade.
BASE = 3

#: Resident memory of a process differs from run to run by what the allocator keeps; a leak of one listener's, one
#: board's or one environment's worth in each generation would pass it within fifty.
RESIDENT_TOLERANCE_KIB = 1536


@dataclass(frozen=True)
class Figures:
    """What one generation has, once it is alone."""

    generation: int
    master_descriptors: int
    worker_descriptors: int
    inheritable: int
    master_environment: int
    worker_environment: int
    names: frozenset[str]
    children: int
    zombies: int
    processes: int
    master_kib: int
    worker_kib: int

    def __str__(self) -> str:
        return (
            f"generation {self.generation:3}: descriptors {self.master_descriptors}/{self.worker_descriptors} "
            f"(master/worker), inheritable {self.inheritable}, environment {self.master_environment}/"
            f"{self.worker_environment} bytes, children {self.children}, zombies {self.zombies}, processes "
            f"{self.processes}, resident {self.master_kib}/{self.worker_kib} KiB"
        )

    @property
    def exact(self) -> dict[str, object]:
        """What must be the same in every generation."""
        different = ("generation", "master_kib", "worker_kib")
        return {name: value for name, value in self.__dict__.items() if name not in different}


def inheritable(pid: int) -> list[str]:
    """The descriptors above stderr that an exec would leave open."""
    found = []
    for number, link in descriptors(pid).items():
        flags = re.search(r"^flags:\s*(\d+)$", Path(f"/proc/{pid}/fdinfo/{number}").read_text(), re.MULTILINE)
        assert flags
        if number > 2 and not int(flags[1], 8) & os.O_CLOEXEC:
            found.append(link)
    return found


def environment(pid: int) -> bytes:
    """A process's environment; the numbers in the variables of an upgrade may get a digit longer."""
    data = Path(f"/proc/{pid}/environ").read_bytes()
    return b"\0".join(re.sub(rb"\d+", b"0", pair) for pair in data.split(b"\0") if pair)


def resident_kib(pid: int) -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def figures(service: Service) -> Figures:
    """Take the figures of the generation in office, once its predecessor has gone and its workers are idle."""
    service.until_one_generation()

    def idle() -> bool:
        workers = service.snapshot().workers
        return [(each.state, each.in_flight) for each in workers] == [(WorkerState.SERVING, 0)] * service.workers

    until("idle workers", idle, service)
    # The channel to a predecessor is closed when the loop has turned once more after its end; SIGCHLD turns it.
    for _ in range(2):
        header = service.is_active().board.header
        seen = header.tick_at
        os.kill(header.master_pid, signal.SIGCHLD)
        until("a turn of the loop", lambda header=header, seen=seen: header.tick_at != seen, service)
    snapshot = service.snapshot()
    master, worker = snapshot.master_pid, snapshot.workers[0].pid
    until("closed connections", lambda: not connections(worker), service)
    own = children(master)
    return Figures(
        generation=snapshot.generation,
        master_descriptors=len(descriptors(master)),
        worker_descriptors=len(descriptors(worker)),
        inheritable=len(inheritable(master)) + len(inheritable(worker)),
        master_environment=len(environment(master)),
        worker_environment=len(environment(worker)),
        names=frozenset(pair.partition(b"=")[0].decode() for pair in environment(master).split(b"\0")),
        children=len(own),
        zombies=sum(proc.state(pid) == "Z" for pid in own),
        processes=len(service.processes()),
        master_kib=resident_kib(master),
        worker_kib=resident_kib(worker),
    )


def connections(pid: int) -> list[str]:
    """A worker's accepted connections: sockets that are in the kernel's table of established ones."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = {f"socket:[{row[9]}]" for row in rows if row[3] in ("01", "08")}
    return [link for link in descriptors(pid).values() if link in established]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.begins_first
def test_nothing_grows_along_a_chain_of_upgrades(make_service) -> None:
    service = make_service().start()
    taken: dict[int, Figures] = {}
    for _ in range(UPGRADES):
        service.upgrade()
        service.get()
        generation = until("the next generation", lambda: figures(service), service)
        taken[generation.generation] = generation
        print(generation)
    base, last = taken[BASE], taken[UPGRADES + 1]
    assert [each.exact for each in taken.values()] == [taken[2].exact] * UPGRADES
    assert last.zombies == 0
    assert last.master_kib - base.master_kib <= RESIDENT_TOLERANCE_KIB
    assert last.worker_kib - base.worker_kib <= RESIDENT_TOLERANCE_KIB
    service.stop()
    assert not service.is_open()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_grows_in_a_master_whose_upgrades_fail(make_service) -> None:
    service = make_service().start()
    service.deploy("2", at_import="raise ImportError('boom')")
    taken = []
    for _ in range(UPGRADES):
        service.upgrade(expect="upgrade.failed")
        taken.append(figures(service))
        print(taken[-1])
    # The last upgrade's boot log stays open, for the command.
    assert [each.exact for each in taken] == [taken[0].exact] * UPGRADES
    assert taken[-1].zombies == 0
    assert taken[-1].master_kib - taken[1].master_kib <= RESIDENT_TOLERANCE_KIB
    service.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_grows_in_a_master_that_reloads(make_service) -> None:
    service = make_service().start()
    taken = []
    with service.under_load(clients=2) as load:
        for number in range(1, UPGRADES + 1):
            service.signal(signal.SIGHUP)
            service.wait_for("event=reload.done", times=number)
            answered_from(load, 10)
    for number in range(UPGRADES + 1, 2 * UPGRADES + 1):
        before = {worker.pid for worker in service.snapshot().workers}
        service.signal(signal.SIGHUP)
        service.wait_for("event=reload.done", times=number)
        until("new workers", lambda old=before: not old & {each.pid for each in service.snapshot().workers}, service)
        taken.append(figures(service))
        print(taken[-1])
    assert [each.exact for each in taken] == [taken[0].exact] * len(taken)
    assert taken[-1].master_kib - taken[1].master_kib <= RESIDENT_TOLERANCE_KIB
    service.stop()
