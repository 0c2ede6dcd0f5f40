from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.helpers import bytecode
from tests.helpers.casting import description
from tests.helpers.skips import AllowedSkips
from tests.helpers.tiers import Tiers

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=20)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=100)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
hypothesis.settings.load_profile(PROFILE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", type=str, help="fail on a skip whose reason is not in this file")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(config), "zdd_web_tiers")
    config.addinivalue_line("markers", "begins_first: takes a minute beside others, and is begun before them")
    if not hasattr(config, "workerinput"):
        bytecode.write(config)
    if allowed := config.getoption("allowed_skips"):
        config.pluginmanager.register(AllowedSkips(Path(allowed)), "zdd_web_allowed_skips")


def pytest_report_header() -> list[str]:
    return [
        "tiers: -m fast, os, smoke, processes; all of them without -m; -m long for what takes minutes",
        f"hypothesis profile: {PROFILE} (HYPOTHESIS_PROFILE=dev|ci)",
        *description(),
    ]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, begin with the tests that take longest: one that is begun last is waited for by all others."""
    if not hasattr(config, "workerinput"):
        return
    # Each process has a run of neighbours to begin with (see the scheduler below), and the same number of these.
    count = config.workerinput["workercount"]
    first = [item for item in items if item.get_closest_marker("begins_first")]
    rest = [item for item in items if not item.get_closest_marker("begins_first")]
    items[:] = [
        item
        for k in range(count)
        for item in (*first[k::count], *rest[k * len(rest) // count : (k + 1) * len(rest) // count])
    ]


def pytest_collection_finish() -> None:
    """Keep what the collection has made out of garbage collection: tests that collect garbage would visit it each time.

    5,000 tests are a million objects, and to visit them takes 0.1 s.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have processes that are done take tests from the others, with `pytest -n 8` and no `--dist`.

    xdist deals tests out by the hundred, and some of ours take a thousand times as long as others: the last process
    was alone for the last minutes, with one of two cores.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def not_in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the same defaults where the tests run in a pod, whose stops take longer."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
