"""The end of a boot: all workers are ready, the predecessor lets this generation serve, and the listeners listen."""

from __future__ import annotations

import os
from collections.abc import Callable

from zdd_web import log
from zdd_web.board import WorkerState
from zdd_web.gunicorn.adapter.exits import WORKER_BOOT_ERROR, HaltServer
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.master.worker_roster import Roster
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.upgrade.predecessor_link import PredecessorLink
from zdd_web.lifecycle import Event
from zdd_web.system import clock


class Boot:
    """How far this generation is from serving."""

    def __init__(
        self,
        generation: Generation,
        roster: Roster,
        listening: ListenerManager,
        predecessor: Callable[[], PredecessorLink | None],
        required: Callable[[], int],
    ) -> None:
        """`predecessor` returns the link to the master before this one, None when there is none or it has gone.

        `required` returns how many workers must be ready.
        """
        self._generation, self._header = generation, generation.header
        self._roster, self._listening, self._predecessor = roster, listening, predecessor
        self._required = required

    def follow(self) -> None:
        """Begin to serve once every worker is ready; the tick's call. Raises `HaltServer`."""
        ready = sum(member.state is WorkerState.READY for member in self._roster.members())
        if ready < self._required():
            return
        predecessor_link = self._predecessor()
        if predecessor_link is None or predecessor_link.may_serve(ready):
            self._serve(predecessor_link)

    def _serve(self, predecessor_link: PredecessorLink | None) -> None:
        if predecessor_link is not None:
            predecessor_link.about_to_serve()
        try:
            self._listening.open()
        except OSError as error:
            reason = f"the listeners cannot listen: {error.strerror}"
            if predecessor_link is not None:
                predecessor_link.fail(reason)
            raise HaltServer(log.one_line(reason), WORKER_BOOT_ERROR) from None
        self._header.ready_at = clock.now_ns()
        self._generation.move(Event.READY, pid=os.getpid())
