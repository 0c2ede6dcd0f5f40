"""What the pytest plugin takes back between tests, and how it fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import flask
import pytest

import zdd_web
from zdd_web import checks, process, testing, waitgroup
from zdd_web.errors import LifecycleError
from zdd_web.flask import ZddWeb
from zdd_web.probes import Probes

pytest_plugins = ["zdd_web.testing"]


def names() -> list[str]:
    return [each.name for each in checks.registered()]


def test_what_a_test_registers_is_gone_behind_it_and_what_was_there_before_is_not() -> None:
    with testing.kept():
        zdd_web.check("of_a_module")(lambda: True)
        drained: list[str] = []
        zdd_web.on_drained(lambda: drained.append("module"))
        with testing.kept():
            app = flask.Flask("second")
            ZddWeb(app).check(app, "of_an_app")(lambda: True)
            zdd_web.check("of_a_test")(lambda: True)
            zdd_web.on_drained(lambda: drained.append("test"))
            waitgroup.close_all()
            assert names() == ["of_a_module", "of_a_test", "of_an_app"]
        assert names() == ["of_a_module"]
        zdd_web.background.go(lambda: None).result(10)
        waitgroup.run_drained_hooks()
        assert drained == ["module"]
    assert names() == []


def test_settings_of_the_environment_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZDD_WEB_HEALTH_PATH", "/one")
    with testing.kept():
        assert process.current().settings.health_path == "/one"
    monkeypatch.setenv("ZDD_WEB_HEALTH_PATH", "/two")
    with testing.kept():
        assert process.current().settings.health_path == "/two"


def test_middleware_of_a_module_answers_on_the_paths_of_the_next_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware keeps which paths are probes, and stays when the settings are reset."""
    probes = Probes()
    monkeypatch.setenv("ZDD_WEB_HEALTH_PATH", "/one")
    with testing.kept():
        assert probes.asks("/one")
    monkeypatch.setenv("ZDD_WEB_HEALTH_PATH", "/two")
    with testing.kept():
        assert (probes.asks("/one"), probes.asks("/two")) == (False, True)


def test_a_group_that_a_test_has_closed_is_open_behind_it_and_empty() -> None:
    group = zdd_web.WaitGroup("of_a_module")
    with testing.kept():
        group.add("job")
        group.close()
        with pytest.raises(zdd_web.GroupClosed):
            group.add("job")
    assert len(group) == 0
    assert group.go(lambda: 7).result(10) == 7


def test_settings_of_an_app_that_a_test_made_do_not_count_any_more() -> None:
    before = len(process.app_settings())
    with testing.kept():
        app = flask.Flask("third")
        ZddWeb(app)
        assert len(process.app_settings()) == before + 1
    assert len(process.app_settings()) == before
    assert app.name == "third"


def test_first_example_leaves_no_check_to_the_second(zdd_reset: None, tmp_path: Path) -> None:
    # Which asks a database that is gone with its test.
    zdd_web.check("database")(lambda: os.stat(tmp_path / "db.sqlite3"))
    assert names() == ["database"]


def test_second_example_has_a_check_of_that_name_too(zdd_reset: None) -> None:
    assert names() == []
    zdd_web.check("database")(lambda: True)


def test_worker_of_gunicorn_is_not_reset(service: object) -> None:
    restore = process.remember()
    service()  # type: ignore[operator]
    process.current().alone = False
    with pytest.raises(LifecycleError, match="for tests"):
        restore()


def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Have a script stand for `python -m zdd_web.cli rehearse`."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport sys, time, signal\n{body}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_rehearsal_that_lost_something_fails_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(tmp_path, monkeypatch, "print('3 of 10 requests LOST'); sys.stderr.write('the log'); sys.exit(1)")
    with pytest.raises(AssertionError, match=r"(?s)app: exit status 1\n3 of 10 requests LOST.*the log"):
        testing.rehearse("app")


def test_rehearsal_returns_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
assert sys.argv[1:5] == ["-m", "zdd_web.cli", "rehearse", "app"], sys.argv
assert sys.argv[-2:] == ["--", "shop.wsgi"], sys.argv
assert "--path=3:/a" in sys.argv and "--scenario=reload" in sys.argv and "--rate=9" in sys.argv
[file] = [each[len("--json="):] for each in sys.argv if each.startswith("--json=")]
open(file, "w").write('{"lost": 0, "requests": 7}')
print("0 of 7 requests lost")
"""
    fake_command(tmp_path, monkeypatch, body)
    found = testing.rehearse("app", "shop.wsgi", paths=["3:/a"], scenarios=["reload"], options=["--rate=9"])
    assert (found.lost, found.requests, found.text) == (0, 7, "0 of 7 requests lost\n")
