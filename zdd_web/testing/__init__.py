"""A pytest plugin: an app's own deploy as a test, and tests that leave nothing of an app behind.

PYTEST_DONT_REWRITE: nothing is asserted here, and a test suite may import this before it is a plugin.

    # conftest.py
    pytest_plugins = ["zdd_web.testing"]

    # test_deploy.py
    def test_a_deploy_loses_nothing(zdd_rehearse):
        zdd_rehearse("path/to/the/app")

`zdd_rehearse` runs the app under real gunicorn in processes of its own, as `zdd-web rehearse` does. `zdd_reset` has a
test leave no checks, groups or settings behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zdd_web.testing.rehearsal import Rehearsal, rehearse
from zdd_web.testing.reset import kept

__all__ = ["Rehearsal", "kept", "rehearse", "zdd_rehearse", "zdd_reset"]


@pytest.fixture
def zdd_rehearse(tmp_path: Path) -> Callable[..., Rehearsal]:
    """Return `rehearse()`, with the page of the report in the test's `tmp_path`."""
    return functools.partial(rehearse, html=tmp_path / "rehearsal.html")


@pytest.fixture
def zdd_reset() -> Iterator[None]:
    """Take back at the end of a test what it registered with zdd_web in this process; see `kept()`."""
    with kept():
        yield
