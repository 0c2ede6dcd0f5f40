"""A master that was started, and not forked, takes over from the one that runs."""

from __future__ import annotations

import array
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes.harness import (
    PATIENCE,
    Held,
    Service,
    answered_from,
    descriptors,
    generations_of,
    seen_from_here,
    until,
)  # fmt: skip
from tests.processes.test_commit_window import AFTER_THE_GATE
from zdd_web.lifecycle import Phase
from zdd_web.system import fd_passing

#: The loop turns as often as under load, and the commit window is no longer than it takes to look at it.
QUICK = """
import os
import zdd_web.gunicorn.master.master as loop
loop.IDLE_TICK, os.environ["ZDD_WEB_COMMIT_WINDOW"] = 0.02, "{window}"
"""

#: Long enough to do something in it.
WIDE = 30.0

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def configure(service: Service, window: float = 0.0, **settings: object) -> Service:
    return service.configure(QUICK.format(window=window), **settings)


@pytest.fixture
def old(make_service: Callable[..., Service]) -> Service:
    """A service that offers itself; not started yet."""
    return configure(make_service(workers=1, takeover=True, generation_header="X-Zdd-Generation"))


def another(make_service: Callable[..., Service], old: Service, **settings: object) -> Service:
    """Make the same service once more, in a directory and with a pid file of its own."""
    service = make_service(old.worker_class, workers=old.workers)
    service.name, service.port = old.name, old.port
    return configure(service, **{**old.settings, **settings})


def take_over(new: Service, old: Service) -> Service:
    """Start a newcomer and wait until it is in office."""
    times = len(old.matches(r"event=upgrade\.committed")) + 1
    new.spawn()
    old.wait_for(r"event=upgrade\.committed", times)
    new.wait_for(r"event=takeover\.offered")
    return new


def fails(new: Service, status: int = 1) -> str:
    """Wait for a newcomer's end; return its log."""
    assert new.process is not None
    new.ends(status)
    assert not new.pid_file.exists()
    assert "Traceback" not in new.log() or status == 3
    return new.log()


def serves_on(service: Service, generation: int = 1) -> None:
    """The old one is in office, alone, and the next takeover finds it."""
    service.until_one_generation()
    assert service.snapshot().phase is Phase.SERVING
    assert service.get().generation == generation
    assert service.pid_file.read_text() == f"{service.pid}\n"


def at(service: Service) -> str:
    return fd_passing.address(service.name, str(service.settings.get("takeover_socket", "")))


def held(pid: int, where: str) -> set[str]:
    """Return the sockets with that abstract address, and the connections to it, that a process has."""
    named = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines() if where[1:] in line}
    return {f"socket:[{inode}]" for inode in named} & set(descriptors(pid).values())


def connected(service: Service) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(PATIENCE)
    end.connect(at(service))
    return end


# -- what it costs


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_nothing_is_lost_and_the_line_goes_on(make_service, worker_class: str):
    first = make_service(worker_class, workers=2, takeover=True, generation_header="X-Zdd-Generation")
    configure(first).start()
    second = another(make_service, first)
    second.deploy("2")
    with first.under_load() as load:
        take_over(second, first)
        first.ends(0)
        answered_from(load, 50)
        assert (first.get().version, first.get().generation) == ("2", 2)
        # One that took over is upgraded as any other, and what comes of that is taken over from in its turn.
        second.upgrade()
        second.wait_for(r"generation=3 event=takeover\.offered")
        fourth = another(make_service, first)
        take_over(fourth, second)
        second.ends(0)
        answered_from(load, 50)
    assert generations_of(load) == {1, 2, 3, 4}
    assert not first.pid_file.exists()
    assert not second.pid_file.exists()
    assert fourth.pid_file.read_text() == f"{fourth.pid}\n"
    assert re.search(r"event=upgrade\.started successor=\d+ timeout=60 by=takeover", first.log())
    assert not re.search(r"internal\.error|Traceback|takeover\.(failed|rejected)", first.log() + second.log())
    fourth.stop()
    fourth.leaves_no_trace()
    assert fd_passing.connect(at(fourth), 0) is None


