"""An upgrade from its fork to its end, with real successors: small programs that speak the protocol, or do not."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import read_to_end, status_of
from tests.helpers.in_process import descriptors
from zdd_web.board import LAYOUT
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.upgrade.states import Successor
from zdd_web.gunicorn.upgrade.successor_process import LATE_AT_LEAST, Upgrade, Verdict
from zdd_web.system import proc
from zdd_web.system.boot_log import BootLog
from zdd_web.system.captured_output import KEPT_BYTES

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

#: What every successor begins with; `pipe` is the inherited "listener" that a test reads to its end.
PRELUDE = """
import os, select, signal, sys
from zdd_web.system import clock, proc
from zdd_web.board import Board, WorkerState
from zdd_web.gunicorn.handoff.inheritance import Inheritance

inherited = Inheritance.take(os.environ)
os.dup2(inherited.stderr, 2) if {real_stderr} else None
channel = inherited.open_channel()
board = Board.create("unit")
board.header.generation, board.header.master_pid = inherited.generation, os.getpid()
board.header.tick_at = clock.now_ns()
pipe = inherited.listeners[0]

def hello():
    channel.send("hello", fd=board.fd, pid=os.getpid(), pid_file="/run/unit.pid")

def hear():
    while not (message := channel.receive()):
        if channel.ended:
            sys.exit(50)
        select.select([channel], [], [])
    return message.kind

def say(text):
    os.write(pipe, text.encode() + b"\\n")

def fork_worker(age, work):
    slot = board.claim(age)
    if os.fork() == 0:
        channel.close()
        slot.start = proc.start_time(os.getpid())
        slot.pid = os.getpid()
        work()
    while not slot.pid:
        os.sched_yield()
    slot.order.start, slot.order.pid = slot.start, slot.pid
    return slot

def hang():
    while True:
        signal.pause()
"""


class Bench:
    """Begins upgrades of a script, and holds the reading end of the pipe that the script inherits."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reader, self.writer = os.pipe()
        self.boot_log = BootLog()
        self.upgrades: list[Upgrade] = []

    def begin(
        self,
        script: str = "",
        *,
        timeout: float = PATIENCE,
        real_stderr: bool = False,
        descriptors: tuple[int, ...] = (),
    ) -> Upgrade:
        source = PRELUDE.replace("{real_stderr}", str(real_stderr)) + textwrap.dedent(script)
        return self.launch((sys.executable, "-c", source), timeout=timeout, descriptors=descriptors)

    def launch(
        self,
        command: tuple[str, ...],
        *,
        directory: Path | None = None,
        timeout: float = PATIENCE,
        descriptors: tuple[int, ...] = (),
    ) -> Upgrade:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        launch = Launch(str(directory or self.directory), command, environ, descriptors)
        inheritance = Inheritance(
            generation=2,
            predecessor=os.getpid(),
            channel=-1,
            boot_log=self.boot_log.fd,
            stderr=-1,
            listeners=(self.writer,),
            binds=("127.0.0.1:0",),
        )
        upgrade = Upgrade.begin(launch, inheritance, self.boot_log, timeout, commit_window=0.0)
        self.upgrades.append(upgrade)
        return upgrade

    def said(self) -> list[str]:
        """All that was written to the pipe, by the time that nobody is left who could write to it."""
        os.close(self.writer)
        self.writer = -1
        return read_to_end(os.dup(self.reader)).decode().splitlines()

    def close(self) -> None:
        for upgrade in self.upgrades:
            upgrade.end(now=True)
        self.boot_log.close()
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def await_news(upgrade: Upgrade) -> None:
    readable, _, _ = select.select([upgrade._channel], [], [], PATIENCE)
    assert readable, "the successor says nothing"


def verdict(upgrade: Upgrade) -> Verdict:
    """Turn as the master's loop does until there is a verdict."""
    while (found := upgrade.poll()) is None:
        await_news(upgrade)
    return found


