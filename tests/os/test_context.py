"""A move of the phase: what is written, logged and done, in which order."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.generations import a_generation
from zdd_web.board import Board
from zdd_web.errors import LifecycleError
from zdd_web.gunicorn import settings_in_force
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.read_django_settings import SETTINGS_MODULE
from zdd_web.lifecycle import ON_ENTRY, Event, Phase


@pytest.fixture
def done() -> list[str]:
    return []


@pytest.fixture
def generation(done: list[str]) -> Generation:
    made = a_generation(Board.private())

    def entered(before: Phase, after: Phase) -> None:
        assert made.phase is after
        done.append(f"{before} -> {after}")

    def action(name: str) -> Any:
        return lambda: done.append(name)

    made.on_move(lambda: 2, entered, {name: action(name) for names in ON_ENTRY.values() for name in names})
    return made


def test_a_move_is_logged_and_followed_by_the_entry_actions(
    generation: Generation, done: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "zdd_web"):
        generation.move(Event.STOP)
        generation.move(Event.LAME_DUCK_OVER)
    assert done == ["serving -> lame_duck", "lame_duck -> draining", "block_new_connections", "retire_workers"]
    assert "event=phase.draining" in caplog.text
    assert "workers=2" in caplog.text


def test_an_event_that_leads_to_the_same_phase_does_nothing(generation: Generation, done: list[str]) -> None:
    generation.header.phase = Phase.DRAINING
    generation.move(Event.STOP)
    assert done == []


def test_an_event_that_is_not_known_raises_and_does_nothing(generation: Generation, done: list[str]) -> None:
    since = generation.header.phase_since
    with pytest.raises(LifecycleError):
        generation.move(Event.FINISHED)
    assert (generation.phase, generation.header.phase_since, done) == (Phase.SERVING, since, [])


def test_an_action_that_fails_is_logged_and_leaves_the_others_to_run(
    generation: Generation, done: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError("no descriptor left")

    actions = {"drain_unwanted_listeners": fails, "retire_workers": lambda: done.append("retire_workers")}
    generation.on_move(lambda: 0, lambda before, after: None, actions)
    generation.move(Event.SUCCEEDED)
    assert (generation.phase, done) == (Phase.RETIRING, ["retire_workers"])
    assert "where=drain_unwanted_listeners" in caplog.text


def test_promotion_is_awaited_while_a_predecessor_has_not_handed_over(generation: Generation) -> None:
    assert not generation.awaits_promotion
    generation.release_predecessor()
    released: list[bool] = []
    predecessor: Any = SimpleNamespace(is_active=False, release=lambda: released.append(True))
    generation.predecessor = predecessor
    assert generation.awaits_promotion
    generation.release_predecessor()
    assert released == [True]
    predecessor.is_active = True
    assert not generation.awaits_promotion


def test_settings_of_a_generation_are_those_in_force_after_a_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_in_force, "_in_force", None)
    monkeypatch.setattr(settings_in_force, "_installed", {})
    monkeypatch.setattr(settings_in_force, "_settled", False)
    monkeypatch.delenv(SETTINGS_MODULE, raising=False)
    cfg: Any = SimpleNamespace(env={})
    settings_in_force.take({"readiness_path": "/ready"})
    settings_in_force.settle(cfg)
    generation = Generation(Board.private(), settings_in_force.in_force)
    assert generation.settings.readiness_path == "/ready"
    settings_in_force.take({"readiness_path": "/ready-2"})
    settings_in_force.settle(cfg)
    assert generation.settings.readiness_path == "/ready-2"
