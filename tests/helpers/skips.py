"""A test that is skipped shows nothing. Where CI asks for it, only the skips of a list in the repository are taken.

`pytest --allowed-skips=tests/allowed_skips.txt` fails a test that was skipped for a reason that is not on the list.
Each line of the list is a part of a reason; what follows a `#` says why the test may be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


def read(path: Path) -> list[str]:
    """Return the parts of reasons that a list allows.

    Raises:
        pytest.UsageError: there is no such file, or a line does not say why.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise pytest.UsageError(f"--allowed-skips={path}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        reason, _, why = (part.strip() for part in line.partition("#"))
        if reason and not why:
            raise pytest.UsageError(f"{path}:{number}: say after a # why {reason!r} may be a reason to skip")
        found += [reason] if reason else []
    return found


class AllowedSkips:
    """The plugin that turns a skip for another reason into a failure."""

    def __init__(self, path: Path) -> None:
        self._path, self._allowed = path, read(path)

    def _refused(self, report: pytest.TestReport | pytest.CollectReport) -> str | None:
        """Return what to say of a skip that is not on the list; None of all else."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return None
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if any(each in reason for each in self._allowed):
            return None
        return (
            f"{report.nodeid} was skipped, and its reason is not in {self._path}:\n    {reason}\n"
            f"Install what the test needs (.ci/install-what-tests-need), or add a part of the reason to that file."
        )

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        outcome = yield
        report = outcome.get_result()  # type: ignore[attr-defined]
        if refused := self._refused(report):
            report.outcome, report.longrepr = "failed", refused

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self) -> Iterator[None]:
        outcome = yield
        report = outcome.get_result()  # type: ignore[attr-defined]
        if refused := self._refused(report):
            report.outcome, report.longrepr = "failed", refused
