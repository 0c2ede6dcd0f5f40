"""The table of what is replaced in gunicorn, and its check against the gunicorn that is installed."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from gunicorn.arbiter import Arbiter
from gunicorn.workers.sync import SyncWorker

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.adapter import patches
from zdd_web.gunicorn.adapter.patches import PATCHES, Patch
from zdd_web.gunicorn.adapter.versions import numbers

MANAGE = next(row for row in PATCHES if row.label == "Arbiter.manage_workers")


def test_this_gunicorn_passes() -> None:
    patches.check("gunicorn.workers.sync", "gunicorn.workers.gthread")


def test_no_row_is_there_twice() -> None:
    names = [(row.owner, row.name) for row in PATCHES]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("row", PATCHES, ids=lambda row: row.label)
def test_every_row_says_why(row: Patch) -> None:
    assert row.why
    assert row.since < row.until
    assert row.owner.startswith(("gunicorn.", "uvicorn_worker."))


def test_method_that_takes_another_argument_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def manage_workers(self: Arbiter, extra: int) -> None: ...

    monkeypatch.setattr(Arbiter, "manage_workers", manage_workers)
    with pytest.raises(SettingsError) as error:
        patches.check(version="27.9")
    assert str(error.value) == (
        "gunicorn 27.9 changed Arbiter.manage_workers(self, extra): zdd_web replaces it as (self) (spawns, retires, "
        "drains and ends by the roster's plan): install another release of gunicorn>=23,<28, or a newer zdd_web"
    )


def test_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Arbiter, "halt")
    with pytest.raises(SettingsError, match=re.escape("has no Arbiter.halt(self, reason=None, exit_status=0), which")):
        patches.check()


def test_function_of_a_module_is_checked_too() -> None:
    row = Patch("gunicorn.util", "close", "for this test", ("(connection)",))
    with pytest.raises(SettingsError, match=re.escape("changed gunicorn.util.close(sock): zdd_web")):
        patches.check(rows=[row])


@pytest.mark.parametrize(("version", "is_checked"), [("25.3.0", False), ("26.0.0", True), ("27.0.1", False)])
def test_row_counts_in_its_releases_only(version: str, is_checked: bool) -> None:
    row = Patch("gunicorn.arbiter.Arbiter", "not_there", "for this test", ("(self)",), since=(26,), until=(27,))
    assert row.exists_in(version) is is_checked
    if is_checked:
        with pytest.raises(SettingsError):
            patches.check(rows=[row], version=version)
    else:
        patches.check(rows=[row], version=version)


def test_worker_class_that_is_not_loaded_is_not_checked() -> None:
    patches.check(rows=[Patch("gunicorn.workers.unheard_of.Worker", "run", "for this test", ("(self)",))])


def test_wrapper_that_takes_anything_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tracing libraries replace methods too, by something that passes on whatever it is given.
    monkeypatch.setattr(Arbiter, "stop", lambda *args, **kwargs: None)
    patches.check()


def test_what_has_no_row_is_refused() -> None:
    worker = SyncWorker.__new__(SyncWorker)
    with pytest.raises(LookupError, match=r"SyncWorker.is_parent_alive has no row .*: add one"):
        patches.replace(worker, "is_parent_alive", lambda: True)  # gthread's has one
    with pytest.raises(LookupError, match=r"SyncWorker.nr has no row"):
        patches.write(worker, "nr", 1)
    with pytest.raises(LookupError, match=r"has no row"):
        patches.write(SimpleNamespace(), "unheard_of", 1)


def test_replaced_method_comes_back() -> None:
    worker = SyncWorker.__new__(SyncWorker)
    before = patches.replace(worker, "notify", print)
    assert worker.notify is print
    patches.restore(worker, "notify")
    patches.restore(worker, "notify")
    assert worker.notify == before


def test_value_that_is_gone_is_named() -> None:
    arbiter = Arbiter.__new__(Arbiter)
    vars(arbiter).update(dict.fromkeys(("pidfile", "systemd", "reexec_pid", "master_pid", "log", "SIG_QUEUE"), 0))
    arbiter._num_workers = 2
    patches.check_values(arbiter)
    del arbiter.reexec_pid
    with pytest.raises(SettingsError, match=r"27\.9 has no Arbiter\.reexec_pid, which zdd_web writes \("):
        patches.check_values(arbiter, version="27.9")


def test_versions_are_compared_by_number() -> None:
    assert numbers("9.1") < numbers("23.0.0") < numbers("27.0.1") < numbers("28")
