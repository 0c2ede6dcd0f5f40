"""The pytest plugin with both example apps, as their own tests would use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zdd_web.testing import Rehearsal

pytest_plugins = ["zdd_web.testing"]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("example", ["example_flask", "example_django"])
def test_a_deploy_of_an_example_loses_nothing(
    example: str, zdd_rehearse: Callable[..., Rehearsal], tmp_path: Path
) -> None:
    found = zdd_rehearse(ROOT / example, env={"DATABASE_PATH": str(tmp_path / "db.sqlite3")}, paths=["/", "3:/items"])
    assert found.lost == 0
    assert found.requests > 0
    assert (tmp_path / "rehearsal.html").read_text().startswith("<!doctype html>")


def test_an_app_that_does_not_start_fails_with_its_log(zdd_rehearse: Callable[..., Rehearsal], tmp_path: Path) -> None:
    (tmp_path / "gunicorn.conf.py").write_text(
        "wsgi_app = 'nowhere:app'\nfrom zdd_web.gunicorn import install\ninstall(globals())\n"
    )
    with pytest.raises(AssertionError, match=r"(?s)exit status 2.*No module named 'nowhere'"):
        zdd_rehearse(tmp_path)
