"""Which code a generation runs: what a directory tells of its commit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from zdd_web import release

COMMIT = "3f2a1b9c4d5e6f708192a3b4c5d6e7f801234567"
OTHER = "0" * 40


def reading(files: dict[str, str]) -> release.Read:
    return lambda path, most: files.get(os.path.normpath(path), "")[:most]


@pytest.mark.parametrize(
    "files",
    [
        {"/srv/7/.git/HEAD": f"{COMMIT}\n"},
        {"/srv/7/.git/HEAD": "ref: refs/heads/main\n", "/srv/7/.git/refs/heads/main": f"{COMMIT}\n"},
        {
            "/srv/7/.git/HEAD": "ref: refs/heads/main\n",
            "/srv/7/.git/packed-refs": f"# pack-refs\n{OTHER} refs/heads/other\n{COMMIT} refs/heads/main\n^{OTHER}\n",
        },
        {
            "/srv/7/.git": "gitdir: /srv/repo/worktrees/7\n",
            "/srv/repo/worktrees/7/HEAD": "ref: refs/heads/main\n",
            "/srv/repo/worktrees/7/commondir": "../..\n",
            "/srv/repo/refs/heads/main": COMMIT,
        },
        {"/srv/7/.git": "gitdir: ../repo/modules/7\n", "/srv/repo/modules/7/HEAD": COMMIT},
        {"/srv/.git/HEAD": COMMIT},
        {"/srv/7/REVISION": f"{COMMIT}\n"},
    ],
    ids=["detached", "branch", "packed", "worktree", "submodule", "the directory above", "Capistrano"],
)
def test_commit_is_found(files):
    assert release.commit_of("/srv/7", reading(files)) == COMMIT


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"/srv/7/.git/HEAD": "ref: refs/heads/main\n"},
        # As a repository with reftables has it.
        {"/srv/7/.git/HEAD": "ref: refs/heads/.invalid\n"},
        {"/srv/7/.git/HEAD": "ref: ../../../etc/commit\n", "/etc/commit": COMMIT},
        {"/srv/7/.git/HEAD": "ref: refs/heads/../../../../etc/commit\n", "/etc/commit": COMMIT},
        {"/srv/7/.git/HEAD": "ref: refs/heads/main\n", "/srv/7/.git/refs/heads/main": "root:x:0:0"},
        {"/srv/7/REVISION": "version 7"},
        {"/.git/HEAD": COMMIT},
    ],
)
def test_no_commit_where_none_is_checked_out(files):
    assert release.commit_of("/srv/7", reading(files)) == ""


def test_commit_is_that_of_git(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *words]
        return subprocess.run(command, cwd=tmp_path / "repo", check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "repo").mkdir()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert release.commit_of(str(tmp_path / "repo")) == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    git("worktree", "add", "-q", "-b", "side", str(tmp_path / "tree"))
    assert release.commit_of(str(tmp_path / "tree")) == git("rev-parse", "side")


def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "REVISION")
    (tmp_path / ".git").mkdir()
    assert release.commit_of(str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("text", "short"),
    [("/srv/releases/7", "7"), (f"/srv/releases/7@{COMMIT[:12]}", "7@3f2a1b9"), ("/", "/"), ("v1@7", "v1@7"), ("", "")],
)
def test_column_has_the_last_name_of_a_directory(text: str, short: str) -> None:
    assert release.short(text) == short