def until(upgrade: Upgrade, condition: Callable[[], object]) -> None:
    while not condition():
        await_news(upgrade)
        assert upgrade.poll() is None


def no_child_is_left() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
        return False
    except ChildProcessError:
        return True


# -- the way to office


def test_successor_that_is_ready_waits_for_go_and_takes_office(bench: Bench) -> None:
    upgrade = bench.begin("""
        hello()
        channel.send("ready", workers=3)
        say(hear())
        board.header.tick_at = clock.now_ns()
        channel.send("garbage to wake the test")
        say(hear())
        channel.send("release")
    """)
    assert upgrade.state is Successor.STARTING
    assert verdict(upgrade) == Verdict(ready=True, workers=3)
    assert upgrade.poll() is None
    assert (upgrade.pid_file, upgrade.committed) == ("/run/unit.pid", False)
    assert upgrade.board is not None
    assert upgrade.board.header.master_pid == upgrade.pid
    upgrade.go()
    assert upgrade.committed is False
    await_news(upgrade)
    assert upgrade.poll() is None
    assert upgrade.committed is True
    upgrade.promote_successor()
    assert (upgrade.state, upgrade.committed) == (Successor.PROMOTED, False)
    until(upgrade, lambda: upgrade.state is Successor.ENDING)
    assert bench.said() == ["go", "office"]


def test_successor_serves_for_as_long_as_the_commit_window_before_it_is_in_office(bench: Bench) -> None:
    upgrade = bench.begin("""
        hello()
        channel.send("ready", workers=1)
        hear()
        board.header.tick_at = clock.now_ns() + 3600 * 10**9
        channel.send("garbage to wake the test")
        hang()
    """)
    assert verdict(upgrade).ready
    upgrade.commit_window = 3600.0
    upgrade.go()
    await_news(upgrade)
    assert upgrade.poll() is None
    assert upgrade.committed is False


def test_successor_that_has_not_turned_since_go_is_not_in_office(bench: Bench) -> None:
    upgrade = bench.begin("""
        board.header.tick_at = clock.now_ns()
        hello()
        channel.send("ready", workers=1)
        hang()
    """)
    assert verdict(upgrade).ready
    upgrade.go()
    assert upgrade.poll() is None
    assert upgrade.committed is False


def test_successor_starts_in_the_recorded_directory_with_the_recorded_environment(bench: Bench) -> None:
    upgrade = bench.begin("""
        channel.send("failed", reason=f"{os.getcwd()} {inherited.generation} {inherited.predecessor} {inherited.binds} "
                     f"{'ZDD_WEB_HANDOVER' in os.environ} {os.environ['GUNICORN_FD'].isdigit()}")
    """)
    cwd = bench.directory.resolve()
    assert verdict(upgrade) == Verdict(False, f"{cwd} 2 {os.getpid()} ('127.0.0.1:0',) False False")


