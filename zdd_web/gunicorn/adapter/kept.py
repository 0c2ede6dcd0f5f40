"""What the kept connections of a worker class may ask of the worker that keeps them; see workers/exchange.py."""

from __future__ import annotations

from typing import Protocol


class Keeper(Protocol):
    """`KeptConnections`, as a store of connections sees it."""

    @property
    def take_fd(self) -> int:
        """The descriptor to watch."""

    def turn(self) -> None:
        """Look whether the exchange is to be watched, and close what is idle in a lame duck; often, or once a turn."""

    @property
    def limits_wait(self) -> bool:
        """Whether `pause()` may limit the wait: looked at in each turn of a loop, and cheaper."""

    def pause(self) -> float | None:
        """Return for how long the loop may wait at most, seconds; None for as long as it likes."""

    def hands_over(self) -> bool:
        """Tell whether another worker is to serve the connections of this one, which leaves."""

    def take_some(self) -> int:
        """Take connections from the exchange; return how many."""

    def count_closed(self) -> None:
        """Count a connection that is closed idle."""
