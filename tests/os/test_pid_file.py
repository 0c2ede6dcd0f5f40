"""The pid file names one living master at every instant."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import in_child, spawn, status_of
from tests.helpers.masters import Masters
from zdd_web import service
from zdd_web.board import Board
from zdd_web.gunicorn.pid_file import PidFile

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.pid"


@pytest.fixture
def pid_file(path: Path) -> PidFile:
    return PidFile(str(path), os.getpid())


def test_pid_file_is_what_every_tool_expects(pid_file: PidFile, path: Path) -> None:
    pid_file.create(4711)
    assert path.read_text() == "4711\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert pid_file.read() == 4711


def test_prepared_file_changes_nothing_until_it_is_put_in_place(pid_file: PidFile, path: Path) -> None:
    pid_file.create(1)
    prepared = pid_file.prepare(2)
    assert (pid_file.read(), Path(prepared).read_text()) == (1, "2\n")
    assert Path(prepared).parent == path.parent
    pid_file.commit(prepared)
    assert pid_file.read() == 2
    assert list(path.parent.iterdir()) == [path]


def test_reader_finds_one_or_the_other_and_never_nothing(pid_file: PidFile) -> None:
    pid_file.create(11)
    seen: set[int] = set()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add(pid_file.read())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):
        pid_file.create(22)
        pid_file.create(11)
    over.set()
    reader.join()
    assert seen <= {11, 22}


@pytest.mark.parametrize("content", [b"", b"no number\n", b"\xff\xfe", b"12 34\n"])
def test_file_without_a_pid_names_nobody(pid_file: PidFile, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert pid_file.read() == 0


def test_missing_file_names_nobody(pid_file: PidFile) -> None:
    assert pid_file.read() == 0
    pid_file.unlink()


def test_own_file_is_removed(pid_file: PidFile, path: Path) -> None:
    pid_file.create(os.getpid())
    pid_file.unlink()
    assert not path.exists()


def test_file_of_the_successor_is_left_alone(pid_file: PidFile, path: Path) -> None:
    pid_file.create(os.getpid() + 1)
    pid_file.unlink()
    assert pid_file.read() == os.getpid() + 1


def test_directory_that_is_gone_is_found_out_before_anything_is_promised(path: Path) -> None:
    pid_file = PidFile(str(path.parent / "gone" / "shop.pid"), 1)
    with pytest.raises(FileNotFoundError):
        pid_file.prepare(2)


def test_full_disk_is_found_out_before_anything_is_promised_and_leaves_nothing(pid_file: PidFile, path: Path) -> None:
    pid_file.create(1)

    def child() -> object:
        # No file of this process may grow: what a full disk is to a write.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            pid_file.prepare(2)
        except OSError as error:
            return type(error).__name__
        return "no error"

    assert in_child(child) == "OSError"
    assert list(path.parent.iterdir()) == [path]
    assert pid_file.read() == 1


def test_relative_path_is_written_where_the_process_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pid_file = PidFile("shop.pid", 7)
    pid_file.create(7)
    assert (tmp_path / "shop.pid").read_text() == "7\n"
    pid_file.unlink()
    assert list(tmp_path.iterdir()) == []


# -- a file that somebody left behind


#: A step of the wall clock makes a file look written long before, or after, its process started.
STEPS = pytest.mark.parametrize("step", [-86_400, 0, 86_400])


def name_in_file(pid_file: PidFile, pid: int, step: int) -> None:
    pid_file.create(pid)
    now = os.stat(pid_file.fname).st_mtime
    os.utime(pid_file.fname, (now + step, now + step))


@pytest.fixture
def run() -> Iterator[Callable[..., int]]:
    """Start a process of that name, which does `first` and then nothing; return its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def run(name: str, first: str = "") -> int:
        child = subprocess.Popen(
            [name, "-c", f"{first}\nprint(flush=True)\ninput()\n"], executable=sys.executable,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        return child.pid

    yield run
    for child in started:
        child.communicate(b"\n")


@STEPS
def test_file_of_a_master_that_runs_is_not_stale_whatever_the_clock_says(
    pid_file: PidFile, masters: Masters, step: int
) -> None:
    pid = masters.start("unit-pidfile")
    name_in_file(pid_file, pid, step)
    assert pid_file.remove_if_stale() is False
    assert pid_file.read() == pid


@STEPS
def test_file_whose_pid_was_reused_is_stale_whatever_the_clock_says(
    pid_file: PidFile, path: Path, run: Callable[..., int], step: int
) -> None:
    name_in_file(pid_file, run("sshd"), step)
    assert pid_file.remove_if_stale() is True
    assert not path.exists()


@STEPS
def test_file_that_names_this_process_before_it_has_written_one_is_stale(
    pid_file: PidFile, path: Path, step: int
) -> None:
    name_in_file(pid_file, os.getpid(), step)
    assert pid_file.remove_if_stale() is True
    assert not path.exists()


def test_file_whose_pid_a_worker_of_another_service_has_is_stale(pid_file: PidFile, path: Path) -> None:
    board = Board.create("unit-pidfile", slots=1)
    board.header.master_pid = os.getpid()
    worker = spawn(lambda: signal.pause())
    try:
        pid_file.create(worker)
        assert pid_file.remove_if_stale() is True
        assert not path.exists()
    finally:
        os.kill(worker, signal.SIGKILL)
        status_of(worker)
        board.close()


@pytest.mark.parametrize("name", ["gunicorn: master [shop]", "/opt/venv/bin/gunicorn"])
def test_file_of_a_gunicorn_without_zdd_web_is_not_stale(pid_file: PidFile, run: Callable[..., int], name: str) -> None:
    name_in_file(pid_file, run(name), -86_400)
    assert pid_file.remove_if_stale() is False


def test_file_whose_pid_a_worker_of_such_a_gunicorn_has_is_stale(
    pid_file: PidFile, run: Callable[..., int], tmp_path: Path
) -> None:
    children = tmp_path / "children"
    fork = f"""
import os, signal
if not (child := os.fork()):
    signal.alarm(60)
    signal.pause()
open({str(children)!r}, "w").write(str(child))
"""
    run("gunicorn", fork)
    worker = int(children.read_text())
    pid_file.create(worker)
    try:
        assert pid_file.remove_if_stale() is True
    finally:
        os.kill(worker, signal.SIGKILL)


def test_file_of_a_keeper_is_not_stale(pid_file: PidFile, tmp_path: Path) -> None:
    # Known by its command line; the real one would end here, where it has nothing to keep.
    package = tmp_path / "zdd_web"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "keeper.py").write_text("print(flush=True)\ninput()\n")
    with subprocess.Popen(
        [sys.executable, "-m", service.KEEPER, "shop", "4711"], cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as keeper:  # fmt: skip
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"\n"
        pid_file.create(keeper.pid)
        assert pid_file.remove_if_stale() is False
        keeper.communicate(b"\n")


def test_file_of_a_zombie_is_stale(pid_file: PidFile, path: Path) -> None:
    pid = spawn(lambda: None)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    pid_file.create(pid)
    assert pid_file.remove_if_stale() is True
    assert not path.exists()
    assert status_of(pid) == 0


@pytest.mark.parametrize("content", ["", "no pid\n", f"{1 << 23}\n"])
def test_file_that_names_nobody_is_left_to_gunicorn(pid_file: PidFile, path: Path, content: str) -> None:
    path.write_text(content)
    assert pid_file.remove_if_stale() is False
    assert path.exists()


def test_missing_file_is_not_stale(pid_file: PidFile) -> None:
    assert pid_file.remove_if_stale() is False