def test_successor_has_the_listener_itself(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.close(bench.writer)
        bench.writer = os.dup(listener.fileno())
        upgrade = bench.begin("""
            import socket
            listener = socket.socket(fileno=pipe)
            listener.setblocking(True)
            connection, _ = listener.accept()
            connection.sendall(b"answered by the successor")
            connection.close()
            hang()
        """)
        with socket.create_connection(listener.getsockname(), timeout=PATIENCE) as client:
            assert client.makefile("rb").read() == b"answered by the successor"
        upgrade.end(now=True)


def test_successor_has_no_other_descriptor_of_ours(bench: Bench) -> None:
    # What this process was given by its own parent, to be handed on, is nobody's secret.
    handed_on = {link for fd, link in descriptors() if os.get_inheritable(fd)}
    reader, writer = os.pipe()
    upgrade = bench.begin("""
        known = {0, 1, 2, board.fd, *inherited.descriptors}
        links = []
        for fd in set(map(int, os.listdir("/proc/self/fd"))) - known:
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                pass
        channel.send("failed", reason="\\n".join(link for link in links if link.startswith(("pipe:", "socket:"))))
    """)
    found = set(verdict(upgrade).reason.splitlines())
    os.close(reader)
    os.close(writer)
    assert found - handed_on == set()


# -- the ways to fail


def test_reason_that_the_successor_gives_is_the_verdicts(bench: Bench) -> None:
    upgrade = bench.begin('hello(); channel.send("failed", reason="worker 7 ended: ImportError: shop"); hang()')
    assert verdict(upgrade) == Verdict(False, "worker 7 ended: ImportError: shop")


def test_exit_status_is_in_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("hello(); sys.exit(3)")
    assert verdict(upgrade) == Verdict(False, "the new master ended before it was ready: exit status 3")
    assert no_child_is_left()


def test_last_line_of_a_successor_that_never_said_hello_is_in_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("raise ImportError('no module named shop')")
    assert verdict(upgrade) == Verdict(
        False, "the new master ended before it was ready: exit status 1; ImportError: no module named shop"
    )


def test_error_of_a_worker_is_in_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("""
        hello()
        board.claim(1)
        board.claim(2).error = "ImportError: no module named shop"
        sys.exit(3)
    """)
    assert verdict(upgrade) == Verdict(
        False,
        "the new master ended before it was ready: exit status 3; ImportError: no module named shop",
    )


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN])
def test_signal_that_killed_it_is_in_the_reason(bench: Bench, sig: signal.Signals) -> None:
    upgrade = bench.begin(f"hello(); os.kill(os.getpid(), {int(sig)})")
    assert verdict(upgrade) == Verdict(False, f"the new master ended before it was ready: killed by {sig.name}")


def test_signal_without_a_name_is_in_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("hello(); os.kill(os.getpid(), 40)")
    assert "killed by" in verdict(upgrade).reason


def test_status_that_the_masters_reaper_took_is_in_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("sys.exit(4)")
    _, status = os.waitpid(upgrade.pid, 0)
    upgrade.reaped(status)
    assert verdict(upgrade).reason == "the new master ended before it was ready: exit status 4"


def test_status_that_somebody_else_took_is_missed_in_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("sys.exit(4)")
    os.waitpid(upgrade.pid, 0)
    assert verdict(upgrade).reason == "the new master ended before it was ready: without a status"


def test_end_in_the_commit_window_says_so(bench: Bench) -> None:
    upgrade = bench.begin('hello(); channel.send("ready", workers=1); hear(); sys.exit(5)')
    assert verdict(upgrade).ready
    upgrade.go()
    assert verdict(upgrade) == Verdict(False, "the new master ended in the commit window: exit status 5")


def test_end_after_the_handover_says_so(bench: Bench) -> None:
    upgrade = bench.begin('hello(); channel.send("ready", workers=1); hear(); hear(); sys.exit(6)')
    assert verdict(upgrade).ready
    upgrade.go()
    upgrade.promote_successor()
    assert verdict(upgrade) == Verdict(False, "the new master ended after the handover: exit status 6")


def test_end_after_the_handover_that_it_was_asked_for_is_no_failure(bench: Bench) -> None:
    upgrade = bench.begin('hello(); channel.send("ready", workers=1); hear(); hear(); channel.send("release")')
    assert verdict(upgrade).ready
    upgrade.go()
    upgrade.promote_successor()
    until(upgrade, lambda: upgrade._channel.ended)
    assert upgrade.poll() is None


def test_successor_that_was_stopped_while_it_booted_has_failed(bench: Bench) -> None:
    upgrade = bench.begin('hello(); channel.send("release"); sys.exit(0)')
    assert verdict(upgrade) == Verdict(False, "the new generation was told to stop before it was ready")


def test_successor_that_was_stopped_in_the_commit_window_has_failed(bench: Bench) -> None:
    upgrade = bench.begin("""
        hello()
        channel.send("ready", workers=1)
        hear()
        board.header.tick_at = clock.now_ns()
        channel.send("release")
    """)
    assert verdict(upgrade).ready
    upgrade.go()
    assert verdict(upgrade) == Verdict(False, "the new generation was told to stop in the commit window")


