"""The masters before this one, of which some may still retire: a stop of the service is theirs too.

A master knows them by pid and start time, from the first one on: each hands its successor the list, with itself at its
end. They may be of an older version of zdd_web. SIGTERM means the same to every one of them: a retiring master gets a
deadline, SIGINT and SIGQUIT end it at once. A keeper is left out: it would send the signal back.
"""

from __future__ import annotations

import logging
import os
import signal

from zdd_web import log
from zdd_web.lifecycle import STOPPING, Phase
from zdd_web.service import generation_of, kept_by, line_of
from zdd_web.system import proc

#: (pid, start time), oldest first.
Known = tuple[tuple[int, int], ...]


class Ancestors:
    """Those of one master."""

    def __init__(self, known: Known) -> None:
        self._known = known

    def alive(self) -> list[tuple[int, int]]:
        """Return those that are still masters."""
        return [(pid, start) for pid, start in self._known if proc.alive(pid, start) and kept_by(pid) is None]

    def tell(self, sig: signal.Signals) -> None:
        """Send on the signal by which the whole service is ended."""
        for pid, start in self.alive():
            if sig is signal.SIGTERM and _stops_already(pid):
                continue
            # A pid alone may name another process by now; one of another user is none of this service's.
            if proc.kill(pid, start, sig, users=(os.geteuid(),)):
                log.emit("stop.forwarded", logging.INFO, signal=sig.name[3:], predecessor=pid)


def _stops_already(pid: int) -> bool:
    try:
        generation = generation_of(pid)
    except OSError:
        return False
    if generation is None:
        return False
    header = generation.board.header
    # One that has finished is in Python's own end, where SIGTERM has its default action and changes the exit status.
    return bool(header.deadline) or header.phase == Phase.STOPPED


def deadline_of_the_stop(own: int) -> int:
    """Return when a retiring master that gets SIGTERM cuts off what it has: `own`, or earlier with its service.

    GRACE_PERIOD may have become shorter from one release to the next.
    """
    try:
        generation = generation_of(os.getpid())
        line = [] if generation is None else line_of(generation)
    except OSError:
        return own
    stops = [each.board.header.deadline for each in line if each.board.header.phase in STOPPING]
    return min(own, *filter(None, stops), own)
