"""How an earlier release is started again, and which one that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff import releases
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.handoff.releases import Lineage, Release


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("1", "2", "3"):
        (tmp_path / "releases" / name / "venv" / "bin").mkdir(parents=True)
        for program in ("gunicorn", "python"):
            path = tmp_path / "releases" / name / "venv" / "bin" / program
            path.touch()
            path.chmod(0o755)
    flip(tmp_path, "1")
    return tmp_path


def flip(base: Path, name: str) -> None:
    (base / "new").symlink_to(base / "releases" / name)
    (base / "new").replace(base / "current")


def real(base: Path, name: str) -> str:
    return str((base / "releases" / name).resolve())


def by_symlink(base: Path, *words: str, **environ: str) -> Release:
    """The release that `current` leads to now, as a generation that was started by it finds it."""
    current = f"{base}/current"
    launch = Launch(
        directory=current,
        command=(f"{current}/venv/bin/gunicorn", *words),
        environ=environ,
        real_directory=str((base / "current").resolve()),
    )
    return releases.find(launch, current)


def test_release_is_started_again_where_it_was(base):
    first = by_symlink(
        base, "-c", f"{base}/current/conf.py", f"--config={base}/current/conf.py", f"{base}/currently", "app:app",
        PWD=f"{base}/current", PATH=f"{base}/current/venv/bin:/usr/bin", SITE=f"{real(base, '1')}/venv/bin",
    )  # fmt: skip
    flip(base, "2")
    again = first.as_it_was()
    one = real(base, "1")
    assert again.directory == again.real_directory == one
    assert again.command == (
        f"{one}/venv/bin/gunicorn", "-c", f"{one}/conf.py", f"--config={one}/conf.py", f"{base}/currently", "app:app",
    )  # fmt: skip
    assert again.environ == {"PWD": one, "PATH": f"{one}/venv/bin:/usr/bin", "SITE": f"{one}/venv/bin"}
    assert again.left == ()


def test_release_is_started_from_another_directory(base):
    first = by_symlink(base, A=f"{real(base, '1')}/venv", B=f"{base}/current/only-here")
    moved = first.started_from(real(base, "3"))
    assert moved.command == (f"{real(base, '3')}/venv/bin/gunicorn",)
    assert moved.environ == {"A": f"{real(base, '3')}/venv", "B": f"{base}/current/only-here"}
    assert moved.left == ("B",)


def test_virtualenv_that_has_a_symlink_of_its_own_is_the_one_it_was(base):
    # /srv/venv -> venvs/1, beside /srv/current -> releases/1.
    (base / "venv").symlink_to(base / "releases" / "1" / "venv")
    launch = Launch(
        f"{base}/current", (f"{base}/venv/bin/python", "-m", "gunicorn"), {}, real_directory=real(base, "1")
    )
    first = releases.find(launch, f"{base}/current")
    (base / "venv").unlink()
    (base / "venv").symlink_to(base / "releases" / "2" / "venv")
    assert first.as_it_was().command == (f"{real(base, '1')}/venv/bin/python", "-m", "gunicorn")


@pytest.mark.parametrize("chdir", ["{base}/current", "{base}/current/src"])
def test_release_is_where_chdir_leads(base, chdir):
    (base / "releases" / "1" / "src").mkdir()
    launch = Launch(
        str(base), ("current/venv/bin/gunicorn", "--chdir", "current"), {}, real_directory=str(base.resolve())
    )
    found = releases.find(launch, chdir.format(base=base))
    assert (found.named, found.real) == (f"{base}/current", real(base, "1"))
    again = found.started_from(real(base, "2"))
    assert again.directory == str(base)
    assert again.command == (f"{real(base, '2')}/venv/bin/gunicorn", "--chdir", real(base, "2"))


def test_release_without_a_symlink_is_its_directory(base):
    launch = Launch(real(base, "1"), ("gunicorn",), {}, real_directory=real(base, "1"))
    found = releases.find(launch, real(base, "1"))
    assert (found.named, found.real) == (real(base, "1"), real(base, "1"))


def stack(base: Path, *names: str) -> tuple[Lineage, Release]:
    """What a generation knows after deploys of these releases by symlink, and its own release."""
    known, own = Lineage(), None
    for name in names:
        if own is not None:
            known = known.after_deploy(own, real(base, name), follows=True)
        flip(base, name)
        own = by_symlink(base)
    assert own is not None
    return known, own


def back(known: Lineage, own: Release) -> tuple[Lineage, Release]:
    previous = known.previous(own)
    return known.after_rollback(own, previous), previous


def test_second_rollback_goes_further_back(base):
    known, own = stack(base, "1", "2", "3")
    known, own = back(known, own)
    assert own.real == real(base, "2")
    known, own = back(known, own)
    assert own.real == real(base, "1")
    with pytest.raises(UpgradeError, match="no other release has served"):
        known.previous(own)
    # The launch that follows the symlink is kept through all of this.
    assert known.configured is not None
    assert known.configured.named == f"{base}/current"


def test_deploys_of_the_same_directory_are_not_another_release(base):
    known, own = stack(base, "1", "2", "2", "2")
    assert known.previous(own).real == real(base, "1")
    known, own = stack(base, "1", "1")
    with pytest.raises(UpgradeError, match="deploy changes in place"):
        known.previous(own)


def test_release_that_was_deployed_again_stands_there_once(base):
    known, own = stack(base, "1", "2", "1")
    assert [each.real for each in known.earlier] == [real(base, "2")]
    assert known.previous(own).real == real(base, "2")


def test_only_the_last_ones_are_remembered(base):
    for number in range(4, 12):
        (base / "releases" / str(number)).mkdir()
    known, _ = stack(base, *map(str, range(1, 12)))
    assert [each.real for each in known.earlier] == [real(base, str(number)) for number in range(6, 11)]


def test_deploy_from_a_named_directory_leaves_the_symlink_to_the_next(base):
    own = by_symlink(base)
    known = Lineage().after_deploy(own, real(base, "3"), follows=False)
    assert known.configured == own
    assert known.earlier == (own,)
    named = own._replace(real=real(base, "3"))
    assert known.after_deploy(named, real(base, "2"), follows=True).configured is None


def test_release_that_is_gone_is_not_passed_over(base):
    known, own = stack(base, "1", "2", "3")
    (base / "releases" / "2").rename(base / "gone")
    with pytest.raises(UpgradeError, match=r"the release that served before is gone: \S+/releases/2: restore it"):
        known.previous(own)


def test_lineage_is_handed_on_whole(base):
    known, own = stack(base, "1", "2", "3")
    known = known.after_deploy(own, real(base, "1"), follows=False)
    assert Lineage.decode(known.encode()) == known


def test_later_version_may_have_more_and_garbage_raises(base):
    known, _ = stack(base, "1", "2")
    text = known.encode().replace(b'"named"', b'"more": 1, "named"').replace(b'"directory"', b'"more": 1, "directory"')
    assert Lineage.decode(text) == known
    for garbage in (
        b"",
        b"1",
        b"{}",
        b'{"earlier": [1], "configured": null}',
        b'{"earlier": [{}], "configured": null}',
    ):
        with pytest.raises((ValueError, TypeError, KeyError)):
            Lineage.decode(garbage)