def test_successor_that_is_not_ready_in_time_has_failed_and_says_how_far_it_came(bench: Bench) -> None:
    upgrade = bench.begin("""
        board.claim(1).state = WorkerState.READY
        board.claim(2)
        board.claim(3).error = "OperationalError: no database"
        hello()
        hang()
    """)
    until(upgrade, lambda: upgrade.board)
    upgrade.began -= int(PATIENCE * 1e9)
    assert upgrade.poll() == Verdict(
        False,
        "not ready within UPGRADE_TIMEOUT = 60 s: workers: 2 booting, 1 ready; OperationalError: no database",
    )


def test_successor_that_never_says_hello_fails_with_what_may_be_the_cause(bench: Bench) -> None:
    upgrade = bench.begin("hang()", timeout=0.0)
    assert verdict(upgrade) == Verdict(
        False,
        "not ready within UPGRADE_TIMEOUT = 0 s: zdd_web was not installed yet (a configuration file that hangs, "
        "or one without install()?)",
    )


def test_successor_that_is_ready_at_the_last_moment_is_ready(bench: Bench) -> None:
    upgrade = bench.begin('hello(); channel.send("ready", workers=1); say("sent"); hang()')
    assert os.read(bench.reader, 100) == b"sent\n"
    upgrade.began -= int(PATIENCE * 1e9)
    assert upgrade.poll() == Verdict(ready=True, workers=1)


def test_time_is_not_up_for_a_successor_that_serves(bench: Bench) -> None:
    upgrade = bench.begin("""
        hello()
        channel.send("ready", workers=1)
        hear()
        board.header.tick_at = clock.now_ns()
        channel.send("turning")
        hang()
    """)
    assert verdict(upgrade).ready
    upgrade.go()
    await_news(upgrade)
    upgrade.began -= int(PATIENCE * 1e9)
    assert upgrade.poll() is None


@pytest.mark.parametrize(
    ("is_active", "said"), [(False, "5 s in the commit window"), (True, "15 s after the handover")]
)
def test_successor_that_stands_still_has_failed(bench: Bench, is_active: bool, said: str) -> None:
    upgrade = bench.begin('board.header.tick_at = 1; hello(); channel.send("ready", workers=1); hang()')
    assert verdict(upgrade).ready
    upgrade.go()
    if is_active:
        upgrade.promote_successor()
    assert upgrade.poll() == Verdict(False, f"the new master has stood still for {said}")


def test_hello_without_a_board_of_ours_is_still_a_hello(bench: Bench) -> None:
    upgrade = bench.begin("""
        channel.send("hello", fd=inherited.boot_log, pid=os.getpid(), pid_file="/run/unit.pid")
        channel.send("hello", pid=os.getpid(), pid_file="/run/other.pid")
        channel.send("ready", workers=2)
        hang()
    """)
    assert verdict(upgrade) == Verdict(ready=True, workers=2)
    assert (upgrade.board, upgrade.pid_file) == (None, "/run/other.pid")


def test_board_of_another_version_is_named_when_time_is_up(bench: Bench) -> None:
    upgrade = bench.begin("board.header.layout = 99; hello(); hang()")
    until(upgrade, lambda: upgrade.board)
    upgrade.began -= int(PATIENCE * 1e9)
    found = upgrade.poll()
    assert found is not None
    assert f"the board has layout 99, this zdd_web reads {LAYOUT}" in found.reason


def test_garbage_on_the_channel_is_passed_over(bench: Bench) -> None:
    upgrade = bench.begin("""
        import socket
        socket.socket(fileno=os.dup(channel.fileno())).send(b"\\x00 no json")
        channel.send("from the future", what=1)
        channel.send("ready", workers=1)
        hang()
    """)
    assert verdict(upgrade) == Verdict(ready=True, workers=1)


