"""What a rehearsal does to the service besides upgrades and the stop.

Each scenario is a function of the rehearsal; it returns what it found. An OSError that it raises, for a process that is
gone, is a result too. A scenario is added to `SCENARIOS` here and in command.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from zdd_web import service
from zdd_web.board import Snapshot, WorkerState, WorkerView
from zdd_web.cli import control, deploy_requests
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.rehearse import held_connections
from zdd_web.cli.rehearse.server import Server
from zdd_web.cli.rehearse.tally import Tally
from zdd_web.deploy_request import DeployRequest
from zdd_web.system import proc

#: How long workers may take to be replaced, seconds.
REPLACED_WITHIN = 90.0
#: How long a generation that serves may take to its first reply, seconds, in which a request may time out.
ANSWERS_WITHIN = 30.0
LOOK = 0.05


class Rehearsal(Protocol):
    """The rehearsal that a scenario is part of (rehearsal.py); `generation` is the one that serves."""

    server: Server
    generation: service.Generation
    tally: Tally

    @property
    def settle(self) -> float:
        """How long the load runs between two events, seconds."""

    def snapshot(self) -> Snapshot:
        """Return the board of the generation that serves."""

    def generation_changed(self) -> None:
        """Find out which generation serves now."""


@dataclass(frozen=True)
class Found:
    """What a scenario found. `reason` is empty when all was well; `excused` bounds the losses that could not be helped.

    `detail` is for a reader: what was done to which process.
    """

    reason: str = ""
    detail: str = ""
    excused: int = 0


def failed_upgrade(course: Rehearsal) -> Found:
    """Upgrade to a release whose app cannot be imported: the upgrade must fail, and the old generation serve on."""
    generation = course.generation
    successor = generation.board.header.generation + 1
    before = course.tally.answers_of(successor)
    with course.server.broken():
        outcome = control.upgrade(generation)
    if outcome.ok:
        course.generation_changed()
        return Found(f"generation {outcome.generation} serves, although its app could not be imported")
    if not outcome.serves_on:
        return Found(outcome.reason)
    if answers := course.tally.answers_of(successor) - before:
        return Found(f"generation {successor} sent {answers} replies, although its app could not be imported")
    return Found(detail=f"generation {generation.board.header.generation} serves on; upgrade {outcome.reason}")


def rollback(course: Rehearsal) -> Found:
    """Deploy another release by its directory, and go back to the one that served before."""
    releases = course.server.releases
    assert releases is not None
    replies = []
    for request, expected, what in (
        (DeployRequest(to=releases.b), releases.b, "the upgrade to another release"),
        (DeployRequest(back=True), releases.a, "the rollback"),
    ):
        if reason := _deploy(course, request, expected):
            return Found(f"{what} {reason}")
        number = course.generation.board.header.generation
        if not (answers := _answers(course, number)):
            return Found(f"{what}: generation {number} sent no reply within {ANSWERS_WITHIN:g} s")
        replies.append(f"generation {number} of {os.path.basename(expected)} sent {answers:,} replies")
    return Found(detail="; ".join(replies))


def _deploy(course: Rehearsal, request: DeployRequest, expected: str) -> str:
    """Deploy a release; return why that failed, "" when its code runs in the `expected` directory."""
    try:
        with deploy_requests.asking(course.generation, request):
            outcome = control.upgrade(course.generation)
    except CannotHelp as error:
        return f"failed: {error.message}"
    if not outcome.ok:
        return outcome.reason
    course.generation_changed()
    pid = course.generation.pid
    where = _directory_of(pid)
    if not f"{where}/".startswith(f"{expected}/"):
        # Its own name would be deployed to in production as well.
        return (
            f"failed: generation {course.generation.board.header.generation} was started in {expected}, and process "
            f"{pid} runs in {where}: chdir names that directory whatever the release is: write "
            f"chdir = os.path.dirname(os.path.abspath(__file__)) in the configuration, or leave it out"
        )
    return ""


def _directory_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/cwd")


def _answers(course: Rehearsal, generation: int) -> int:
    """Return how many replies a generation has sent by the time that the load has gone on for a while."""
    time.sleep(course.settle)
    deadline = time.monotonic() + ANSWERS_WITHIN
    while not (found := course.tally.answers_of(generation)) and time.monotonic() < deadline:
        time.sleep(LOOK)
    return found


def reload(course: Rehearsal) -> Found:
    """Send SIGHUP: every worker is replaced, one after the other."""
    old = _serving(course.snapshot())
    course.generation.signal(signal.SIGHUP)
    return _replaced(course, old, "after SIGHUP")


def recycle(course: Rehearsal) -> Found:
    """Wait until each worker has had its `max_requests` and was replaced."""
    return _replaced(course, _serving(course.snapshot()), "by max_requests: send more load")


def kill_worker(course: Rehearsal) -> Found:
    """Kill the worker that has most in hand with SIGKILL: what it held is lost, and nothing else may be."""
    serving = _serving(course.snapshot())
    if not serving:
        return Found("no worker serves that could be killed")
    worker = max(serving, key=lambda each: each.in_flight)
    # Stopped first, so that it closes none of them between the count and its end.
    proc.kill(worker.pid, worker.start, signal.SIGSTOP)
    held = held_connections.held_by(worker.pid)
    proc.kill(worker.pid, worker.start, signal.SIGKILL)
    found = _replaced(course, [worker], "after SIGKILL")
    return Found(found.reason, f"worker {worker.pid} held {held} connections; a new worker serves", excused=held)


def _replaced(course: Rehearsal, old: list[WorkerView], how: str) -> Found:
    """Wait until none of these workers is left and as many serve as should."""
    began = time.monotonic()
    while time.monotonic() - began < REPLACED_WITHIN:
        snapshot = course.snapshot()
        left = {(each.pid, each.start) for each in old} & {(each.pid, each.start) for each in snapshot.workers}
        if not left and len(_serving(snapshot)) >= snapshot.workers_wanted:
            return Found(detail=f"{len(old)} of {snapshot.workers_wanted} workers replaced")
        time.sleep(LOOK)
    pids = ", ".join(str(pid) for pid, _ in sorted(left)) or "none"
    serving = f"{len(_serving(snapshot))} of {snapshot.workers_wanted} workers serve"
    return Found(f"not replaced within {REPLACED_WITHIN:g} s {how}: workers {pids}; {serving}")


def _serving(snapshot: Snapshot) -> list[WorkerView]:
    return [each for each in snapshot.workers if each.state is WorkerState.SERVING and not each.retiring]


#: By the name that the command knows them by, in the order in which `--scenario all` runs them.
SCENARIOS: dict[str, Callable[[Rehearsal], Found]] = {
    "failed-upgrade": failed_upgrade,
    "rollback": rollback,
    "reload": reload,
    "recycle": recycle,
    "kill-worker": kill_worker,
}
