from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.casting import CLASSES, PLAYS_ALL, is_left_out
from tests.processes.harness import Service


@pytest.fixture(autouse=True)
def no_strange_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is the tests' own from every master that they start: pytest-django's settings module would be read."""
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    # Services know no such settings. Not taken out at import: xdist's workers have them from the controller.
    for name in [name for name in os.environ if name.startswith("ZDD_WEB_TEST_")]:
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the worker classes out that do not play a scene; see tests/helpers/casting.py."""
    if PLAYS_ALL:
        return
    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(params=CLASSES)
def worker_class(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Service]]:
    """Make services; a failing test prints their logs, and none leaves a process behind."""
    made: list[Service] = []

    def make(worker_class: str = "gthread", **options: Any) -> Service:
        directory = tmp_path / f"service{len(made)}"
        directory.mkdir()
        service = Service(directory, worker_class, **options)
        made.append(service)
        return service

    yield make
    failed = getattr(request.node, "failed", False)
    for service in made:
        if failed:
            print(f"--- log of {service.name}\n{service.log()}")
        service.clean_up()


@pytest.fixture
def service(make_service: Callable[..., Service], worker_class: str) -> Service:
    """A service that is not started yet, for each worker class."""
    return make_service(worker_class)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().failed:
        item.failed = True  # type: ignore[attr-defined]
