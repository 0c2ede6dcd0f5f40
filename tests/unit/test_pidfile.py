"""The pid file names one living master at every instant."""

from __future__ import annotations

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from tests.unit.forks import in_child, spawn, status_of
from zdd_web.gunicorn.pidfile import PidFile

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


def test_file_of_a_living_process_is_not_stale(pid_file: PidFile) -> None:
    pid_file.create(os.getpid())
    assert pid_file.remove_if_stale() is False
    assert pid_file.read() == os.getpid()


def test_file_that_is_older_than_its_process_is_stale(pid_file: PidFile, path: Path) -> None:
    pid_file.create(os.getpid())
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert pid_file.remove_if_stale() is True
    assert not path.exists()


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
