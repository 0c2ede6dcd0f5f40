"""What is wrong with a successor that serves: the probes of a retiring generation answer with it."""

from __future__ import annotations

from zdd_web.board import LAYOUT, Board
from zdd_web.health import Probe, Status, examine
from zdd_web.lifecycle import Phase
from zdd_web.probes import look


def successor_health(board: Board) -> tuple[int, str]:
    """Return the phase that a successor's probes speak of, and what is wrong with it while it serves."""
    header = board.header
    if header.layout != LAYOUT:
        return header.phase, ""
    if header.phase == Phase.RETIRING and header.successor_phase:
        # It has a successor itself, and speaks for that.
        return header.successor_phase, header.successor_trouble
    if header.phase != Phase.SERVING:
        return header.phase, ""
    failed = [each for each in examine(Probe.READINESS, look(board)) if each.status is Status.FAIL]
    # A check may have the name of something else that is looked at, such as "workers".
    return header.phase, "; ".join(each.name if each.is_check else f"{each.name}: {each.text}" for each in failed)