# -- what cannot be started


@pytest.mark.parametrize("program", ["/nowhere/bin/gunicorn", "no-such-program-anywhere"])
def test_program_that_is_missing_is_reported(bench: Bench, program: str) -> None:
    upgrade = bench.launch((program, "app:app"))
    found = verdict(upgrade)
    assert not found.ready
    assert found.reason.startswith("the new generation could not be started: FileNotFoundError: ")
    assert status_of(upgrade.pid) == 127
    assert bench.said() == []


def test_program_that_may_not_be_executed_is_reported(bench: Bench) -> None:
    program = bench.directory / "gunicorn"
    program.write_text("no program")
    assert "PermissionError" in verdict(bench.launch((str(program),))).reason


def test_directory_that_is_gone_is_reported(bench: Bench) -> None:
    gone = bench.directory / "gone"
    found = verdict(bench.launch((sys.executable, "-c", ""), directory=gone))
    assert found.reason.startswith("the new generation could not be started: FileNotFoundError: ")
    assert str(gone) in found.reason


# -- the end


def test_end_kills_the_master_and_the_workers_on_its_board_and_leaves_no_zombie(bench: Bench) -> None:
    upgrade = bench.begin("""
        for age in (1, 2):
            fork_worker(age, hang)
        hello()
        channel.send("ready", workers=2)
        hang()
    """)
    assert verdict(upgrade).ready
    assert upgrade.board is not None
    workers = upgrade.board.worker_pids()
    assert len(workers) == 2
    assert all(proc.alive(pid, start) for pid, start in workers)
    upgrade.end(now=True)
    assert bench.said() == []  # that it ends means that nobody is left who has the pipe
    assert no_child_is_left()
    assert upgrade.status is not None
    assert os.waitstatus_to_exitcode(upgrade.status) == -signal.SIGKILL
    upgrade.end(now=True)


def test_end_kills_workers_whose_master_is_gone_already(bench: Bench) -> None:
    upgrade = bench.begin("""
        fork_worker(1, hang)
        hello()
        sys.exit(3)
    """)
    assert verdict(upgrade).reason.startswith("the new master ended before it was ready: exit status 3")
    upgrade.end(now=True)
    assert bench.said() == []


TERM_AWARE = """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    def worker():
        signal.signal(signal.SIGTERM, lambda *args: (say("finished"), os._exit(0)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        hang()
    fork_worker(1, worker)
    hello()
    channel.send("ready", workers=1)
    hear()
    hang()
"""


def test_end_lets_workers_finish_who_may_have_requests(bench: Bench) -> None:
    upgrade = bench.begin(TERM_AWARE)
    assert verdict(upgrade).ready
    upgrade.go()
    upgrade.end(now=False)
    assert bench.said() == ["finished"]


@pytest.mark.parametrize("went", [True, False])
def test_end_spares_nobody_before_go_or_when_told_so(bench: Bench, went: bool) -> None:
    upgrade = bench.begin(TERM_AWARE)
    assert verdict(upgrade).ready
    if went:
        upgrade.go()
    upgrade.end(now=went)
    assert bench.said() == []


def test_end_signals_nobody_who_has_the_pid_of_a_worker_by_chance(bench: Bench) -> None:
    # The board names this very process, with the start time of another.
    upgrade = bench.begin(f"""
        slot = board.claim(1)
        slot.order.pid, slot.order.start = {os.getpid()}, 1
        hello()
        hang()
    """)
    until(upgrade, lambda: upgrade.board)
    upgrade.end(now=True)
    assert bench.said() == []


def test_asking_to_stop_is_sigterm_to_the_master_alone(bench: Bench) -> None:
    upgrade = bench.begin("""
        def stop(*args):
            say("asked")
            os.kill(worker, signal.SIGKILL)
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        worker = fork_worker(1, hang).pid
        hello()
        channel.send("ready", workers=1)
        hang()
    """)
    assert verdict(upgrade).ready
    upgrade.ask_to_stop(signal.SIGTERM)
    assert bench.said() == ["asked"]