#: What systemd does for a socket unit.
ACTIVATE = """
import fcntl, socket, sys
from zdd_web.cli.rehearse.socket_activation import activate
listener = socket.create_server(("127.0.0.1", 0), backlog=100)
activate({"web": fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, 10)}, sys.argv[1:])
"""


@pytest.mark.parametrize("listener", ["reuseport", "systemd"])
def test_nothing_is_lost_in_the_other_listener_modes(make_service, listener: str):
    old = make_service(workers=2, takeover=True, listener=listener, generation_header="X-Zdd-Generation")
    new = another(make_service, old, listener=listener)
    if listener == "systemd":
        old.bind = new.bind = None
        old.launcher = [sys.executable, "-c", ACTIVATE, *old.launcher]
    new.workers = 3
    configure(old).start()
    with old.under_load() as load:
        take_over(new, old)
        old.ends(0)
        answered_from(load, 50)
    assert generations_of(load) == {1, 2}
    new.port = old.port
    new.stop()
    new.leaves_no_trace()


def test_a_pid_file_that_both_have_is_handed_over(make_service, old: Service):
    # A pid that must stay for a child must not for one that has a parent of its own.
    configure(old, keep_pid=True).start()
    first = old.pid
    new = another(make_service, old)
    new.pid_file = old.pid_file
    with Held(old) as held:
        take_over(new, old)
        # Both run, and can be seen to be one service.
        assert new.pid_file.read_text() == f"{new.pid}\n" != f"{first}\n"
        said = old.run("status", "--name", old.name).stdout
        assert "retiring" in said
        assert "serving" in said
        assert held.is_answered()
    old.ends(0)
    assert new.pid_file.read_text() == f"{new.pid}\n"
    new.upgrade()
    new.wait_for("event=keeper.started")
    new.stop()
    new.leaves_no_trace()


def test_only_masters_hold_the_socket(make_service, old: Service):
    configure(old, WIDE, probe_bind="127.0.0.1:0").start()
    master = old.pid
    new = another(make_service, old)
    with connected(old):
        process = new.spawn()
        # All that there may be: the listener, somebody who waits, and the old one's end of their connection.
        new.wait_for(r"event=phase\.serving")
        old.signal(signal.SIGTTIN, master)
        old.wait_for("Booting worker", times=2)
        ours = {master, process.pid}
        others = {*old.processes(), *new.processes()} - ours
        assert len(others) >= 5
        assert len(held(master, at(old))) == 3
        until("the end of theirs", lambda: not any(held(pid, at(old)) for pid in others), old)
    # Told to stop before it is in office: the other serves on.
    process.terminate()
    new.ends(0)
    serves_on(old)
    old.stop()


def test_without_takeover_a_second_start_and_another_service_leave_it_alone(make_service, old: Service, tmp_path: Path):
    old.configure(takeover_socket=str(tmp_path / "takeover")).start()
    other = another(make_service, old, takeover=False, takeover_socket="")
    other.bind = f"127.0.0.1:{old.port}"
    process = other.spawn()
    until("the other's complaint", lambda: other.matches("in use"), other)
    process.kill()
    serves_on(old)
    assert not old.matches("upgrade|takeover.rejected")
    # On the same path, by mistake.
    stranger = another(make_service, old)
    stranger.name = "somebody-else"
    configure(stranger).spawn()
    assert "'somebody-else'" in fails(stranger)
    serves_on(old)
    old.stop()


# -- when the newcomer fails


