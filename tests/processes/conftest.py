from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.harness import Service


@pytest.fixture(autouse=True)
def no_strange_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is the tests' own from every master that they start: pytest-django's settings module would be read."""
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    # To a service it would be an unknown setting. Not taken out at import: xdist's workers have it from the controller.
    monkeypatch.delenv("ZDD_WEB_TEST_CLASSES", raising=False)


#: A scene is played by one of each of these, whichever falls to its name; by every one where ZDD_WEB_TEST_CLASSES=all
#: asks for it, and always in the test of the upgrade itself. All of them do not fit into fifteen minutes on two cores.
CLASSES = ("sync", "gthread")
LOOPS = ("gevent", "asgi", "uvicorn_worker.UvicornWorker")
ALWAYS_ALL = "test_upgrade.py"
PLAYS_ALL = os.environ.get("ZDD_WEB_TEST_CLASSES") == "all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other classes out."""
    if PLAYS_ALL:
        return
    left_out = [item for item in items if _is_the_others(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_the_others(item: pytest.Item) -> bool:
    chosen = getattr(item, "callspec", None)
    mine = chosen.params.get("worker_class") if chosen is not None else None
    family = next((each for each in (CLASSES, LOOPS) if mine in each), ())
    if not family or item.path.name == ALWAYS_ALL:
        return False
    if any("worker_class" in mark.args[0] for mark in item.iter_markers("parametrize")):
        return False  # the test has chosen itself
    rest = {name: value for name, value in chosen.params.items() if name != "worker_class"}  # type: ignore[union-attr]
    name = f"{item.path.name} {getattr(item, 'originalname', item.name)} {sorted(map(str, rest.items()))}"
    return family[zlib.crc32(name.encode()) % len(family)] != mine


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
