"""What the helpers of the tests promise: each test has a tier, and CI takes no skip that is not on its list."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import casting, skips, tiers


def test_examples_of_the_helpers_do_what_they_say() -> None:
    for module in (casting, tiers):
        results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert results.attempted > 0
        assert results.failed == 0


def test_every_test_file_is_in_a_tier_that_is_described() -> None:
    for path in tiers.TESTS.rglob("test_*.py"):
        assert set(tiers.markers_of(path)) <= set(tiers.MEANING), path


def test_file_in_no_tier_ends_the_run_with_what_to_do() -> None:
    with pytest.raises(pytest.UsageError, match=r"^elsewhere/test_new\.py is in none of the tiers pure, os, .*: see"):
        tiers.markers_of(tiers.TESTS / "elsewhere" / "test_new.py")


def test_smoke_has_a_scene_for_each_promise_and_mode() -> None:
    text = "".join(path.read_text() for path in (tiers.TESTS / "processes/smoke").glob("test_*.py"))
    assert 12 <= text.count("\ndef test_") <= 15


@pytest.fixture
def listed(tmp_path: Path) -> skips.AllowedSkips:
    path = tmp_path / "allowed.txt"
    path.write_text("# the list\n\nno cgroup2  # containers have none\n")
    return skips.AllowedSkips(path)


def report(reason: str | None, **more: object) -> SimpleNamespace:
    longrepr = None if reason is None else ("test_it.py", 7, f"Skipped: {reason}")
    return SimpleNamespace(skipped=reason is not None, longrepr=longrepr, nodeid="test_it.py::test_x", **more)


def carried_out(plugin: skips.AllowedSkips, made: SimpleNamespace) -> SimpleNamespace:
    """Pass a report through the hook, as pluggy does."""
    hook = plugin.pytest_runtest_makereport()
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(SimpleNamespace(get_result=lambda: made))  # type: ignore[attr-defined]
    return made


def test_skip_on_the_list_is_taken(listed: skips.AllowedSkips) -> None:
    made = carried_out(listed, report("no cgroup2 that can be written to", outcome="skipped"))
    assert made.outcome == "skipped"


def test_skip_that_is_not_on_the_list_is_a_failure_that_says_what_to_do(listed: skips.AllowedSkips) -> None:
    made = carried_out(listed, report("runsv is not installed", outcome="skipped"))
    assert made.outcome == "failed"
    assert "test_it.py::test_x was skipped" in made.longrepr
    assert "runsv is not installed" in made.longrepr
    assert ".ci/install-what-tests-need" in made.longrepr


@pytest.mark.parametrize(
    "made",
    [
        report(None, outcome="passed"),
        # An xfail is reported as a skip with another attribute.
        report("a known fault", outcome="skipped", wasxfail="a known fault"),
    ],
    ids=["passed", "xfail"],
)
def test_what_is_no_skip_is_left_alone(listed: skips.AllowedSkips, made: SimpleNamespace) -> None:
    before = made.outcome
    assert carried_out(listed, made).outcome == before


def test_list_that_gives_no_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "allowed.txt"
    path.write_text("\nneeds root\n")
    with pytest.raises(pytest.UsageError, match=r"allowed\.txt:2: say after a # why 'needs root' may be a reason"):
        skips.read(path)
    with pytest.raises(pytest.UsageError, match=r"nowhere.txt: No such file"):
        skips.read(tmp_path / "nowhere.txt")


def test_list_of_the_repository_can_be_read() -> None:
    skips.read(tiers.TESTS / "allowed_skips.txt")
