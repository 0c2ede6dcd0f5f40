"""What the kernel says about processes, asked about real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.forks import in_child, read_to_end, spawn, status_of
from zdd_web.system import proc

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

#: No Linux hands out a pid above 2**22.
NOBODY = 1 << 23


def hang() -> None:
    while True:
        signal.pause()


def test_start_time_names_this_process_and_stays() -> None:
    start = proc.start_time(os.getpid())
    assert start > 0
    assert proc.start_time(os.getpid()) == start
    assert proc.alive(os.getpid(), start)
    assert proc.start_time(os.getppid()) <= start


def test_parent_is_the_parent() -> None:
    assert proc.parent(os.getpid()) == os.getppid()
    assert in_child(lambda: [proc.parent(os.getpid())]) == [os.getpid()]


def test_nobody_is_not_alive_and_not_signalled() -> None:
    assert (proc.start_time(NOBODY), proc.parent(NOBODY)) == (0, 0)
    assert proc.alive(NOBODY, 0) is False
    assert proc.kill(NOBODY, 0, signal.SIGTERM) is False


def test_pid_with_another_start_time_is_somebody_else_and_is_not_signalled() -> None:
    pid = spawn(hang)
    start = proc.start_time(pid)
    assert proc.alive(pid, start + 1) is False
    assert proc.kill(pid, start + 1, signal.SIGTERM) is False
    assert proc.kill(pid, start, signal.SIGKILL) is True
    assert status_of(pid) == -signal.SIGKILL


def test_zombie_is_not_alive() -> None:
    pid = spawn(lambda: None)
    start = proc.start_time(pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert proc.start_time(pid) == start
    assert proc.alive(pid, start) is False
    assert proc.kill(pid, start, signal.SIGTERM) is False
    assert status_of(pid) == 0


@pytest.mark.parametrize("name", ["plain", "two words", "paren) Z 1 (theses", ") R 0 0"])
def test_any_name_of_a_program_is_read_over(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    program.symlink_to(sys.executable)
    command = [program, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert proc.name(child.pid) == name[:15]
        assert proc.parent(child.pid) == os.getpid()
        start = proc.start_time(child.pid)
        assert start >= proc.start_time(os.getpid())
        assert proc.alive(child.pid, start)
        child.communicate(b"\n")


def test_process_is_described_by_name_and_words(tmp_path: Path) -> None:
    program = tmp_path / "supervisord-3"
    program.symlink_to(sys.executable)
    command = [program, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert proc.name(child.pid) == "supervisord-3"
        assert proc.words(child.pid) == ("supervisord-3", "-c")
        assert proc.state(child.pid) in ("R", "S", "D")
        child.communicate(b"\n")


def test_script_is_the_second_word_of_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "honcho"
    script.write_text(f"#!{sys.executable}\nprint(flush=True)\ninput()\n")
    script.chmod(0o755)
    with subprocess.Popen([script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert proc.words(child.pid)[1] == "honcho"
        child.communicate(b"\n")


def test_module_that_is_run_is_named_by_its_last_part() -> None:
    child = subprocess.Popen([sys.executable, "-m", "timeit", "-s", "import time", "time.sleep(60)"])
    try:
        eventually_named = time.monotonic() + 10
        while proc.words(child.pid)[1:] != ("timeit",):
            assert time.monotonic() < eventually_named, proc.words(child.pid)
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()


def test_nobody_has_no_name_no_words_and_no_state() -> None:
    assert (proc.name(NOBODY), proc.words(NOBODY), proc.state(NOBODY)) == ("", (), "")


def test_owner_of_a_process_is_the_user_that_it_runs_as() -> None:
    assert proc.owner(os.getpid()) == os.geteuid()
    assert proc.owner(NOBODY) == -1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_owner_of_a_process_that_is_not_dumpable_is_not_root() -> None:
    def look() -> int:
        # A change of the uid ends it.
        os.setuid(65534)
        assert os.stat("/proc/self/maps").st_uid == 0
        return proc.owner(os.getpid())

    assert in_child(look) == 65534


class WorkerAdapter:
    """A grandparent (this process), a parent that lives until told otherwise, and a child that holds a pipe."""

    def __init__(self, child: Callable[[int, int], None]) -> None:
        self.reader, writer = os.pipe()
        to_parent, self.order = os.pipe()

        def parent() -> None:
            me = os.getpid()
            os.close(self.order)
            spawn(lambda: child(me, writer))
            os.close(writer)
            os.read(to_parent, 1)

        self.parent = spawn(parent)
        os.close(writer)
        os.close(to_parent)

    def end_parent(self) -> None:
        os.close(self.order)
        assert status_of(self.parent) == 0


def test_child_dies_with_its_parent_when_it_asked_for_it() -> None:
    def child(parent: int, writer: int) -> None:
        os.write(writer, f"{proc.die_with_parent(signal.SIGKILL, parent)}\n".encode())
        hang()

    family = WorkerAdapter(child)
    assert os.read(family.reader, 100) == b"True\n"
    family.end_parent()
    assert read_to_end(family.reader) == b""


def test_child_is_sent_the_signal_that_it_asked_for() -> None:
    def child(parent: int, writer: int) -> None:
        signal.signal(signal.SIGUSR1, lambda *args: (os.write(writer, b"heard\n"), os._exit(0)))
        proc.die_with_parent(signal.SIGUSR1, parent)
        os.write(writer, b"listening\n")
        hang()

    family = WorkerAdapter(child)
    assert os.read(family.reader, 100) == b"listening\n"
    family.end_parent()
    assert read_to_end(family.reader) == b"heard\n"


def test_child_that_asks_too_late_is_told_so() -> None:
    def child(parent: int, writer: int) -> None:
        os.write(writer, b"forked\n")
        while os.getppid() == parent:
            os.sched_yield()
        os.write(writer, f"{proc.die_with_parent(signal.SIGKILL, parent)}\n".encode())

    family = WorkerAdapter(child)
    assert os.read(family.reader, 100) == b"forked\n"
    family.end_parent()
    assert read_to_end(family.reader) == b"False\n"


def test_subreaper_is_given_the_orphans_among_its_descendants() -> None:
    def subreaper() -> object:
        proc.become_subreaper()
        reader, writer = os.pipe()

        def middle() -> None:
            def orphan() -> None:
                while os.getppid() == middle_pid:
                    os.sched_yield()
                os.write(writer, f"{os.getpid()} {os.getppid()}".encode())
                os._exit(7)

            middle_pid = os.getpid()
            spawn(orphan)

        assert status_of(spawn(middle)) == 0
        os.close(writer)
        orphan, parent = map(int, read_to_end(reader).split())
        return [parent == os.getpid(), status_of(orphan)]

    assert in_child(subreaper) == [True, 7]
