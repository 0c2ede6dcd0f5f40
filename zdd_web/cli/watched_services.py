"""Services that are watched: found by a look at all processes, and followed by their boards from then on.

On a machine with ten thousand processes such a look takes a second or more of CPU time. A successor is found without
one, among the children of its predecessor and then by the pid on its predecessor's board. A service that is started
beside the others, or takes over from one, is seen at the next look.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from zdd_web.cli.control import UNDER_WAY
from zdd_web.cli.progress import successor_of
from zdd_web.errors import BoardError
from zdd_web.service import Generation, generation_of

#: Between two looks at all processes at least, seconds, and as a multiple of what the last one took.
LOOK_AT_ALL_EVERY, LOOK_AT_ALL_FACTOR = 5.0, 20.0

Services = list[list[Generation]]


class Followed:
    """What `find` has found, the generations of each service oldest first, as they are now."""

    def __init__(self, find: Callable[[], Services]) -> None:
        """`find` looks at all processes."""
        self._find = find
        self._services: Services = []
        self._look_again_at = 0.0

    def look(self) -> Services:
        """Return the services with the generations that are alive. Raises what `find` does."""
        began = time.monotonic()
        if began >= self._look_again_at:
            # Also where it raises: a service that is gone is looked for no more often.
            self._look_again_at = began + LOOK_AT_ALL_EVERY
            self.close()
            self._services = self._find()
            took = time.monotonic() - began
            self._look_again_at = began + max(LOOK_AT_ALL_EVERY, LOOK_AT_ALL_FACTOR * took)
            return self._services
        self._services = [line for line in map(_now, self._services) if line]
        return self._services

    def close(self) -> None:
        """Let go of the boards."""
        for line in self._services:
            for each in line:
                each.close()
        self._services = []


def _now(line: list[Generation]) -> list[Generation]:
    # The successor first: the end of its predecessor may be noticed in the same look.
    successor = _successor(line[-1])
    if successor is not None and _succeeds(successor, line[-1]):
        line = [*line, successor]
    elif successor is not None:
        successor.close()
    alive = []
    for each in line:
        try:
            if each.alive:
                each.refresh()
                alive.append(each)
                continue
        except BoardError:
            pass  # it has ended meanwhile
        each.close()
    return alive


def _succeeds(later: Generation, earlier: Generation) -> bool:
    # The pid may be another service's by now.
    return later.owner == earlier.owner and later.header.generation > earlier.header.generation


def _successor(generation: Generation) -> Generation | None:
    try:
        header = generation.board.header
        if header.successor_pid:
            return generation_of(header.successor_pid)
        # Until it is active it is known as a child only.
        return successor_of(generation) if header.upgrade_state in UNDER_WAY else None
    except (BoardError, OSError):
        return None