def test_a_newcomer_whose_app_is_broken_costs_nothing(make_service, old: Service):
    old.start()
    new = another(make_service, old)
    new.deploy("2", at_import="raise ImportError('boom at import')")
    with old.under_load(4) as load:
        new.spawn()
        assert "boom at import" in old.wait_for(r"event=upgrade\.failed")
        assert "boom at import" in fails(new, status=3)
        answered_from(load, 20)
        serves_on(old)
        new.deploy("3")
        take_over(new, old)
        answered_from(load, 20)
    assert new.get().version == "3"
    old.ends(0)
    new.stop()


def test_a_newcomer_that_wants_other_listeners_says_so_and_ends(make_service, old: Service):
    old.start()
    new = another(make_service, old, listener="reuseport")
    new.spawn()
    reason = "LISTENER is 'reuseport' in the new configuration and 'fd' in the running one"
    assert reason in old.wait_for(r"event=upgrade\.failed")
    assert reason in fails(new)
    # Nor does it come as far as that with a pid file of another service.
    third = make_service("sync").start()
    new = another(make_service, old)
    new.pid_file.write_text(f"{third.pid}\n")
    new.spawn()
    new.wait_for(f"names process {third.pid}, which runs")
    third.stop()
    new.ends(1)
    serves_on(old)
    old.stop()


def test_a_newcomer_that_is_killed_before_it_is_ready_costs_nothing(make_service, old: Service):
    old.start()
    new = another(make_service, old)
    new.deploy("2", at_import="time.sleep(600)")
    process = new.spawn()
    new.wait_for(r"event=boot\.started")
    until("a worker", lambda: len(new.processes()) > 1, new)
    process.send_signal(signal.SIGKILL)
    assert f"process {process.pid} is gone" in old.wait_for(r"event=upgrade\.failed")
    new.ends(-signal.SIGKILL)
    serves_on(old)
    old.stop()


def test_a_newcomer_that_is_killed_in_the_commit_window_costs_nothing(make_service, old: Service):
    configure(old, WIDE).start()
    new = another(make_service, old)
    process = new.spawn()
    new.wait_for(r"event=phase\.serving")
    process.send_signal(signal.SIGKILL)
    assert "in the commit window" in old.wait_for(r"event=upgrade\.failed")
    new.ends(-signal.SIGKILL)
    serves_on(old)
    old.stop()


def test_a_newcomer_whose_workers_crash_in_the_commit_window_is_rejected(make_service, old: Service):
    configure(old, WIDE).start()
    new = another(make_service, old)
    new.deploy("2", at_import=AFTER_THE_GATE.format(do="os.kill(os.getpid(), signal.SIGSEGV)", seconds=0.1))
    new.spawn()
    reason = old.wait_for(r"event=upgrade\.failed")
    assert re.search(r"worker \d+ ended in the commit window: killed by SIGSEGV", reason)
    new.wait_for(r"event=upgrade\.given_up")
    new.ends(status=None)
    serves_on(old)
    old.stop()


def test_the_old_one_serves_again_when_the_newcomer_is_killed_in_office(make_service, old: Service):
    old.start()
    new = another(make_service, old)
    with Held(old) as held:
        take_over(new, old)
        new.signal(signal.SIGKILL)
        old.wait_for(r"event=successor\.lost")
        new.ends(-signal.SIGKILL)
        until("the old one's answer", lambda: old.get().generation == 1, old)
        old.wait_for(r"event=takeover\.offered", times=2)
        assert held.is_answered()
    new.pid_file.unlink()
    serves_on(old)
    take_over(another(make_service, old), old).stop(None)
    old.ends(0)


def test_a_newcomer_that_is_not_ready_in_time_is_given_up(make_service, old: Service):
    configure(old, upgrade_timeout=1).start()
    new = another(make_service, old)
    new.deploy("2", at_import="time.sleep(600)")
    new.spawn()
    assert "not ready within UPGRADE_TIMEOUT = 1 s" in old.wait_for(r"event=upgrade\.failed")
    said = fails(new)
    assert "event=upgrade.given_up" in said
    assert "the running master has given this one up: not ready within UPGRADE_TIMEOUT = 1 s" in said
    serves_on(old)
    old.stop()


