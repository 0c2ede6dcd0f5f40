"""A generation for the tests of its roles: a board of this process and the settings that a test wants."""

from __future__ import annotations

from typing import Any

from zdd_web.board import Board
from zdd_web.gunicorn.context import Generation
from zdd_web.lifecycle import ON_ENTRY, Phase
from zdd_web.settings import Settings


def a_generation(board: Board, phase: Phase = Phase.SERVING, **settings: Any) -> Generation:
    """Return one that has no predecessor, and whose entry actions do nothing."""
    in_force = Settings(**settings)
    generation = Generation(board, lambda: in_force)
    generation.header.phase = phase
    actions = {name: lambda: None for names in ON_ENTRY.values() for name in names}
    generation.on_move(lambda: 0, lambda before, after: None, actions)
    return generation
