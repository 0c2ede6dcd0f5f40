"""How many workers there may be: SIGTTIN, SIGWINCH and the control socket, and the slots of the board."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from zdd_web import log
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.master.worker_plan import Plan


class Capacity:
    """The requests for another number of workers, and the refusals."""

    def __init__(self, server: ArbiterFacade, slots: int, not_now: Callable[[], str]) -> None:
        """`not_now` returns why the workers must not be changed just now, or ""."""
        self._server, self._slots, self._not_now = server, slots, not_now
        self._has_room = True

    def take_over(self) -> None:
        """Handle the signals in gunicorn's place."""
        self._gunicorn_winch: Callable[[], None] = self._server.replace(
            "handle_winch", guarded("handle_winch", self.handle_winch)
        )
        self._gunicorn_ttin: Callable[[], None] = self._server.replace(
            "handle_ttin", guarded("handle_ttin", self.handle_ttin)
        )

    def handle_winch(self) -> None:
        """SIGWINCH: a daemon retires all workers until others are asked for; any other process ignores it."""
        reason = self._not_now()
        if self._server.cfg.daemon and reason:
            log.emit("refused", logging.WARNING, signal="WINCH", reason=reason,
                      remedy="an upgrade takes the old workers away by itself")  # fmt: skip
            return
        self._gunicorn_winch()

    def handle_ttin(self) -> None:
        """SIGTTIN: one more worker, if the board has a slot for it."""
        wanted = self._server.num_workers + 1
        if wanted > self._slots:
            self._refuse(wanted, signal="TTIN")
            return
        self._gunicorn_ttin()

    def limit(self) -> None:
        """Undo a request for more workers than there are slots that came by gunicorn's control socket.

        `worker add` there changes `num_workers` and calls no handler.
        """
        if self._server.num_workers > self._slots:
            self._refuse(self._server.num_workers, request="workers")
            self._server.want(self._slots)

    def _refuse(self, wanted: int, **by: Any) -> None:
        reason = too_many_workers(wanted, self._slots)
        log.emit("refused", logging.WARNING, **by, reason=reason, remedy="start another service beside this one")

    def note_room(self, decision: Plan, any_leaves: Callable[[], bool]) -> None:
        """Log that replacements wait for a slot, once; workers that retire or leave free theirs by themselves."""
        stuck = bool(decision.without_room) and not (decision.spawn or decision.retire or any_leaves())
        if stuck and self._has_room:
            log.emit("refused", logging.WARNING, request="replacement", workers=decision.without_room,
                     reason=f"all {self._slots} slots of the board are taken; the old workers serve on",
                     remedy="run fewer workers (SIGTTOU)")  # fmt: skip
        self._has_room = not stuck


def too_many_workers(workers: int, slots: int) -> str:
    """Return why there cannot be so many workers, or "".

    >>> too_many_workers(512, 512)
    ''
    >>> too_many_workers(600, 512)
    'workers = 600: the board has 512 slots, one for each worker: run fewer'
    """
    return (
        f"workers = {workers}: the board has {slots} slots, one for each worker: run fewer" if workers > slots else ""
    )
