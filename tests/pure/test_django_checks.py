"""The checks that come with the Django adaptor, against Django's own backends."""

from __future__ import annotations

import pytest
from django.core.cache import caches
from django.db import connection, connections
from django.db.migrations.recorder import MigrationRecorder
from django.db.utils import ConnectionDoesNotExist, OperationalError
from django.test import override_settings

from zdd_web.checks import load, registered, registry
from zdd_web.django import checks
from zdd_web.health import Kind
from zdd_web.settings import Settings


@pytest.mark.django_db
def test_a_database_that_answers_passes() -> None:
    checks.database()
    checks.migrations()


@pytest.mark.django_db
def test_a_database_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OperationalError("connection refused")

    monkeypatch.setattr(type(connections["default"]), "cursor", refuse)
    with pytest.raises(OperationalError, match="connection refused"):
        checks.database()


def test_an_alias_that_does_not_exist_fails() -> None:
    with pytest.raises(ConnectionDoesNotExist, match="replica"):
        checks.database(alias="replica")


@pytest.mark.django_db
def test_migrations_that_are_not_applied_are_named() -> None:
    MigrationRecorder(connection).record_unapplied("sessions", "0001_initial")
    with pytest.raises(RuntimeError, match=r"^1 unapplied migrations: sessions\.0001_initial: run `manage\.py migrate"):
        checks.migrations()


def test_a_cache_gives_back_what_it_was_given() -> None:
    checks.cache()
    assert caches["default"]._cache == {}  # type: ignore[attr-defined]
    dummy = override_settings(CACHES={"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}})
    with dummy, pytest.raises(RuntimeError, match="cache 'default' answered None"):
        checks.cache()


def test_they_can_be_named_in_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "shared", registry.Registry())
    paths = [f"zdd_web.django.checks.{name}" for name in ("database", "cache", "migrations")]
    load(Settings(checks=paths).checks)  # type: ignore[arg-type]
    assert [(each.name, each.kind, each.timeout) for each in registered()] == [
        ("database", Kind.READINESS, 2),
        ("cache", Kind.READINESS, 2),
        ("migrations", Kind.STARTUP, 30),
    ]
