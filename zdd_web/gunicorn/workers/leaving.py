"""What a worker does between the order to leave and the end of its loop, where its class needs such steps."""

from __future__ import annotations

from typing import Protocol


class Leaving(Protocol):
    """What a worker does between the order to leave and the end of its loop."""

    def over(self) -> bool:
        """Stop accepting at the first call; tell whether the loop may be ended. Called once a turn."""
