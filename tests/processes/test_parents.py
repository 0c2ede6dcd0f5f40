"""Whose child a master is: who refuses to have it replaced, and the keeper that stays in its place."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes.harness import (
    CONF,
    Held,
    Service,
    answered_from,
    children,
    command_line,
    seen_from_here,
    serving,
    until,
    zombies,
)  # fmt: skip
from zdd_web.board import MEMFD_PREFIX, Board
from zdd_web.system import proc

#: Runs the rest of its command line, or `./run`, and ends with it.
SUPERVISE = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:] or ['./run']))"

#: How each parent starts `./run`, which execs gunicorn. The first word must be on PATH or beside this interpreter.
STARTED_BY = {
    "PID 1": ["unshare", "--pid", "--fork", "--mount-proc", "./run"],
    "shell at PID 1": ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", "./run; exit"],
    "python script at PID 1": ["unshare", "--pid", "--fork", "--mount-proc", "python", "-c", SUPERVISE],
    "python script": [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        "python",
        "-c",
        SUPERVISE,
        "python",
        "-c",
        SUPERVISE,
    ],
    "tini": ["tini", "-s", "--", "./run"],
    "dumb-init": ["dumb-init", "./run"],
    "supervisord": ["supervisord", "--nodaemon", "--configuration", "supervisord.conf"],
    "honcho": ["honcho", "start"],
    "runsv": ["runsv", "."],
    "s6-supervise": ["s6-supervise", "."],
    "tini and a shell script": ["tini", "-s", "--", "sh", "-c", "./run; exit"],
    "supervisord and a shell script": ["supervisord", "--nodaemon", "--configuration", "supervisord.conf"],
}

#: A shell in between changes nothing for those.
KEEPERS = [name for name in STARTED_BY if "script" not in name]

#: Becomes the parent, in this very process, so that the harness has its pid and its exit status.
BECOME_PARENT = """
    import os, shlex, sys
    parent, command = {parent!r}, sys.argv[1:]
    with open("run", "w") as file:
        file.write("#!/bin/sh\\nexec " + shlex.join(command) + "\\n")
    os.chmod("run", 0o755)
    with open("Procfile", "w") as file:
        file.write("web: ./run\\n")
    with open("supervisord.conf", "w") as file:
        file.write({supervisord!r})
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    os.execvp(parent[0], parent)
"""

SUPERVISORD = """
    [supervisord]
    logfile=/dev/null
    logfile_maxbytes=0
    pidfile=%(here)s/supervisord.pid
    [program:web]
    directory=%(here)s
    command={command}
    autorestart=unexpected
    redirect_stderr=true
    stdout_logfile=/dev/stdout
    stdout_logfile_maxbytes=0
"""


def start_under(service: Service, parent: str) -> Service:
    """Start a service as that parent's child; skip where there is no such program."""
    words = STARTED_BY[parent]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    if shutil.which(words[0], path=path) is None:
        pytest.skip(f"{words[0]} is not installed")
    if words[0] == "unshare":
        tried = subprocess.run([*words[:4], "true"], capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"no pid namespaces here: {tried.stderr.strip()}")
    command = "sh -c './run; exit'" if "script" in parent else "./run"
    supervisord = textwrap.dedent(SUPERVISORD).replace("{command}", command)
    script = textwrap.dedent(BECOME_PARENT).format(parent=words, supervisord=supervisord)
    (service.directory / "parent.py").write_text(script)
    service.launcher = [sys.executable, "parent.py", sys.executable, "-m", "gunicorn"]
    return service.start()


def master(service: Service, generation: int = 1) -> int:
    """The pid that a generation's master has here, once it serves."""
    return seen_from_here(service, serving(service, generation))


REMEDY = "set KEEP_PID = True, which leaves a keeper with this pid, or "

REFUSALS = {
    "PID 1": ["this master is PID 1, whose exit ends the container", REMEDY + "replace the container"],
    "shell at PID 1": ["a shell at PID 1 (sh)", REMEDY + "replace the container"],
    "python script at PID 1": ["the parent is python at PID 1", REMEDY + "PARENT_STAYS = True if it stays"],
    "python script": ["the parent is python, the child of python at PID 1", REMEDY],
    "tini": ["the parent tini", REMEDY + "restart by tini"],
    "dumb-init": ["the parent dumb-init", REMEDY + "restart by dumb-init"],
    "supervisord": ["the parent supervisord", REMEDY + "restart by supervisord"],
    "honcho": ["the parent sh ends with this master: honcho", REMEDY + "restart by honcho"],
    "runsv": ["the parent runsv", REMEDY + "restart by runsv"],
    "s6-supervise": ["the parent s6-supervise", REMEDY + "restart by s6-supervise"],
    "tini and a shell script": ["the parent sh ends with this master: tini", REMEDY + "restart by tini"],
    "supervisord and a shell script": ["the parent sh ends with this master: supervisord", REMEDY],
}


