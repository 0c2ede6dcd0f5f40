"""The table of what zdd_web replaces, against this gunicorn: every class of it is there, and is called as expected."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from tests.contract.stock import an_arbiter
from zdd_web.gunicorn.adapter import patches
from zdd_web.gunicorn.adapter.patches import PATCHES
from zdd_web.gunicorn.adapter.versions import INSTALLED, check_version, numbers

#: Modules that only some releases, or only some installations, have.
OPTIONAL = {"gunicorn.workers.gasgi": (24,), "gunicorn.asgi.protocol": (24,)}
NEED = {"gunicorn.workers.ggevent": "gevent", "uvicorn_worker._workers": "uvicorn_worker"}

MODULES = sorted({row.module for row in PATCHES})


def test_this_gunicorn_is_supported() -> None:
    check_version()


@pytest.mark.parametrize("module", MODULES)
def test_what_is_replaced_is_there_and_called_as_expected(module: str) -> None:
    if numbers(INSTALLED) < OPTIONAL.get(module, ()):
        pytest.skip(f"gunicorn {INSTALLED} has no {module}")
    if module in NEED and importlib.util.find_spec(NEED[module]) is None:
        pytest.skip(f"{NEED[module]} is not installed")
    patches.check(module, rows=[row for row in PATCHES if row.module == module])


@pytest.mark.parametrize("module", sorted({row.module for row in PATCHES if row.owner == row.module and not row.takes}))
def test_modules_have_the_values_that_are_replaced(module: str) -> None:
    names = [row.name for row in PATCHES if row.owner == module and not row.takes and row.exists_in(INSTALLED)]
    if module in NEED:
        pytest.importorskip(NEED[module])
    assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []


@pytest.mark.parametrize("row", [row for row in PATCHES if row.since != (23,)], ids=lambda row: row.label)
def test_since_is_the_first_release_that_has_it(row: patches.Patch) -> None:
    if row.exists_in(INSTALLED) or importlib.util.find_spec(row.module.partition(".")[0]) is None:
        return
    try:
        owner = importlib.import_module(row.module)
    except ImportError:
        return
    if row.owner != row.module:
        owner = getattr(owner, row.owner.rpartition(".")[2], None)
    assert not hasattr(owner, row.name)


def test_an_arbiter_has_the_values_that_are_written() -> None:
    patches.check_values(an_arbiter())