def test_a_newcomer_that_is_stopped_and_hears_nothing_is_killed(make_service, old: Service):
    limit = "import zdd_web.gunicorn.upgrade.external_successor as newcomer\nnewcomer.ENDS_WITHIN = 0.0\n"
    old.configure(limit + QUICK.format(window=0.0), upgrade_timeout=8).start()
    new = another(make_service, old)
    new.deploy("2", at_import="time.sleep(600)")
    process = new.spawn()
    new.wait_for(r"event=boot\.started")
    process.send_signal(signal.SIGSTOP)
    old.wait_for(r"event=upgrade\.failed")
    new.ends(-signal.SIGKILL)
    serves_on(old)
    old.stop()


# -- when the old one fails, or is told something else meanwhile


def test_a_newcomer_whose_predecessor_is_killed_serves_alone(make_service, old: Service):
    old.start()
    new = another(make_service, old)
    hold = new.directory / "hold"
    hold.touch()
    new.deploy("2", at_import=f"while os.path.exists({str(hold)!r}): time.sleep(0.02)")
    new.spawn()
    new.wait_for(r"event=boot\.started")
    old.signal(signal.SIGKILL, old.pid)
    new.wait_for(r"event=predecessor\.lost")
    hold.unlink()
    new.wait_for(r"event=phase\.serving")
    new.wait_for(r"event=takeover\.offered")
    assert new.get().version == "2"
    assert new.pid_file.read_text() == f"{new.pid}\n"
    new.stop()
    old.ends(None)
    old.pid_file.unlink()


def test_an_upgrade_and_a_takeover_refuse_each_other(make_service, old: Service):
    old.start()
    hold = old.directory / "hold"
    hold.touch()
    wait = f"while os.path.exists({str(hold)!r}): time.sleep(0.02)"
    old.deploy("2", at_import=wait)
    old.signal(signal.SIGUSR2)
    old.wait_for(r"event=upgrade\.started")
    new = another(make_service, old)
    new.spawn()
    reason = r"an upgrade is under way \(successor \d+\): wait for its end"
    assert re.search(rf"the running master \(pid {old.pid}\) refuses: {reason}", fails(new))
    assert re.search(f"request=takeover .*{reason}", old.wait_for("event=refused"))
    hold.unlink()
    old.wait_for(r"generation=2 event=takeover\.offered")
    hold.touch()
    new.deploy("3", at_import=wait)
    new.spawn()
    old.wait_for(r"generation=2 event=upgrade\.started")
    old.signal(signal.SIGUSR2)
    assert re.search(f"signal=USR2 .*{reason}", old.wait_for("event=refused", times=2))
    hold.unlink()
    old.wait_for(r"generation=2 event=upgrade\.committed")
    old.ends(0)
    assert new.get().version == "3"
    new.stop()


def test_a_stop_of_the_old_one_ends_a_newcomer_that_boots(make_service, old: Service):
    configure(old, WIDE).start()
    new = another(make_service, old)
    new.deploy("2", at_import="time.sleep(600)")
    new.spawn()
    new.wait_for(r"event=boot\.started")
    old.stop()
    assert "given this one up: the service was stopped" in fails(new)


def test_a_stop_of_the_old_one_leaves_a_newcomer_alone_that_serves(make_service, old: Service):
    configure(old, WIDE).start()
    new = another(make_service, old)
    new.spawn()
    new.wait_for(r"event=phase\.serving")
    old.signal(signal.SIGTERM, old.pid)
    old.ends(0)
    assert old.matches(r"event=upgrade\.committed")
    new.wait_for(r"event=takeover\.offered")
    assert new.get().generation == 2
    new.stop()


# -- whoever else comes


