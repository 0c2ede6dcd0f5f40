"""Ask a service to stop and follow its masters on their boards to the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from zdd_web.board import LAYOUT, Board, Snapshot
from zdd_web.cli.follow import ANSWER_WITHIN, POLL, STANDS_STILL
from zdd_web.lifecycle import STOPPING, Phase
from zdd_web.service import Generation, line_of
from zdd_web.system import clock


@dataclass(frozen=True)
class DrainResult:
    """How a stop ended: `requests` were cut off and background `tasks` abandoned."""

    ok: bool
    reason: str
    seconds: float
    requests: int = 0
    tasks: int = 0


class Leftovers:
    """What the workers of a stop had in hand when they ended: their words outlive them on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        # What stands in a slot that nobody has used since is of a worker that was gone before.
        self._used: set[int] = set()

    def look(self) -> None:
        """Note which slots have a worker."""
        slots = enumerate(self._board.used_slots())
        self._used.update(index for index, slot in slots if slot.order.taken)

    def count(self) -> tuple[int, int]:
        """Return how many requests and background tasks were not finished."""
        slots = [self._board.slot(index) for index in self._used]
        # One that was killed could not give its work up.
        return sum(slot.in_flight for slot in slots), sum(max(slot.abandoned, slot.tasks) for slot in slots)


def stops(generation: Generation) -> bool:
    """Tell whether a stop is under way already."""
    return generation.header.phase in (*STOPPING, Phase.STOPPED)


def request(generation: Generation) -> None:
    """Send SIGTERM, unless a stop is under way: a second one would end its lame duck. Raises OSError."""
    if not stops(generation):
        generation.signal(signal.SIGTERM)


def drain(generation: Generation, progress: Callable[[Snapshot], None] = lambda snapshot: None) -> DrainResult:
    """Stop a service and wait until all of its masters have ended; `progress` is told of each phase.

    `generation` is the active one; those that still retire are stopped by it, and counted with it. A master ends
    within GRACE_PERIOD; one that stands still is waited for until `STANDS_STILL`. Raises `BoardError` when the service
    runs another version of zdd_web, before anything is done, and OSError when it cannot be signalled.
    """
    generation.snapshot()
    began = time.monotonic()
    retiring = [each for each in line_of(generation) if each.pid != generation.pid and _retires(each)]
    leftovers = [Leftovers(each.board) for each in (generation, *retiring)]

    def look() -> float:
        for one in (generation, *retiring):
            one.refresh()
        for each in leftovers:
            each.look()
        return time.monotonic() - began

    look()
    request(generation)
    reason = _follow(generation, look, progress)
    for each in retiring if not reason else ():
        reason = reason or _wait_for(each, look, progress)
    # Words of workers outlive them.
    seconds = look()
    if reason:
        return DrainResult(False, reason, seconds)
    counts = [each.count() for each in leftovers]
    requests, tasks = sum(count[0] for count in counts), sum(count[1] for count in counts)
    if requests or tasks:
        return DrainResult(False, "", seconds, requests, tasks)
    last = generation.snapshot().phase
    if last in (Phase.BOOTING, Phase.SERVING, Phase.LAME_DUCK):
        return DrainResult(False, f"the master ended while {last.label}: it was killed, or told to stop now", seconds)
    return DrainResult(True, "", seconds)


def _retires(generation: Generation) -> bool:
    header = generation.board.header
    return header.phase == Phase.RETIRING and header.layout == LAYOUT


def _follow(generation: Generation, look: Callable[[], float], progress: Callable[[Snapshot], None]) -> str:
    """Wait for the end of the generation in office; return why it was waited for in vain."""
    told = None
    while generation.alive:
        seconds = look()
        snapshot = generation.snapshot()
        if snapshot.phase is not told and snapshot.phase not in (Phase.BOOTING, Phase.SERVING, Phase.STOPPED):
            told = snapshot.phase
            progress(snapshot)
        if told is None and seconds > ANSWER_WITHIN:
            return f"the master did not answer SIGTERM within {ANSWER_WITHIN:g} s"
        if snapshot.tick_at and clock.since(snapshot.tick_at) > STANDS_STILL:
            return f"the master has stood still for {STANDS_STILL:g} s"
        time.sleep(POLL)
    return ""


def _wait_for(generation: Generation, look: Callable[[], float], progress: Callable[[Snapshot], None]) -> str:
    """Wait for the end of a generation that retires; return why it was waited for in vain."""
    which = f"generation {generation.board.header.generation} (pid {generation.pid})"
    if generation.alive:
        progress(generation.snapshot())
    while generation.alive:
        seconds = look()
        snapshot = generation.snapshot()
        if not snapshot.deadline and seconds > ANSWER_WITHIN:
            return f"{which} goes on retiring, it has no deadline: send it SIGTERM"
        if snapshot.tick_at and clock.since(snapshot.tick_at) > STANDS_STILL:
            return f"the master of {which} has stood still for {STANDS_STILL:g} s"
        time.sleep(POLL)
    return ""