def test_successor_sees_the_end_of_its_predecessor(bench: Bench) -> None:
    upgrade = bench.begin("""
        hello()
        try:
            hear()
        except SystemExit:
            say("alone")
    """)
    until(upgrade, lambda: upgrade.board)
    upgrade.forget()
    assert bench.said() == ["alone"]
    os.waitpid(upgrade.pid, 0)


def test_fork_that_fails_leaves_nothing_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError("resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    with pytest.raises(BlockingIOError):
        bench.begin()


def test_everything_that_is_printed_before_hello_is_in_the_boot_log(bench: Bench) -> None:
    upgrade = bench.begin("print('a warning', file=sys.stderr, flush=True); hello(); hang()")
    until(upgrade, lambda: upgrade.board)
    assert bench.boot_log.text() == "a warning\n"


def test_successor_that_prints_without_end_is_read_within_bounds_and_its_last_line_is_the_reason(bench: Bench) -> None:
    upgrade = bench.begin("""
        line = b"could not connect to the database, trying again\\n" * 4096
        for _ in range(200):
            os.write(2, line)
        print("RuntimeError: gave up", file=sys.stderr)
        sys.exit(1)
    """)
    most = 0
    while (found := upgrade.poll()) is None:
        most = max(most, os.fstat(bench.boot_log.fd).st_size + len(bench.boot_log.output.text()))
    assert found.reason.endswith("RuntimeError: gave up")
    assert most < KEPT_BYTES + 100


@pytest.mark.parametrize(
    "fields",
    ["dropped=3", "dropped=[None, 1e999]", "dropped={'a': 1}", "added_paths=7", "pid_file=['x'] * 100"],
)
def test_hello_that_makes_no_sense_does_not_raise_into_the_master(bench: Bench, fields: str) -> None:
    upgrade = bench.begin(f"""
        channel.send("hello", fd=board.fd, {fields})
        channel.send("ready", workers=float("inf"))
        hang()
    """)
    assert verdict(upgrade) == Verdict(ready=True, workers=0)
    assert upgrade.board is not None


def test_hello_that_is_sent_again_and_again_costs_one_board(bench: Bench) -> None:
    upgrade = bench.begin("""
        for _ in range(50):
            hello()
        channel.send("ready", workers=1)
        hang()
    """)
    assert verdict(upgrade).ready
    with open("/proc/self/maps") as maps:
        assert maps.read().count("zdd_web:unit") == 1


def test_only_what_the_first_master_was_started_with_is_passed_on(bench: Bench) -> None:
    passed, leaked = os.dup(bench.writer), os.dup(bench.writer)
    os.set_inheritable(passed, True)
    os.set_inheritable(leaked, True)
    launch_descriptors = (passed,)
    look = f"say(f'{{[os.path.exists(f\"/proc/self/fd/{{fd}}\") for fd in {passed, leaked}]}} {{inherited.passed_on}}')"
    upgrade = bench.begin(look, descriptors=launch_descriptors)
    assert not verdict(upgrade).ready
    os.close(passed)
    os.close(leaked)
    assert bench.said() == [f"[True, False] {launch_descriptors}"]


# -- what is seen of a successor's workers in the commit window


SERVES = """
    slot = board.claim(1)
    slot.order.pid, slot.order.start, slot.state = 4711, 1, WorkerState.SERVING
    {board}
    hello()
    channel.send("ready", workers=1)
    hear()
    {then}
    board.header.tick_at = clock.now_ns()
    channel.send("garbage to wake the test")
    hang()
"""


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (
            "board.header.lost_pid, board.header.lost_status, board.header.workers_lost = 4711, 11, 1",
            "worker 4711 ended in the commit window: killed by SIGSEGV",
        ),
    ],
)
def test_successor_whose_workers_fail_in_the_commit_window_has_failed(bench: Bench, then: str, reason: str) -> None:
    upgrade = bench.begin(
        "from zdd_web.lifecycle import Phase\n" + textwrap.dedent(SERVES).format(board="pass", then=then)
    )
    assert verdict(upgrade).ready
    upgrade.go()
    assert verdict(upgrade) == Verdict(False, reason)
    assert not upgrade.committed


