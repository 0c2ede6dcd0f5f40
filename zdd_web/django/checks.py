"""Checks of Django's databases and caches, to be named in `ZDD_WEB["CHECKS"]`.

Each run is in a thread of its own, so Django gives it a connection of its own, which is closed again: no request shares
it, and one that hangs keeps no other.
"""

from __future__ import annotations

import uuid

from django.core.cache import caches
from django.db import connections
from django.db.migrations.executor import MigrationExecutor


def database(alias: str = "default") -> None:
    """Ask a database for nothing, on a new connection. Raises what Django's backend raises."""
    connection = connections[alias]
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT 1{connection.features.bare_select_suffix}")
            cursor.fetchone()
    finally:
        connection.close()


def cache(alias: str = "default") -> None:
    """Set a key, read it and delete it. Raises `RuntimeError` when another value comes back."""
    cache = caches[alias]
    # Of its own, since every worker does so at the same time.
    key = f"zdd_web:check:{uuid.uuid4().hex}"
    cache.set(key, key, timeout=30)
    found = cache.get(key)
    cache.delete(key)
    if found != key:
        raise RuntimeError(f"cache {alias!r} answered {found!r} for a key that was set a moment ago")


def migrations(alias: str = "default") -> None:
    """Look for migrations that this code has and the database has not. Raises `RuntimeError` with their names.

    For new workers only: code that serves is not worse for a migration that has not been applied yet.
    """
    connection = connections[alias]
    try:
        executor = MigrationExecutor(connection)
        plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    finally:
        connection.close()
    if plan:
        missing = ", ".join(f"{migration.app_label}.{migration.name}" for migration, backwards in plan)
        raise RuntimeError(f"{len(plan)} unapplied migrations: {missing}: run `manage.py migrate --database {alias}`")


migrations.zdd_check = {"kind": "startup", "timeout": 30.0}  # type: ignore[attr-defined]
