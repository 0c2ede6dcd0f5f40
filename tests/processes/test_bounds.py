"""What a new release may cost the host that the live one runs on: memory, descriptors, processes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.harness import Service, descriptors, until
from zdd_web.board import WorkerState

#: A configuration file that prints a quarter of a gigabyte, then ends with the reason.
CHATTY = """
import os, sys
if os.path.exists("chatty"):
    line = "could not connect to the database, trying again\\n" * 1000
    for _ in range(5000):
        sys.stderr.write(line)
    raise SystemExit("gave up")
"""

#: What the service needs by itself is 60 MB or so.
LIMIT_BYTES = 160 << 20


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup with a limit, of either version."""
    version_1 = Path("/sys/fs/cgroup/memory")
    parent = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    group = parent / f"zdd-web-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if parent == version_1 else "memory.max")
        if not limit.exists():
            pytest.skip(f"{parent} has no memory controller for its children")
        limit.write_text(str(LIMIT_BYTES))
        with contextlib.suppress(OSError):  # no swap, or no accounting for it
            (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        until("the group to be empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def in_group(service: Service, group: Path) -> Service:
    service.launcher = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *service.launcher]
    return service


def test_a_release_that_prints_without_end_does_not_eat_the_memory_of_the_live_one(make_service, memory_group: Path):
    service = in_group(make_service("gthread", workers=1), memory_group)
    service.configure(CHATTY, upgrade_timeout=25).start()
    try:
        master = service.pid
        (service.directory / "chatty").touch()
        service.signal(signal.SIGHUP)
        assert "gave up" in service.wait_for("event=refused.*signal=HUP")
        found = service.run("upgrade", "--name", service.name)
        assert found.returncode == 1
        assert "  | could not connect to the database, trying again\n  | gave up\n" in found.stderr
        assert "gave up" in service.matches(r"event=upgrade\.failed")[-1]
        # Neither was the log flooded in its stead.
        assert service.log_file.stat().st_size < 1 << 20
        assert (service.pid, service.get().generation) == (master, 1)
    finally:
        service.clean_up()


#: A descriptor that a C library opens without O_CLOEXEC; and a helper that the second generation starts.
LEAKY = """
import os, subprocess, sys
os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
if os.path.exists("start-helper"):
    os.unlink("start-helper")
    helper = '''
import sys
for line in open("say"):
    print("helper:", line, end="", file=sys.stderr, flush=True)
'''
    subprocess.Popen([sys.executable, "-c", helper])
    print("the helper was started", file=sys.stderr)
"""


def test_generations_have_as_many_descriptors_and_helpers_keep_their_stderr(make_service):
    service = make_service("gthread", workers=1).configure(LEAKY)
    os.mkfifo(service.directory / "say")
    (service.directory / "lock").touch()
    # As flock(1) does it.
    service.launcher = ["sh", "-c", 'exec 9<lock; exec "$@"', "sh", *service.launcher]
    service.start()
    (service.directory / "start-helper").touch()
    counts = []
    for generation in range(2, 5):
        service.upgrade()
        until("one generation", lambda: len(service.generations()) == 1, service)
        assert service.snapshot().generation == generation
        found = descriptors(service.pid)
        # Not all of them: those of the handover are closed a moment later.
        counts.append(list(found.values()).count("/dev/null"))
        assert found[9] == str(service.directory / "lock")
        with (service.directory / "say").open("w") if generation == 4 else contextlib.nullcontext() as say:
            if say is not None:
                # Its stderr is a pipe of the second generation, which has ended.
                say.write("still here\n")
                say.flush()
                service.wait_for("helper: still here")
    assert len(set(counts)) == 1, counts
    assert len(service.matches("the helper was started")) == 1


def test_a_reload_without_descriptors_is_refused_and_leaves_no_child(make_service):
    service = make_service("gthread", workers=1).start()
    master, limits = service.pid, resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    taken = descriptors(master)
    free = [fd for fd in range(256) if fd not in taken]
    for times, spare in enumerate((0, 1), 1):
        # The kernel gives the lowest that is free, and none from the limit on.
        resource.prlimit(master, resource.RLIMIT_NOFILE, (free[spare], limits[1]))
        service.signal(signal.SIGHUP, master)
        assert "limit of open files (nofile)" in service.wait_for(r"event=refused signal=HUP", times)
    resource.prlimit(master, resource.RLIMIT_NOFILE, limits)
    assert len(service.processes()) == 2
    service.signal(signal.SIGHUP, master)
    service.wait_for(r"event=reload\.done")
    assert not service.matches("internal.error")


FEW_SLOTS = "import zdd_web.board as board\nboard.Board.create.__func__.__kwdefaults__['slots'] = 4\n"


def test_a_reload_works_with_the_slots_there_are_and_more_workers_than_slots_are_refused(make_service):
    service = make_service("gthread", workers=3).configure(FEW_SLOTS).start()
    master, before = service.pid, {worker.pid for worker in service.snapshot().workers}

    def pids() -> set[int]:
        return {worker.pid for worker in service.snapshot().workers}

    with service.under_load(clients=4):
        service.signal(signal.SIGHUP)
        service.wait_for(r"event=reload\.done")
        until("three others", lambda: len(pids()) == 3 and not pids() & before, service)
    service.signal(signal.SIGTTIN)
    until("a fourth", lambda: len(pids()) == 4, service)
    service.signal(signal.SIGTTIN)
    assert "workers = 5: the board has 4 slots" in service.wait_for(r"event=refused signal=TTIN")
    until("it to serve", lambda: {each.state for each in service.snapshot().workers} == {WorkerState.SERVING}, service)
    service.signal(signal.SIGHUP)
    assert "all 4 slots of the board are taken" in service.wait_for(r"event=refused signal=HUP")
    assert len(service.matches("event=refused")) == 2
    assert not service.matches("internal.error")
    assert service.pid == master
    service.stop()
    more = make_service("gthread", workers=5).configure(FEW_SLOTS)
    more.spawn()
    more.ends(1)
    assert "workers = 5: the board has 4 slots" in more.matches(r"event=settings\.invalid")[0]