def test_peers_that_say_nothing_or_nonsense_cost_nothing(make_service, old: Service):
    old.configure(
        "import zdd_web.gunicorn.upgrade.takeover as t\nt.SAID_EVERY = 0.0\n" + QUICK.format(window=0.0)
    ).start()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(old)) for _ in range(3)]
        # It has connected and is stopped: another process's connection, that nobody closes.
        script = f"import os, signal, socket; s = socket.socket(1, 5); s.connect({at(old)!r}); os.kill(os.getpid(), 19)"
        stopped = subprocess.Popen([sys.executable, "-c", script])
        stack.callback(stopped.wait)
        stack.callback(stopped.kill)
        until("its stop", lambda: Path(f"/proc/{stopped.pid}/stat").read_text().split(") ")[1][0] == "T")
        nonsense = [
            b"?", b".", b".{", b"x" * 60_000, b"." + b"[" * 10_000, b'."text"', b".{}", b'.{"kind": "takeover"}',
            b'.{"kind": "takeover", "pid": -1, "name": "x"}', b'.{"kind": "takeover", "pid": "1", "name": 1}',
            b'+{"kind": "takeover", "pid": 1}', "\x00\udcff".encode("utf-8", "surrogateescape"),
        ]  # fmt: skip
        for number, said in enumerate(nonsense, 1):
            with connected(old) as peer:
                peer.send(said)
                assert peer.recv(10) == b""  # closed
                old.wait_for(r"event=takeover\.rejected .*is not a request", number)
        with connected(old) as peer:
            # Descriptors that nobody has asked for.
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]).tobytes())
            before = len(descriptors(old.pid))
            peer.sendmsg([b".{}"], [rights])
            assert peer.recv(10) == b""
            assert len(descriptors(old.pid)) <= before
        connected(old).close()
        # The silent ones wait beside it.
        new = another(make_service, old)
        take_over(new, old)
        for peer in silent:
            assert peer.recv(10) == b""
    assert old.matches("event=takeover.rejected uid=")
    assert not old.matches("internal.error")
    old.ends(0)
    new.stop()


def test_silent_peers_are_closed_and_only_so_many_are_let_in(make_service, old: Service):
    limits = "import zdd_web.gunicorn.upgrade.takeover as t\nt.SPEAKS_WITHIN, t.MOST_WAITING = 0.2, 2\n"
    old.configure(limits + QUICK.format(window=0.0)).start()
    master = old.pid
    before = len(descriptors(master))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(old)) for _ in range(10)]
        new = another(make_service, old)
        new.spawn()
        most = [0]

        def is_let_in() -> bool:
            most[0] = max(most[0], len(descriptors(master)))
            return bool(new.matches(r"event=takeover\.found"))

        until("the newcomer's turn", is_let_in, old)
        # Two that were let in; a boot log, and what a handover needs.
        assert most[0] <= before + 2 + 4
        for peer in silent:
            assert peer.recv(10) == b""
        old.wait_for(r"event=upgrade\.committed")
    assert "has said nothing for 0.2 s" in old.wait_for(r"event=takeover\.rejected")
    old.ends(0)
    new.stop()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be another user for a moment: the kernel notes who it is at `connect()` and at `listen()`."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@root_only
def test_another_user_is_turned_away(old: Service):
    old.start()
    with as_nobody():
        peer = connected(old)
    with peer:
        with contextlib.suppress(BrokenPipeError):
            fd_passing.send(peer, {"kind": "takeover", "name": old.name, "pid": os.getpid()})
        said, given = fd_passing.receive(peer, time.monotonic() + PATIENCE)
    reason = "user 65534 may not take over a service of user 0"
    assert (said, given) == ({"kind": "refused", "reason": reason}, [])
    assert f'uid=65534 peer={os.getpid()} reason="{reason}"' in old.wait_for(r"event=takeover\.rejected")
    assert not old.matches("upgrade.started")
    serves_on(old)
    old.stop()


@root_only
def test_a_newcomer_trusts_no_other_user(old: Service):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        with as_nobody():
            other.bind(at(old))
            other.listen()
        old.spawn()
        assert "is user 65534's, and this is user 0" in fails(old)


