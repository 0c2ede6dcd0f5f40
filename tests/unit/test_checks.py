"""Checks: what fails, how soon, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from zdd_web import checks
from zdd_web.checks import check, failing, pass_all
from zdd_web.errors import SettingsError


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checks, "_checks", {})
    monkeypatch.setattr(checks, "AGAIN", 0.01)
    monkeypatch.setattr(checks, "BEAT", 0.01)
    yield


def quiet() -> None:
    pass


def test_what_raises_returns_false_or_hangs_has_failed_and_the_rest_has_not() -> None:
    never = threading.Event()

    @check("passes")
    def passes() -> None: ...

    @check("true")
    def true() -> bool:
        return True

    @check("false")
    def false() -> bool:
        return False

    @check("raises")
    def raises() -> None:
        raise ConnectionRefusedError("no database")

    @check("hangs", timeout=0.05)
    def hangs() -> None:
        never.wait(30)

    @check("asynchronous")
    async def asynchronous() -> bool:
        return False

    try:
        assert failing(quiet) == {
            "false": "it returned False",
            "raises": "ConnectionRefusedError: no database",
            "hangs": "no answer within 0.05 s",
            "asynchronous": "it returned False",
        }
    finally:
        never.set()


def test_a_check_that_hangs_is_not_started_a_second_time() -> None:
    never, started = threading.Event(), []

    @check("hangs", timeout=0.02)
    def hangs() -> None:
        started.append(1)
        never.wait(30)

    try:
        for _ in range(5):
            assert failing(quiet) == {"hangs": "no answer within 0.02 s"}
        assert started == [1]
    finally:
        never.set()


def test_a_worker_waits_beats_and_says_why_until_the_critical_checks_pass(caplog: pytest.LogCaptureFixture) -> None:
    tries, beats, said = [], [], []

    @check("database")
    def database() -> bool:
        tries.append(1)
        return len(tries) >= 3

    @check("cache", critical=False)
    def cache() -> bool:
        return False

    pass_all(lambda: beats.append(1), said.append)
    assert len(tries) == 3
    assert len(beats) >= 2
    assert said == ["check 'database' failed: it returned False"] * 2 + [""]
    # Once for as long as it fails in the same way.
    assert sorted(record.getMessage() for record in caplog.records) == [
        'event=check.failed check=cache critical=False error="it returned False"',
        'event=check.failed check=database critical=True error="it returned False"',
    ]


def test_without_checks_nobody_waits() -> None:
    pass_all(quiet, lambda why: None)


def test_one_name_is_one_check() -> None:
    @check("database")
    def one() -> None: ...

    with pytest.raises(SettingsError, match=r"check 'database' is registered twice, by .*one and .*two: give one"):

        @check("database")
        def two() -> None: ...

    # The same place, imported again.
    check("database")(one)


@pytest.mark.parametrize("name", ["", "two words", 5, "a-b"])
def test_a_name_can_be_logged(name: object) -> None:
    with pytest.raises(SettingsError, match="a name must be letters"):
        check(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, 61, True, "2", float("nan")])
def test_a_time_limit_is_one(timeout: object) -> None:
    with pytest.raises(SettingsError, match="must be seconds between 0 and 60"):
        check("database", timeout=timeout)  # type: ignore[arg-type]
