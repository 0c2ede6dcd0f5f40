"""The exchange: the socket pair by which kept connections travel from workers that leave to workers that serve.

The first master makes it, all workers inherit both ends, and every successor is given them with the listeners: it is an
accept queue of connections that are established already. The master itself neither sends nor receives. It holds both
ends so that what is on the way outlives every worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

from zdd_web import log
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.kept_interface import are_taken
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.system import connection_passing


class Exchange:
    """Both ends of the pair, in the master and, after the fork, in its workers."""

    def __init__(self, inherited: Inheritance | None = None, *, is_on: bool = True) -> None:
        """Adopt the predecessor's pair, or make one; neither where `HAND_OVER_CONNECTIONS` is off.

        Raises OSError when a pair cannot be made.
        """
        self.give: socket.socket | None = None
        self.take: socket.socket | None = None
        #: The predecessor has this pair too, and may send into it.
        self.was_inherited = False
        given = [inherited.exchange_give, inherited.exchange_take] if inherited is not None else []
        given = [fd for fd in given if fd >= 0]
        if is_on and len(given) == 2:
            try:
                self.give, self.take = connection_passing.adopt(*given)
                self.was_inherited = True
                return
            except (OSError, ValueError) as error:
                log.emit("internal.error", logging.ERROR, where="exchange", error=str(error))
        for fd in given:
            with contextlib.suppress(OSError):
                os.close(fd)
        if is_on:
            self.give, self.take = connection_passing.pair()

    @property
    def is_on(self) -> bool:
        """Whether there is a pair."""
        return self.give is not None

    def is_taken_from(self, cfg: Config) -> bool:
        """Tell whether workers with this configuration take what the predecessor sends."""
        return self.was_inherited and are_taken(cfg)

    def inheritance(self) -> dict[str, Any]:
        """Return what a successor is given of it, as fields of `Inheritance`."""
        if self.give is None or self.take is None:
            return {}
        return {"exchange_give": self.give.fileno(), "exchange_take": self.take.fileno()}

    def descriptors(self) -> list[int]:
        """Return the descriptors of both ends."""
        return [end.fileno() for end in (self.give, self.take) if end is not None]

    def close(self) -> None:
        """Close this process's copies."""
        for end in (self.give, self.take):
            if end is not None:
                end.close()
        self.give = self.take = None
