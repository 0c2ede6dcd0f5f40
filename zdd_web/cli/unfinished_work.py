"""What the workers of a stop had in hand when they ended: their words outlive them on the board."""

from __future__ import annotations

from zdd_web.board import Board


class UnfinishedWork:
    """The slots of one board that had a worker during a stop."""

    def __init__(self, board: Board) -> None:
        self._board = board
        # What stands in a slot that was not used since belongs to a worker that had ended before.
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