@pytest.mark.parametrize("parent", REFUSALS)
def test_a_master_whose_end_is_the_services_end_is_not_replaced(make_service, parent: str):
    service = start_under(make_service(), parent)
    pid = master(service)
    service.deploy("2")
    service.signal(signal.SIGUSR2, pid)
    line = service.wait_for(r"event=(?:refused|upgrade\.committed)")
    for words in REFUSALS[parent]:
        assert words in line
    assert "signal=USR2" in line
    assert not service.matches(r"event=upgrade\.started")
    assert service.get().generation == 1
    service.signal(signal.SIGTERM, pid)
    service.wait_for(r"event=phase\.stopped")


@pytest.mark.parametrize(
    ("pid_1", "settings"),
    [
        # PID 1 has not forked the service, as with `docker exec`, and does not wait for it.
        ('setsid sh -c "./run &"; sleep 1000; exit', {}),
        # This shell has, but the service's owner says that it stays.
        ("./run; sleep 1000; exit", {"parent_stays": True}),
    ],
)
def test_a_master_whose_parent_at_pid_1_stays_is_replaced_again_and_again(make_service, pid_1, settings, monkeypatch):
    monkeypatch.setitem(STARTED_BY, "PID 1", ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", pid_1])
    service = start_under(make_service(**settings), "PID 1")
    for generation in (1, 2):
        service.signal(signal.SIGUSR2, master(service, generation))
        service.wait_for(r"event=upgrade\.committed|event=refused", generation)
        service.wait_for(rf"generation={generation} event=phase\.stopped")
        assert service.get().generation == generation + 1
    assert not service.matches("event=refused")


def test_a_main_process_in_a_pid_namespace_of_others_is_not_replaced(make_service):
    # Kubernetes' shareProcessNamespace, `docker --pid`: not PID 1, and its parent is outside, where it watches.
    if shutil.which("nsenter") is None:
        pytest.skip("nsenter is not installed")
    holder = subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", "sleep", "1000"])
    try:
        init = until("the namespace", lambda: children(holder.pid) or holder.poll() is not None)
        if holder.poll() is not None:
            pytest.skip("no pid namespaces here")
        service = make_service()
        enter = ["nsenter", "--target", str(init[0]), "--pid", "--mount", f"--wd={service.directory}"]
        service.launcher = [*enter, *service.launcher]
        service.start()
        pid = master(service)
        service.signal(signal.SIGUSR2, pid)
        line = service.wait_for(r"event=(?:refused|upgrade\.committed)")
        assert "outside" in line
        assert REMEDY + "replace the container" in line
        assert service.get().generation == 1
    finally:
        for pid in children(holder.pid):
            os.kill(pid, signal.SIGKILL)
        holder.wait()


# -- the keeper


def is_keeper(pid: int) -> bool:
    return command_line(pid)[1:3] == ["-m", "zdd_web.keeper"]


def upgrade_by(service: Service, pid: int, times: int) -> None:
    """Send SIGUSR2 to `pid` and wait until that many upgrades have been committed."""
    service.signal(signal.SIGUSR2, pid)
    service.wait_for(r"event=upgrade\.committed", times)
    until("the keeper", lambda: is_keeper(pid), service)


@pytest.mark.parametrize("parent", KEEPERS)
def test_a_kept_pid_goes_through_upgrades_and_a_stop_without_a_loss(make_service, parent: str):
    service = start_under(make_service(keep_pid=True), parent)
    kept = master(service)
    its_parent = proc.parent(kept)
    start = proc.start_time(kept)
    with service.under_load(clients=8) as load:
        for number in (1, 2, 3):
            service.deploy(str(number + 1))
            upgrade_by(service, kept, number)
            answered_from(load, 50)
    assert (service.get().version, service.get().generation) == ("4", 4)
    assert (proc.start_time(kept), proc.parent(kept)) == (start, its_parent)
    assert service.process is not None
    assert service.process.poll() is None
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=2")
        service.wait_for("generation=4 event=phase.serving")
        until("the request", lambda: in_flight(service, master(service, 4)) == 1, service)
        # As the parent does it; a shell hears nothing while it waits, and `unshare` passes nothing on.
        told = kept if "PID 1" in parent else service.process.pid
        service.signal(signal.SIGTERM, told)
        assert reply.result().generation == 4
    service.wait_for(r"generation=4 event=phase\.stopped")
    if "supervis" not in parent or "s6" in parent:
        service.ends(status=None)
    if parent in ("PID 1", "shell at PID 1", "tini", "dumb-init"):
        assert service.process.wait() == 0
    assert not service.is_open()


def in_flight(service: Service, pid: int) -> int:
    """The requests in hand of the generation of that master, in whichever pid namespace it is."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{entry}"
        if os.readlink(path).startswith(f"/memfd:{MEMFD_PREFIX}"):
            fd = os.open(path, os.O_RDONLY)
            try:
                board = Board.open(fd)
            finally:
                os.close(fd)
            snapshot = board.snapshot()
            board.close()
            if pid == seen_from_here(service, snapshot.master_pid):
                return snapshot.in_flight
    return 0


@pytest.fixture
def kept(make_service: Callable[..., Service]) -> Service:
    """A service whose first process, `service.process`, keeps its pid; not started yet."""
    return make_service(keep_pid=True)


def become_kept(service: Service) -> int:
    """Start, upgrade once, and wait for the keeper; return its pid."""
    service.start()
    assert service.process is not None
    upgrade_by(service, service.process.pid, 1)
    return service.process.pid


def exit_status(service: Service) -> int:
    assert service.process is not None
    until("the keeper's end", lambda: service.process.poll() is not None, service)
    return service.process.returncode


def test_keeper_passes_on_a_reload(kept):
    keeper = become_kept(kept)
    kept.deploy("3")
    kept.signal(signal.SIGHUP, keeper)
    kept.wait_for(r"generation=2 event=reload\.done")
    until("the new code", lambda: kept.get().version == "3", kept)
    assert is_keeper(keeper)


def test_keeper_passes_on_one_worker_more_and_one_less(kept):
    keeper = become_kept(kept)
    kept.signal(signal.SIGTTIN, keeper)
    until("a third worker", lambda: kept.snapshot().workers_wanted == 3, kept)
    kept.signal(signal.SIGTTOU, keeper)
    until("two workers", lambda: kept.snapshot().workers_wanted == 2, kept)


def test_keeper_ends_with_status_0_when_requests_and_background_work_are_finished(kept):
    keeper = become_kept(kept)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(kept.get, "/slow?seconds=2")
        kept.get("/job?seconds=3")
        until("the request", lambda: kept.snapshot().in_flight == 1, kept)
        kept.signal(signal.SIGTERM, keeper)
        assert reply.result().generation == 2
    assert exit_status(kept) == 0
    assert kept.matches("job finished")
    kept.ends(status=None)
    assert not kept.is_open()
    assert not kept.pid_file.exists()


def test_keeper_ends_with_the_status_of_a_master_that_abandoned_work(kept):
    kept.configure(grace_period=3)
    keeper = become_kept(kept)
    kept.get("/job?seconds=600")
    kept.signal(signal.SIGTERM, keeper)
    assert exit_status(kept) == 1
    assert kept.matches("generation=2 event=(?:drain|background).abandoned")
    kept.ends(status=None)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_keeper_passes_on_stop_now(kept, sig: signal.Signals):
    keeper = become_kept(kept)
    kept.signal(sig, keeper)
    assert exit_status(kept) == 0
    kept.ends(status=None)
    assert not kept.is_open()


def test_killed_master_ends_its_keeper_with_that_signal(kept):
    become_kept(kept)
    kept.signal(signal.SIGKILL, kept.pid)
    assert exit_status(kept) == 128 + signal.SIGKILL
    kept.ends(status=None)
    assert not kept.is_open()


def test_killed_master_leaves_its_workers_the_time_to_answer_before_the_keeper_ends(kept):
    # Where the keeper is PID 1 its end kills everybody; elsewhere a restart would find the port taken.
    kept.signal(signal.SIGTTIN, become_kept(kept))
    until("the keeper's ear", lambda: kept.snapshot().workers_wanted == 3, kept)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(kept.get, "/slow?seconds=2")
        until("the request", lambda: kept.snapshot().in_flight == 1, kept)
        kept.signal(signal.SIGKILL, kept.pid)
        assert exit_status(kept) == 128 + signal.SIGKILL
        assert [command_line(pid) for pid in kept.processes()] == []
        assert reply.result().generation == 2


def test_failed_upgrade_leaves_the_keeper_and_the_service_as_they_were(kept):
    keeper = become_kept(kept)
    current = kept.pid
    kept.deploy("3", at_import="raise RuntimeError('boom')")
    with kept.under_load(clients=8) as load:
        kept.signal(signal.SIGUSR2, keeper)
        kept.wait_for(r"generation=2 event=upgrade\.failed")
        answered_from(load, 50)
    assert kept.pid == current
    assert is_keeper(keeper)
    kept.deploy("4")
    upgrade_by(kept, keeper, 2)
    until("version 4", lambda: kept.get().version == "4", kept)


@pytest.mark.begins_first
def test_one_keeper_and_no_zombie_is_left_after_ten_upgrades(kept, record_property):
    keeper = become_kept(kept)
    for number in range(2, 11):
        upgrade_by(kept, keeper, number)
        kept.until_one_generation()
    assert kept.get().generation == 11
    until("no zombie", lambda: not zombies(keeper), kept)
    keepers = [pid for pid in kept.processes() if is_keeper(pid)]
    rollup = Path(f"/proc/{keeper}/smaps_rollup").read_text()
    record_property("keeper", rollup)
    print("the keeper's memory:", *rollup.splitlines()[1:5], sep="\n")
    print("its threads:", len(os.listdir(f"/proc/{keeper}/task")))
    assert keepers == [keeper]
    assert sorted(kept.processes()) == sorted([keeper, kept.pid, *(w.pid for w in kept.snapshot().workers)])


def upgrade_while_held(service: Service, pid: int) -> None:
    service.signal(signal.SIGUSR2, pid)
    service.wait_for("generation=1 event=phase.retiring")

    def old_workers_accept_no_more() -> bool:
        return {worker.state.label for worker in service.generations()[0].snapshot().workers} == {"leaving"}

    until("the old workers' leave", old_workers_accept_no_more, service)
    assert service.get().generation == 2


def test_stop_while_the_old_master_retires_reaches_the_new_one_and_waits_for_both(kept):
    kept.start()
    first = kept.pid
    with Held(kept) as old:
        upgrade_while_held(kept, first)
        with Held(kept) as new:
            until("the request", lambda: kept.snapshot().in_flight >= 1, kept)
            kept.signal(signal.SIGTERM, first)
            kept.wait_for("generation=2 event=phase.draining")
            assert new.finish().generation == 2
        kept.wait_for("generation=2 event=phase.stopped")
        assert old.finish().generation == 1
    assert exit_status(kept) == 0
    assert kept.processes() == []
    assert not kept.is_open()


def test_stop_while_the_old_master_retires_tells_of_work_that_the_new_one_abandoned(kept):
    kept.configure(grace_period=3).start()
    first = kept.pid
    with Held(kept) as old:
        upgrade_while_held(kept, first)
        kept.get("/job?seconds=600")
        kept.signal(signal.SIGTERM, first)
        kept.wait_for("generation=2 event=(?:drain|background).abandoned")
        until("the second's end", lambda: [g.board.header.generation for g in kept.generations()] in ([1], []), kept)
        # Whether the first generation waited for this one is not asked here.
        with contextlib.suppress(OSError, http.client.HTTPException):
            old.finish()
    assert exit_status(kept) == 1


def test_stop_while_the_old_master_retires_is_over_within_the_grace_period(kept):
    kept.configure(grace_period=6).start()
    first = kept.pid
    with Held(kept):
        upgrade_while_held(kept, first)
        kept.signal(signal.SIGTERM, first)
        kept.wait_for(r"generation=2 event=(?:phase\.stopped|drain\.abandoned)")
        exit_status(kept)
    assert kept.processes() == []


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_stop_now_while_the_old_master_retires_ends_both(kept, sig: signal.Signals):
    # gunicorn joins a thread that has a request in hand, and kills after this.
    kept.arguments = ["--graceful-timeout", "2"]
    kept.start()
    first = kept.pid
    with Held(kept):
        upgrade_while_held(kept, first)
        kept.signal(sig, first)
        exit_status(kept)
        kept.ends(status=None)
    assert not kept.is_open()


def test_stop_reaches_the_third_generation_while_the_first_still_retires(kept):
    kept.start()
    first = kept.pid
    with Held(kept) as old:
        for number in (1, 2):
            kept.signal(signal.SIGUSR2, first)
            kept.wait_for(r"event=upgrade\.committed", number)
        kept.wait_for("generation=2 event=phase.stopped")
        until("two generations", lambda: [g.board.header.generation for g in kept.generations()] == [1, 3], kept)
        kept.signal(signal.SIGTERM, first)
        kept.wait_for("generation=3 event=phase.(?:lame_duck|draining)")
        assert old.finish().generation == 1
    assert exit_status(kept) == 0


def test_keeper_leaves_another_service_of_the_same_name_alone(kept, make_service):
    other = make_service()
    other.name = kept.name
    other.write_conf(CONF)
    other.start()
    # Oldest first: the other one is upgraded once, so that the two are of one age.
    keeper = become_kept(kept)
    serving(kept, 2)
    kept.signal(signal.SIGTERM, keeper)
    assert exit_status(kept) == 0
    assert kept.matches("generation=2 event=phase.stopped")
    assert not other.matches(r"event=phase\.(?:lame_duck|draining|stopped)")
    assert other.get().generation == 1


def test_kept_pid_of_a_daemon_is_refused_at_start(make_service):
    service = make_service(keep_pid=True)
    service.arguments = ["--daemon", "--error-logfile", str(service.log_file)]
    service.spawn().wait(timeout=30)
    service.wait_for("KEEP_PID = True and daemon = True contradict each other")
    service.ends(status=None)
