"""Two releases that a rehearsal makes of one app, and what the rollback scenario concludes from a deploy of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.cli import control, deploy_requests
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.rehearse import scenarios
from zdd_web.cli.rehearse.releases import Releases
from zdd_web.deploy_request import DeployRequest


@pytest.fixture
def app(tmp_path: Path) -> Path:
    app = tmp_path / "app"
    for name in ("shop", "deploy", "__pycache__"):
        (app / name).mkdir(parents=True)
        (app / name / "file").write_text(name)
    (app / "app.py").write_text("app")
    (app / "gunicorn.conf.py").write_text("workers = 1")
    (app / "deploy" / "production.py").write_text("workers = 2")
    return app


def test_a_release_has_the_app_by_links_and_the_configuration_as_a_copy(app: Path) -> None:
    releases = Releases(str(app), str(app / "gunicorn.conf.py"))
    try:
        assert os.readlink(releases.current) == releases.a
        for each in map(Path, (releases.a, releases.b)):
            assert sorted(entry.name for entry in each.iterdir()) == ["app.py", "deploy", "gunicorn.conf.py", "shop"]
            assert (each / "shop" / "file").resolve() == app / "shop" / "file"
            assert (each / "gunicorn.conf.py").resolve() == each / "gunicorn.conf.py"
            # Workers of another user import the app from there.
            for above in (each, *each.parents[:2]):
                assert above.stat().st_mode & 0o777 == 0o755
        assert releases.inner == "gunicorn.conf.py"
    finally:
        releases.close()
    assert not os.path.lexists(releases.current)
    assert (app / "shop" / "file").read_text() == "shop"


def test_the_directories_above_a_configuration_are_of_the_release_too(app: Path) -> None:
    releases = Releases(str(app), str(app / "deploy" / "production.py"))
    try:
        found = Path(releases.b) / "deploy" / "production.py"
        assert (found.resolve(), found.read_text()) == (found, "workers = 2")
        assert (found.parent / "file").resolve() == app / "deploy" / "file"
        assert (Path(releases.b) / "gunicorn.conf.py").is_symlink()
    finally:
        releases.close()


def test_the_directory_that_the_app_runs_in_is_of_the_release_too(app: Path) -> None:
    releases = Releases(str(app), str(app / "gunicorn.conf.py"), str(app / "shop"))
    try:
        assert (Path(releases.a) / "shop").resolve() == Path(releases.a) / "shop"
        assert (Path(releases.a) / "shop" / "file").resolve() == app / "shop" / "file"
    finally:
        releases.close()


def test_a_configuration_outside_of_the_app_is_not_copied(app: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("")
    releases = Releases(str(app), str(tmp_path / "other.py"))
    assert releases.inner == ""
    releases.close()


def test_an_app_that_cannot_be_laid_out_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        Releases(str(tmp_path / "nowhere"), str(tmp_path / "nowhere" / "gunicorn.conf.py"))
    assert list(tmp_path.iterdir()) == []


class Deploys:
    """Stands for a course whose service is deployed as told: each deploy fails, or runs in a directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *runs: str | CannotHelp | control.UpgradeResult) -> None:
        self.runs = list(runs)
        self.asked: list[DeployRequest] = []
        self.where = ""
        self.settle = 0.0
        self.server = SimpleNamespace(releases=SimpleNamespace(a="/r/a", b="/r/b"))
        self.tally = SimpleNamespace(answers_of=lambda generation: 7 * generation)
        self.generation: Any = self.numbered(1)
        monkeypatch.setattr(deploy_requests, "asking", self.asking)
        monkeypatch.setattr(control, "upgrade", self.upgrade)
        monkeypatch.setattr(scenarios, "_directory_of", lambda pid: self.where)

    def numbered(self, number: int) -> Any:
        return SimpleNamespace(pid=4711, board=SimpleNamespace(header=SimpleNamespace(generation=number)))

    @contextlib.contextmanager
    def asking(self, generation: object, request: DeployRequest) -> Iterator[None]:
        self.asked.append(request)
        if isinstance(self.runs[0], CannotHelp):
            raise self.runs[0]
        yield

    def upgrade(self, generation: object) -> control.UpgradeResult:
        result = self.runs.pop(0)
        if isinstance(result, control.UpgradeResult):
            return result
        assert isinstance(result, str)
        self.where = result
        return outcome(ok=True)

    def generation_changed(self) -> None:
        self.generation = self.numbered(self.generation.board.header.generation + 1)


def outcome(ok: bool, reason: str = "") -> control.UpgradeResult:
    return control.UpgradeResult(ok, reason, "", 0.1, 0.0, 2, not ok)


def test_a_rollback_deploys_another_release_and_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Deploys(monkeypatch, "/r/b/src", "/r/a")
    found = scenarios.rollback(course)  # type: ignore[arg-type]
    assert course.asked == [DeployRequest(to="/r/b"), DeployRequest(back=True)]
    assert found == scenarios.Found(detail="generation 2 of b sent 14 replies; generation 3 of a sent 21 replies")


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([outcome(ok=False, reason="failed: no memory")], "the upgrade to another release failed: no memory"),
        (["/r/b", outcome(ok=False, reason="was refused: it is gone")], "the rollback was refused: it is gone"),
        ([CannotHelp("takes no such request")], "the upgrade to another release failed: takes no such request"),
        (["/r/b", "/r/b"], "the rollback failed: generation 3 was started in /r/a, and process 4711 runs in /r/b:"),
    ],
)
def test_a_rollback_that_fails_names_the_step_and_why(
    monkeypatch: pytest.MonkeyPatch, runs: list[Any], reason: str
) -> None:
    assert scenarios.rollback(Deploys(monkeypatch, *runs)).reason.startswith(reason)  # type: ignore[arg-type]


def test_a_configuration_that_names_its_directory_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scenarios.rollback(Deploys(monkeypatch, "/srv/shop"))  # type: ignore[arg-type]
    assert found.reason == (
        "the upgrade to another release failed: generation 2 was started in /r/b, and process 4711 runs in /srv/shop: "
        "chdir names that directory whatever the release is: write chdir = os.path.dirname(os.path.abspath(__file__)) "
        "in the configuration, or leave it out"
    )


def test_a_release_that_answers_nothing_was_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "ANSWERS_WITHIN", 0.01)
    course = Deploys(monkeypatch, "/r/b")
    course.tally.answers_of = lambda generation: 0
    found = scenarios.rollback(course)  # type: ignore[arg-type]
    assert found.reason == "the upgrade to another release: generation 2 sent no reply within 0.01 s"
