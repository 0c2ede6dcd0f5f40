"""What an adapter gives for a worker that leaves: the steps between the order and the end of the loop."""

from __future__ import annotations

from typing import Protocol


class Leaving(Protocol):
    """What a worker does between the order to leave and the end of its loop."""

    def over(self) -> bool:
        """Stop accepting at the first call; tell whether the loop may be ended. Called once a turn."""
