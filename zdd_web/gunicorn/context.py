"""What the roles of one master share: its generation.

A role of the master (its listeners, its workers, its successor, its end) receives a `Generation` and the few other
things that it uses. None receives the master, so what a role depends on is what its constructor lists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from zdd_web import lifecycle, log
from zdd_web.board import Board
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.lifecycle import Event, Phase
from zdd_web.settings import Settings
from zdd_web.system import clock


class Predecessor(Protocol):
    """The master before this one, as the roles of this one see it; see `PredecessorLink`."""

    @property
    def is_active(self) -> bool:
        """Whether it has handed the service over."""

    @property
    def alone(self) -> bool:
        """Whether it has ended before it could."""

    def follow(self) -> bool:
        """Read its messages; return whether it is gone, and this object of no more use."""

    def release(self) -> None:
        """Tell it not to come back: this generation ends because it was asked to."""

    def fail(self, reason: str) -> None:
        """Tell it why there will be no handover."""

    def unlink_pid_file(self) -> None:
        """Remove a pid file that names this master although it has not been handed the service."""


class Generation:
    """The board of this generation, its settings, its phase, and its predecessor while there is one."""

    def __init__(self, board: Board, settings: Callable[[], Settings]) -> None:
        """`settings` returns those in force, which a reload may change: no role keeps a copy."""
        self.board, self.header = board, board.header
        self._settings = settings
        self.predecessor: Predecessor | None = None
        self._entered: Callable[[Phase, Phase], None] = lambda before, after: None
        self._workers: Callable[[], int] = lambda: 0
        self._actions: Mapping[str, Callable[[], object]] = {}

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings()

    @property
    def phase(self) -> Phase:
        """The phase of this generation."""
        return Phase(self.header.phase)

    @property
    def awaits_promotion(self) -> bool:
        """Whether the predecessor has not handed over yet."""
        return self.predecessor is not None and not self.predecessor.is_active

    def read_predecessor(self) -> None:
        """Read the predecessor's messages before a signal is obeyed.

        It may have handed over a moment before the signal was sent, whose sender has seen that.
        """
        if self.predecessor is not None:
            guarded("predecessor", self.predecessor.follow)()

    def release_predecessor(self) -> None:
        """Tell a predecessor that still retires not to come back."""
        if self.predecessor is not None:
            self.predecessor.release()

    def on_move(
        self,
        workers: Callable[[], int],
        entered: Callable[[Phase, Phase], None],
        actions: Mapping[str, Callable[[], object]],
    ) -> None:
        """Have `entered(before, after)` called after each move, then those of `actions` that `ON_ENTRY` names.

        `workers` counts the workers for the log.
        """
        self._workers, self._entered, self._actions = workers, entered, actions

    def move(self, event: Event, level: int = logging.INFO, **fields: Any) -> None:
        """Enter the phase that follows upon an event, log it, and run the phase's entry actions.

        Raises `LifecycleError`, and changes nothing, when no phase follows. An action that fails is logged and leaves
        the others to run.
        """
        since, before = self.header.phase_since, self.phase
        phase = lifecycle.after(before, event)
        if phase is before:
            return
        self.header.phase_since = clock.now_ns()
        self.header.phase = phase
        log.emit(f"phase.{phase.label}", level, after=round(clock.since(since), 3), workers=self._workers(), **fields)
        guarded("systemd", self._entered)(before, phase)
        for name in lifecycle.ON_ENTRY.get(phase, ()):
            guarded(name, self._actions[name])()