def test_commit_window_is_extended_by_what_is_left_of_the_timeout(bench: Bench) -> None:
    upgrade = bench.begin(SERVES.format(board="pass", then="pass"))
    assert verdict(upgrade).ready
    upgrade.go()
    assert upgrade._window is not None
    assert 0 < upgrade._window.window.limit < PATIENCE
    upgrade.state = Successor.READY
    upgrade.began -= int(PATIENCE * 1e9)
    upgrade.go()
    assert upgrade._window.window.limit == LATE_AT_LEAST


def test_successor_of_another_layout_is_judged_by_its_master_alone(bench: Bench) -> None:
    then = "board.header.workers_lost = 1"
    upgrade = bench.begin(SERVES.format(board=f"board.header.layout = {LAYOUT + 1}", then=then))
    assert verdict(upgrade).ready
    upgrade.go()
    await_news(upgrade)
    assert upgrade.poll() is None
    assert upgrade.committed


# -- a canary


CANARY = """
    from zdd_web.board import Heartbeat
    from zdd_web.lifecycle import Phase
    board.header.phase, board.header.workers_wanted, board.header.workers_full = Phase.SERVING, 1, 2
    def serve(age):
        slot = board.claim(age)
        slot.heartbeat, slot.beat_at = Heartbeat.BETWEEN_REQUESTS, clock.now_ns() + 3600 * 10**9
        slot.order.pid, slot.order.start, slot.state = 4710 + age, 1, WorkerState.SERVING
    serve(1)
    {board}
    channel.send("hello", fd=board.fd, pid=os.getpid(), pid_file="", canary={canary})
    channel.send("ready", workers=1)
    while True:
        said = hear()
        say(said)
        board.header.tick_at = clock.now_ns() + 3600 * 10**9
        channel.send("garbage to wake the test")
        if said == "grow":
            hear()
            serve(2)
            channel.send("garbage to wake the test")
"""


def watched(bench: Bench, **fields: object) -> Upgrade:
    upgrade = bench.begin(CANARY.format(**{"board": "pass", "canary": 1, **fields}))
    assert verdict(upgrade).ready
    upgrade.go()
    await_news(upgrade)
    assert upgrade.poll() is None
    assert upgrade.committed
    return upgrade


def test_canary_that_has_passed_its_watch_is_committed_when_all_of_its_workers_serve(bench: Bench) -> None:
    upgrade = watched(bench)
    assert upgrade.grow(0.0)
    assert upgrade.state is Successor.GROWING
    await_news(upgrade)
    assert upgrade.poll() is None
    assert not upgrade.committed
    # It starts the second one when the test lets it.
    upgrade._channel.send("go on")
    await_news(upgrade)
    assert upgrade.poll() is None
    assert upgrade.committed
    assert not upgrade.grow(0.0)


def test_successor_that_knows_no_canary_does_not_grow(bench: Bench) -> None:
    upgrade = watched(bench, canary=0)
    assert not upgrade.grow(0.0)
    assert upgrade.state is Successor.COMMITTING


def test_canary_of_another_layout_is_committed_as_it_is_and_grows_then(bench: Bench) -> None:
    upgrade = watched(bench, board=f"board.header.layout = {LAYOUT + 1}")
    assert not upgrade.grow(0.0)


def test_canary_that_does_not_grow_in_time_has_failed(bench: Bench) -> None:
    upgrade = watched(bench)
    upgrade.timeout = 0.0
    assert upgrade.grow(0.0)
    found = verdict(upgrade)
    assert not found.ready
    assert found.reason.endswith("it waits for 2 workers to serve, of which 1 do")
