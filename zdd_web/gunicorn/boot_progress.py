"""How far a generation that boots has come, as messages to an operator quote it."""

from __future__ import annotations

from zdd_web.board import Header, Snapshot


def first_boot(header: Header) -> str:
    """Say how long the first boot of a generation took, and what to do if another needs longer; "" before its end."""
    if not header.ready_at:
        return ""
    seconds = (header.ready_at - header.started_at) / 1e9
    return f"generation {header.generation} first booted in {seconds:.1f} s; raise UPGRADE_TIMEOUT if more is needed"


def progress(board: Snapshot, *, of_wanted: bool = True, most_errors: int | None = None) -> str:
    """Return how far the workers of a generation that boots have come, with all of their errors or the first few.

    `of_wanted` adds how many there are to be.
    """
    states = [worker.state.label for worker in board.workers]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none yet"
    errors = sorted({worker.error for worker in board.workers if worker.error})
    wanted = f" of {board.workers_wanted}" if of_wanted else ""
    return "; ".join([f"workers: {counts}{wanted}", *errors[:most_errors]])