def test_a_path_is_for_its_user_alone_and_a_stale_one_is_replaced(make_service, old: Service, tmp_path: Path):
    path = tmp_path / "takeover"
    configure(old, takeover_socket=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    before = os.umask(0)
    try:
        old.start()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    new = another(make_service, old)
    take_over(new, old)
    old.ends(0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    new.signal(signal.SIGKILL)
    new.ends(None)
    new.pid_file.unlink()
    # What it has left behind is nobody's; a first start again.
    old.spawn()
    old.wait_for(r"generation=1 event=phase\.serving", times=2)
    old.learn_port()
    old.stop()
    assert not path.exists()
    path.write_text("somebody's file")
    old.spawn()
    assert f"TAKEOVER_SOCKET = '{path}': address already in use" in fails(old)
    assert path.read_text() == "somebody's file"


def test_a_master_that_does_not_answer_is_no_reason_to_start_beside_it(make_service, old: Service):
    limit = "import zdd_web.gunicorn.upgrade.takeover as t\nt.ANSWERS_WITHIN = 0.3\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.bind(at(old))
        mute.listen()
        old.configure(limit).spawn()
        said = fails(old)
    assert f"the running master (pid {os.getpid()}) cannot be taken over from: it has not answered" in said


# -- another pid namespace


@root_only
def test_a_newcomer_in_another_pid_namespace(make_service, old: Service):
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespaces here")
    configure(old, upgrade_timeout=8).start()
    new = another(make_service, old)
    new.launcher = [*inside, *new.launcher]
    new.deploy("2", at_import="time.sleep(600)")
    new.spawn()
    assert "not ready within" in old.wait_for(r"event=upgrade\.failed")
    new.wait_for("the running master has given this one up")
    new.ends(1)
    serves_on(old)
    configure(old, upgrade_timeout=30)
    new.deploy("3")
    with old.under_load(4) as load:
        new.spawn()
        until("a verdict", lambda: old.matches(r"event=upgrade\.committed|pgrade.failed.*pgrade.failed"), old)
        answered_from(load, 20)
    assert old.get().version == "3"
    old.ends(0)
    assert new.matches(r"event=takeover\.found predecessor=0")
    seen = seen_from_here(new, 1)
    assert new.pid_file.read_text() == "1\n"
    new.signal(signal.SIGTERM, seen)
    new.ends(0)


#: Connects as another user as fast as it can, and keeps the kernel's queue full.
FLOOD = """
import os, socket, sys, time
os.setgid(65534), os.setuid(65534)
connected, full = [], False
while True:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.setblocking(False)
    try:
        end.connect(sys.argv[1].replace("@", chr(0)))
        connected.append(end)
    except BlockingIOError:
        if not full:
            full = True
            print("full", flush=True)
        end.close()
        time.sleep(0.0005)
    if len(connected) > 200:
        connected.pop(0).close()
"""


@root_only
def test_another_user_who_connects_in_a_loop_does_not_keep_a_takeover_waiting(make_service, old: Service):
    old.start()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            script = [sys.executable, "-c", FLOOD, fd_passing.spell(at(old))]
            flood = stack.enter_context(subprocess.Popen(script, stdout=subprocess.PIPE, text=True))
            stack.callback(flood.kill)
            assert flood.stdout is not None
            assert flood.stdout.readline() == "full\n"
            stack.callback(flood.stdout.close)
        new = another(make_service, old)
        new.spawn()
        until("the takeover", lambda: new.matches(r"event=takeover\.found") or new.process.poll() is not None, old)
        assert new.matches(r"event=takeover\.found"), new.log()
        old.wait_for(r"event=upgrade\.committed")
    assert old.matches(r"event=takeover\.rejected uid=65534")
    assert not old.matches("internal.error")
    old.ends(0)
    new.stop()
