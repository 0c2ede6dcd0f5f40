"""What goes wrong in an upgrade, and what it must not cost: nothing.

Every test injects one fault into a real gunicorn under load, and then holds the service to the same promises
(trial.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.harness import (
    CONF,
    Service,
    answered_from,
    descriptors,
    serving_workers,
    settled,
    until,
)
from tests.processes.trial import (
    HANG_SECOND,
    WIDE_COMMIT_WINDOW,
    HeldBy,
    at_gate,
    configure,
    on_trial,
    takes_over,
)
from zdd_web.board import WorkerState
from zdd_web.lifecycle import Phase

SHORT_PATIENCE = (
    "import zdd_web.gunicorn.upgrade.successor_process as limits\n"
    "assert limits.STALE_AFTER and limits.STALE_AFTER_HANDOVER\n"
    "limits.STALE_AFTER, limits.STALE_AFTER_HANDOVER = 3.0, 4.0\n"
)


# -- A. the new generation fails before it is ready

AT_IMPORT = {
    "SyntaxError": ("def broken(:", ["SyntaxError"], []),
    "ImportError": ("import no_such_module_here", ["no_such_module_here"], ["Traceback"]),
    "sys.exit(0)": ("sys.exit(0)", ["SystemExit: 0"], []),
    "sys.exit(1)": ("sys.exit(1)", ["SystemExit: 1"], []),
    "os._exit(0)": ("os._exit(0)", ["ended before it served", "status 0"], []),
    "os._exit(1)": ("os._exit(1)", ["ended before it served", "status 1"], []),
    "os._exit(3)": ("os._exit(3)", ["status 3"], []),
    "segfault": ("os.kill(os.getpid(), signal.SIGSEGV)", ["SIGSEGV"], []),
    "killed like by the OOM killer": ("os.kill(os.getpid(), signal.SIGKILL)", ["SIGKILL"], []),
}


@pytest.mark.parametrize("faults", [list(AT_IMPORT)[:4], list(AT_IMPORT)[4:]], ids=["exceptions", "ends"])
@pytest.mark.begins_first
def test_an_app_that_ends_at_import_costs_nothing(service: Service, faults: list[str]):
    configure(service).start()
    with on_trial(service) as trial:
        for fault in faults:
            statement, reasons, shows = AT_IMPORT[fault]
            service.deploy("2", at_import=statement)
            trial.fails(*reasons, shows=tuple(shows))
            trial.cost_nothing()
        trial.recovers()


def test_an_app_that_ends_at_import_in_a_preloading_master_costs_nothing(make_service):
    service = make_service("gthread")
    service.arguments = ["--preload"]
    configure(service).start()
    with on_trial(service) as trial:
        for fault in ("ImportError", "sys.exit(0)", "os._exit(0)", "segfault"):
            statement, reasons, _ = AT_IMPORT[fault]
            service.deploy("2", at_import=statement)
            trial.fails({"sys.exit(0)": "exit status 0", "os._exit(0)": "exit status 0"}.get(fault, reasons[0]))
            trial.cost_nothing()
        trial.recovers()


BOOM = "def {}:\n    raise RuntimeError('boom in a hook')\n"

IN_CONFIGURATION = {
    "SyntaxError": ("workers = (\n", "SyntaxError|was never closed"),
    "exception": ("1 / 0\n", "ZeroDivisionError"),
    "SystemExit": ("raise SystemExit('not today')\n", "not today"),
    "os._exit(0)": ("import os; os._exit(0)\n", "exit status 0"),
    "unknown setting": ("import zdd_web.gunicorn as z; z.install(globals(), grace=1)\n", "no such setting"),
    "on_starting raises": (BOOM.format("on_starting(server)"), "boom in a hook"),
    "when_ready raises": (BOOM.format("when_ready(server)"), "boom in a hook"),
    "pre_fork raises": (BOOM.format("pre_fork(server, worker)"), "boom in a hook"),
    "post_fork raises": (BOOM.format("post_fork(server, worker)"), "boom in a hook"),
    "post_worker_init raises": (BOOM.format("post_worker_init(worker)"), "boom in a hook"),
}  # fmt: skip


@pytest.mark.parametrize("faults", [list(IN_CONFIGURATION)[:5], list(IN_CONFIGURATION)[5:]], ids=["file", "hooks"])
@pytest.mark.begins_first
def test_a_configuration_that_fails_costs_nothing(make_service, faults: list[str]):
    service = configure(make_service("sync")).start()
    with on_trial(service) as trial:
        for fault in faults:
            text, reason = IN_CONFIGURATION[fault]
            service.write_conf(text + CONF)
            trial.fails(reason)
            trial.cost_nothing()
        configure(service)
        trial.recovers()


def test_a_configuration_without_install_costs_nothing(make_service):
    service = configure(make_service("sync")).start()
    service.write_conf("workers = 2\n")
    with on_trial(service) as trial:
        trial.fails("before it was ready")
        trial.cost_nothing()
        configure(service)
        trial.recovers()


HANGS = {
    "at import": ("time.sleep(600)", "", {}, "2 booting"),
    "at import, deaf to SIGTERM": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", "", {}, "2 booting",
    ),
    "at import of one worker of two": (HANG_SECOND, "", {}, "1 booting, 1 ready"),
    "in post_worker_init": ("", "def post_worker_init(worker):\n    __import__('time').sleep(600)\n", {}, "2 booting"),
    "in a warm-up request": ("HANG = 600", "", {"warmup": ["/warm"]}, "2 booting"),
    "in the configuration": ("", "__import__('time').sleep(600)\n", {}, "configuration file that hangs"),
}  # fmt: skip

WARM = """
_app = app
def app(environ, start_response):
    if environ["PATH_INFO"] == "/warm":
        {statement}
    return _app(environ, start_response)
"""


def warm(service: Service, statement: str) -> None:
    """Have the code on disk execute a statement when "/warm" is requested."""
    with (service.directory / "app.py").open("a") as file:
        file.write(WARM.replace("{statement}", statement))


@pytest.mark.parametrize("where", HANGS)
def test_a_generation_that_hangs_is_given_up_and_leaves_nobody(service: Service, where: str):
    at_import, before, settings, reason = HANGS[where]
    configure(service, upgrade_timeout=12).start()
    service.deploy("2", at_import=at_import)
    if "warmup" in settings:
        warm(service, "time.sleep(600)")
    configure(service, before, **settings)
    with on_trial(service) as trial:
        trial.fails("UPGRADE_TIMEOUT = 12 s", reason)
        trial.cost_nothing()
        configure(service, warmup=[])
        trial.recovers()


WARM_UPS = {
    "answers 500": ("start_response('500 Oh', []); return [b'']", "WARMUP path '/warm' answered '500 Oh'"),
    "raises": ("raise RuntimeError('boom in warm-up')", "boom in warm-up"),
    "ends the process": ("os._exit(0)", "ended before it served"),
}


def test_a_warm_up_that_fails_costs_nothing(service: Service):
    configure(service).start()
    configure(service, warmup=["/warm"])
    with on_trial(service) as trial:
        for statement, reason in WARM_UPS.values():
            service.deploy("2")
            warm(service, statement)
            trial.fails(reason)
            trial.cost_nothing()
        trial.recovers()


def test_a_successor_that_is_left_alone_with_code_that_hangs_serves_when_the_code_is_mended(service: Service):
    # Found by the random walk, seed 20261122, sequence 66.
    configure(service, upgrade_timeout=5).start()
    service.deploy("2", at_import="open(f'importing-{os.getpid()}', 'w').close(); time.sleep(3600)")
    service.signal(signal.SIGUSR2)
    until("two imports", lambda: len(list(service.directory.glob("importing-*"))) == 2, service)
    service.signal(signal.SIGKILL)
    service.wait_for("event=predecessor.lost")
    service.deploy("3")
    service.wait_for("event=worker.boot_failed .*not ready within UPGRADE_TIMEOUT")
    service.wait_for("generation=2 event=phase.serving")
    assert service.get().version == "3"
    service.stop(status=None)


@pytest.mark.parametrize(
    ("fault", "step", "where"),
    [
        ({"at_import": "time.sleep(3600)"}, "importing the app", "app.py"),
        ({"at_import": "zdd_web.check('database', timeout=60)(lambda: time.sleep(3600))"},
         "waiting for its checks (database)", "in <lambda>"),
    ],
)  # fmt: skip
def test_a_boot_that_hangs_is_named_with_its_step_and_its_stack(service: Service, fault, step: str, where: str):
    conf = "from zdd_web.gunicorn.workers import boot_watch\nboot_watch.SLOW_AFTER = 0.5\n"
    service.configure(conf, upgrade_timeout=4).start()
    service.deploy("2", **fault)
    line = service.upgrade(expect="upgrade.failed")
    assert f"not ready within UPGRADE_TIMEOUT = 4 s: workers: 2 booting; {step}; generation 1 first booted in " in line
    assert "raise UPGRADE_TIMEOUT if more is needed" in line
    assert len(service.matches(rf'WARNING.* generation=2 event=boot.slow pid=\d+ step="{re.escape(step)}"')) == 2
    assert where in service.log().partition("event=boot.slow")[2]
    assert service.get().version == "1"
    service.stop()


CHECKS = {
    "raises": ("raise ConnectionRefusedError('no database')", "check 'database' failed: ConnectionRefusedError"),
    "hangs": ("time.sleep(3600)", "check 'database' failed: no answer within 0.5 s"),
    "is false": ("return False", "check 'database' failed: it returned False"),
}


@pytest.mark.parametrize("fault", CHECKS)
def test_a_readiness_check_that_never_passes_costs_nothing(service: Service, fault: str):
    statement, reason = CHECKS[fault]
    configure(service, upgrade_timeout=12).start()
    body = f"@zdd_web.check('database', timeout=0.5)\ndef database():\n    {statement}\n"
    service.deploy("2", at_import=body)
    with on_trial(service) as trial:
        trial.fails(reason, "not ready within UPGRADE_TIMEOUT")
        assert service.matches("generation=2 event=check.failed check=database")
        trial.cost_nothing()
        trial.recovers()


def test_a_replacement_whose_check_never_passes_is_given_up_and_the_check_named(service: Service):
    configure(service, upgrade_timeout=2).start()
    before = settled(service, 2)
    with on_trial(service) as trial:
        service.deploy("2", at_import="zdd_web.check('database')(lambda: False)")
        service.signal(signal.SIGTTIN)
        line = service.wait_for("event=worker.boot_failed")
        assert "not ready within UPGRADE_TIMEOUT = 2 s; check 'database' failed: it returned False" in line
        trial.answers()
        assert set(before) <= set(serving_workers(service))


def test_a_check_that_passes_late_only_delays_the_upgrade(service: Service):
    configure(service).start()
    service.deploy("2", at_import="zdd_web.check('file')(lambda: os.path.exists('there'))")
    with on_trial(service) as trial:
        trial.begin()
        service.wait_for("event=check.failed check=file")
        (service.directory / "there").touch()
        service.wait_for("event=upgrade.committed")
        trial.answers()


def test_new_workers_that_are_killed_at_the_gate_cost_nothing(service: Service):
    configure(service).start()
    service.deploy("2", at_import=HANG_SECOND)
    with on_trial(service) as trial:
        successor = trial.begin()
        ready = until("a worker at the gate", lambda: at_gate(service, successor), service)
        os.kill(ready, signal.SIGKILL)
        trial.fails("ended before it served", "SIGKILL")
        trial.cost_nothing()
        trial.recovers()


BEFORE_READY = {
    "SIGKILL": (signal.SIGKILL, 60, r"before it was ready: killed by SIGKILL"),
    "SIGSTOP": (signal.SIGSTOP, 10, r"UPGRADE_TIMEOUT = 10 s"),
    # gunicorn's own documentation has operators abandon an upgrade with these, sent to the new master.
    "SIGTERM": (signal.SIGTERM, 30, r"before it was ready"),
    "SIGQUIT": (signal.SIGQUIT, 30, r"before it was ready"),
}


@pytest.mark.parametrize("fault", BEFORE_READY)
def test_a_new_master_that_is_signalled_before_it_is_ready_costs_nothing(service: Service, fault: str):
    sig, timeout, reason = BEFORE_READY[fault]
    configure(service, upgrade_timeout=timeout).start()
    service.deploy("2", at_import=HANG_SECOND)
    with on_trial(service) as trial:
        successor = trial.begin()
        service.wait_for(r"generation=2 event=boot\.started")
        os.kill(successor, sig)
        # An upgrade that never ends would keep the command for two minutes.
        service.wait_for(r"event=upgrade\.failed", patience=25)
        trial.fails(reason)
        trial.cost_nothing()
        trial.recovers()


# -- A. the new generation fails when it already answers: its answers are good, and nobody loses one


IN_COMMIT_WINDOW = {
    "SIGKILL": (signal.SIGKILL, r"in the commit window: killed by SIGKILL"),
    "SIGSTOP": (signal.SIGSTOP, r"stood still for 3 s in the commit window"),
    "SIGTERM": (signal.SIGTERM, r"in the commit window"),
}


@pytest.mark.parametrize("fault", IN_COMMIT_WINDOW)
def test_a_new_master_that_is_signalled_in_the_commit_window_loses_nothing(service: Service, fault: str):
    sig, reason = IN_COMMIT_WINDOW[fault]
    configure(service, WIDE_COMMIT_WINDOW + SHORT_PATIENCE).start()
    service.deploy("2")
    with on_trial(service) as trial:
        successor = trial.begin()
        service.wait_for(r"generation=2 event=phase\.serving")
        held = HeldBy(service, generation=2)
        os.kill(successor, sig)
        service.wait_for(r"event=upgrade\.(failed|committed)", patience=15)
        # Its own workers had it in hand, and finish it.
        assert held.release() == 2
        trial.fails(reason)
        assert not service.matches(r"event=upgrade\.committed")
        trial.is_unharmed()
        trial.recovers()


WHILE_RETIRING = {
    "SIGKILL": (signal.SIGKILL, r"after the handover: killed by SIGKILL"),
    "SIGSTOP": (signal.SIGSTOP, r"stood still for 4 s after the handover"),
}


@pytest.mark.parametrize("fault", WHILE_RETIRING)
def test_the_old_generation_returns_when_the_new_master_fails_while_it_retires(service: Service, fault: str):
    sig, reason = WHILE_RETIRING[fault]
    configure(service, SHORT_PATIENCE).start()
    with on_trial(service) as trial:
        held = HeldBy(service, generation=1)
        service.deploy("2")
        assert service.run("upgrade", "--name", service.name).returncode == 0
        successor = service.pid
        assert successor != trial.master
        assert service.pid_file.read_text() == f"{successor}\n"
        accepted = HeldBy(service, generation=2)
        os.kill(successor, sig)
        assert re.search(reason, service.wait_for(r"event=successor\.lost", patience=15))
        until("the office", lambda: service.pid_file.read_text() == f"{trial.master}\n", service)
        # Its own workers had it in hand, and finish it.
        assert accepted.release() == 2
        assert held.release() == 1
        trial.is_back()
        trial.answers()
        trial.recovers()


WHEN_THE_OLD_ONE_IS_KILLED = {
    "while the new one boots": r"generation=2 event=boot\.started",
    "in the commit window": r"generation=2 event=phase\.serving",
}


@pytest.mark.parametrize("when", WHEN_THE_OLD_ONE_IS_KILLED)
def test_the_new_generation_takes_office_when_the_old_master_is_killed(service: Service, when: str):
    configure(service, WIDE_COMMIT_WINDOW).start()
    service.deploy("2")
    with on_trial(service, status=None) as trial:
        service.signal(signal.SIGUSR2)
        service.wait_for(WHEN_THE_OLD_ONE_IS_KILLED[when])
        service.signal(signal.SIGKILL, trial.master)
        service.process.wait()
        service.wait_for(r"generation=2 event=predecessor\.lost")
        service.wait_for(r"generation=2 event=phase\.serving")
        until("the office", lambda: service.pid_file.read_text() == f"{service.pid}\n", service)
        service.until_alone()
        assert service.pid != trial.master
        assert service.get().version == "2"
        trial.answers()
        service.deploy("good")
        takes_over(service, 3)


def test_requests_of_the_old_generation_are_finished_when_its_master_is_killed_while_it_retires(service: Service):
    configure(service).start()
    with on_trial(service, status=None) as trial:
        held = HeldBy(service, generation=1)
        service.upgrade()
        os.kill(trial.master, signal.SIGKILL)
        service.process.wait()
        assert held.release() == 1
        service.until_alone()
        trial.answers()
        takes_over(service, 3, version="1")


def test_an_office_that_cannot_write_its_pid_file_still_works(make_service, small_disk: Path):
    # The old master is killed and the disk is full: two things at once, as it happens with a full disk.
    service = make_service("gthread")
    service.pid_file = small_disk / "service.pid"
    configure(service).start()
    service.deploy("2", at_import="time.sleep(1)")
    with on_trial(service, status=None, may_lose=True) as trial:
        service.signal(signal.SIGUSR2)
        service.wait_for(r"generation=2 event=boot\.started")
        fill(small_disk)
        service.signal(signal.SIGKILL, service.pid)
        service.process.wait()
        service.wait_for(r"generation=2 event=phase\.serving")
        service.until_alone()
        trial.answers()
        # A worker that comes and goes must find its descriptors its own.
        os.kill(service.get().pid, signal.SIGKILL)
        until("a replacement", lambda: [w.state for w in service.snapshot().workers] == [WorkerState.SERVING] * 2,
              service)  # fmt: skip
        (small_disk / "filler").unlink()
        service.deploy("good")
        done = service.run("upgrade", "--name", service.name)
        assert done.returncode == 0, (done.stderr, service.log())
        # A step that is tried again must not close what has got the descriptor's number since.
        assert not service.matches("Bad file descriptor")
        until("the pid file", lambda: service.pid_file.read_text() == f"{service.pid}\n", service)
        assert service.get().version == "good"


# -- B. between fork and exec


def test_a_deleted_start_directory_is_refused_with_the_reason(service: Service):
    elsewhere = service.directory.parent / "elsewhere"
    elsewhere.mkdir()
    service.pid_file, service.log_file = elsewhere / "service.pid", elsewhere / "log"
    configure(service).start()
    with on_trial(service) as trial:
        saved = service.directory.rename(elsewhere / "saved")
        trial.fails("directory", "gone", event="event=refused")
        trial.answers()
        saved.rename(service.directory)
        trial.cost_nothing()
        trial.recovers()


def private_venv(directory: Path) -> Path:
    """Make a virtualenv of its own that shares everything with this one, and return its console script."""
    venv = directory / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    (venv / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    script = venv / "bin" / "serve"
    script.write_text(f"#!{venv}/bin/python\nimport sys\nfrom gunicorn.app.wsgiapp import run\nsys.exit(run())\n")
    script.chmod(0o755)
    return script


LAUNCHERS = {
    "console script": ("serve", "event=refused", "the program is gone"),
    "interpreter of the console script": ("python", r"event=upgrade\.failed", "not be started: FileNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("gone", LAUNCHERS)
def test_a_deleted_launcher_costs_nothing(service: Service, gone: str):
    name, event, reason = LAUNCHERS[gone]
    script = private_venv(service.directory)
    service.launcher = [str(script)]
    service.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    configure(service).start()
    with on_trial(service) as trial:
        victim = script.parent / name
        saved = victim.rename(service.directory / "saved")
        trial.fails(reason, event=event)
        trial.cost_nothing()
        saved.rename(victim)
        trial.recovers()


@contextlib.contextmanager
def descriptor_limit(pid: int, spare: int) -> Iterator[None]:
    """Let a process open only so many more descriptors."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(entry) for entry in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1 << 16) if number not in used)
    limit = [next(free) for _ in range(spare + 1)][-1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_a_descriptor_limit_costs_nothing(make_service):
    service = configure(make_service("sync"), upgrade_timeout=10).start()
    with on_trial(service) as trial:
        for spare in range(4):
            with descriptor_limit(trial.master, spare):
                trial.fails("Too many open files|EMFILE|Errno 24", event=r"event=(?:upgrade\.failed|refused)")
                trial.answers()
                assert len(service.matches("event=internal.error")) == 0, service.log()
            trial.cost_nothing()
        trial.recovers()


def test_a_descriptor_limit_after_a_failed_upgrade_does_not_forbid_upgrades_for_ever(make_service):
    service = configure(make_service("sync")).start()
    service.deploy("2", at_import="raise RuntimeError('boom')")
    with on_trial(service) as trial:
        trial.fails("boom")
        before = resource.prlimit(trial.master, resource.RLIMIT_NOFILE)
        resource.prlimit(trial.master, resource.RLIMIT_NOFILE, (3, before[1]))
        trial.fails("Errno 24|Too many open files", event="event=refused")
        resource.prlimit(trial.master, resource.RLIMIT_NOFILE, before)
        trial.cost_nothing()
        trial.recovers()


def test_a_generation_is_given_up_for_good_at_the_descriptor_limit(make_service):
    # Whoever cannot open /proc must not believe that the process it wants to kill is gone.
    service = configure(make_service("sync"), upgrade_timeout=12).start()
    service.deploy("2", at_import="while not os.path.exists('go'): time.sleep(0.05)")
    with on_trial(service) as trial:
        trial.begin()
        service.wait_for(r"generation=2 event=boot\.started")
        with descriptor_limit(trial.master, 0):
            trial.fails("UPGRADE_TIMEOUT = 12 s")
            (service.directory / "go").touch()
            trial.cost_nothing()
        trial.recovers()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(directory)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for _ in range(1 << 10):
            file.write(b"x" * 512)


def test_a_full_disk_for_the_pid_file_costs_nothing(service: Service, small_disk: Path):
    service.pid_file = small_disk / "service.pid"
    configure(service).start()
    fill(small_disk)
    service.deploy("2")
    with on_trial(service) as trial:
        trial.fails("pid file .* cannot be replaced: No space left on device")
        trial.cost_nothing()
        (small_disk / "filler").unlink()
        trial.recovers()


def test_a_pid_file_that_vanishes_in_the_commit_window_does_not_hold_the_upgrade_for_ever(make_service):
    service = make_service("sync")
    run = service.directory / "run"
    run.mkdir()
    service.pid_file = run / "service.pid"
    configure(service, WIDE_COMMIT_WINDOW).start()
    service.deploy("2")
    with service.under_load(clients=6):
        service.signal(signal.SIGUSR2)
        service.wait_for(r"generation=1 event=upgrade\.ready")
        shutil.rmtree(run)
        service.wait_for(r"event=upgrade\.(failed|committed)", patience=10)
        run.mkdir()
        service.until_alone()
        service.deploy("good")
        service.upgrade()
        until("the good code", lambda: service.get().version == "good", service)
    service.stop()


def test_failed_upgrades_leak_no_descriptor(make_service):
    service = configure(make_service("sync", workers=1)).start()
    service.deploy("2", at_import="raise RuntimeError('boom')")
    seen = []
    for _ in range(3):
        service.upgrade(expect="upgrade.failed")
        service.until_alone()
        seen.append(sorted(descriptors(service.pid).values()))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]
    service.stop()


# -- C. the old generation meets new code

MEETS = {
    "SyntaxError": "def broken(:",
    "RuntimeError": "raise RuntimeError('boom at import')",
    "sys.exit(0)": "sys.exit(0)",
    "os._exit(3)": "os._exit(3)",
    "os._exit(4)": "os._exit(4)",
    "segfault": "os.kill(os.getpid(), signal.SIGSEGV)",
}


def retries(service: Service, before: int = 0) -> list[float]:
    """Return how long it waited after each failed boot but the first ones."""
    lines = service.matches(r"event=worker\.boot_failed")[before:]
    return [float(match[1]) for line in lines if (match := re.search(r"retry_in=([\d.]+)", line))]


@pytest.mark.parametrize("faults", [list(MEETS)[:3], list(MEETS)[3:]], ids=["exceptions", "ends"])
def test_a_generation_that_has_served_survives_broken_code_on_disk(service: Service, faults: list[str]):
    configure(service).start()
    with on_trial(service) as trial:
        for fault in faults:
            before = settled(service, service.workers)
            failed = len(service.matches(r"event=worker\.boot_failed"))
            service.deploy("2", at_import=MEETS[fault])
            service.signal(signal.SIGTTIN)
            service.wait_for(r"event=worker\.boot_failed", times=failed + 3)
            trial.answers()
            assert serving_workers(service) == before
            # What it waits grows, or it would burn the CPU that the others need.
            waits = retries(service, failed)
            assert waits == sorted(set(waits)), waits
            service.deploy("good")
            service.workers += 1
            until("one more worker", lambda: len(serving_workers(service)) == service.workers, service)
            assert service.pid == trial.master
            assert len(service.processes()) == 1 + service.workers


@pytest.mark.parametrize("fault", ["SyntaxError", "os._exit(3)"])
def test_capacity_holds_while_workers_recycle_over_broken_code(service: Service, fault: str):
    service.arguments = ["--max-requests", "30"]
    configure(service).start()
    before = settled(service, 2)
    with on_trial(service) as trial:
        service.deploy("2", at_import=MEETS[fault])
        service.wait_for(r"event=worker\.recycled")
        service.wait_for(r"event=worker\.boot_failed", times=4)
        trial.answers(100)
        # Those that have answered max_requests go on until somebody can take their place.
        assert serving_workers(service) == before or len(serving_workers(service)) == 2
        waits = retries(service)
        assert waits == sorted(set(waits)), waits
        service.deploy("good")
        until("new workers", lambda: len(now := serving_workers(service)) == 2 and not set(before) & set(now), service)
        until("the good code", lambda: service.get().version == "good", service)


@pytest.mark.parametrize("fault", ["RuntimeError", "os._exit(4)"])
def test_a_crash_over_broken_code_leaves_the_others_serving(service: Service, fault: str):
    configure(service).start()
    before = settled(service, 2)
    service.deploy("2", at_import=MEETS[fault])
    os.kill(before[0], signal.SIGKILL)
    service.wait_for(r"event=worker\.boot_failed")
    with on_trial(service) as trial:
        service.wait_for(r"event=worker\.boot_failed", times=3)
        assert serving_workers(service) == [before[1]]
        service.deploy("good")
        until("two workers", lambda: len(serving_workers(service)) == 2, service)
        trial.answers()


def test_a_worker_that_was_not_waited_for_may_fail_after_the_gate_opened(make_service):
    # TTOU while one of two hangs at boot: the gate opens for the other; the straggler's failure is nobody's end.
    service = make_service("sync")
    text = "try:\n    os.mkdir('first')\nexcept FileExistsError:\n"
    text += "    while not os.path.exists('go'): time.sleep(0.05)\n    raise RuntimeError('boom')"
    service.deploy("1", at_import=text)
    configure(service)
    process = service.spawn()
    until("one at the gate", lambda: [w for w in boards(service) if w.state is WorkerState.READY], service)
    os.kill(process.pid, signal.SIGTTOU)
    service.wait_for(r"event=phase\.serving")
    (service.directory / "go").touch()
    until("the straggler's end", lambda: len(boards(service)) == 1, service)
    until("one worker", lambda: len(service.processes()) == 2, service)
    assert process.poll() is None, service.log()
    assert service.snapshot().phase is Phase.SERVING
    service.stop()


def boards(service: Service):
    return [worker for each in service.generations() for worker in each.snapshot().workers]


# -- E. the boundary

INJECT = """
import os

def when_ready(server):
    from zdd_web.gunicorn import hooks

    def raise_in(owner, name):
        original, left = getattr(owner, name), iter(range({times}))

        def raising(*arguments, **fields):
            if os.path.exists("raise_now") and next(left, None) is not None:
                raise RuntimeError("injected into " + name)
            return original(*arguments, **fields)

        setattr(owner, name, raising)

    master = hooks.state.master
    if hooks.state.inherited is None:
        raise_in({owner}, {name!r})

"""


def injected(service: Service, owner: str, name: str, times: int = 3) -> Path:
    """Start a service whose first generation raises in a function, so many times, while the returned file exists."""
    text = INJECT.replace("{owner}", owner).replace("{name!r}", repr(name)).replace("{times}", str(times))
    configure(service, text).start()
    return service.directory / "raise_now"


INSIDE = {
    "tick": ("master.coordinator", "follow", signal.SIGWINCH),
    "manage_workers": ("master.roster", "repeat", signal.SIGWINCH),
    "reap_workers": ("master", "_gunicorn_reap", signal.SIGCHLD),
    "handle_term": ("master.stop", "_begin", signal.SIGTERM),
    "handle_usr2": ("master.coordinator", "_refuse_another", signal.SIGUSR2),
    "handle_hup": ("master.reload", "_obstacle", signal.SIGHUP),
}


@pytest.mark.parametrize("where", INSIDE)
def test_an_error_of_ours_is_logged_and_the_service_goes_on(service: Service, where: str):
    owner, name, sig = INSIDE[where]
    raise_now = injected(service, owner, name)
    with on_trial(service) as trial:
        raise_now.touch()
        service.signal(sig)
        line = service.wait_for(rf"event=internal\.error.*where={where}\b")
        assert "generation=1" in line
        assert service.matches(f"injected into {name}")
        trial.answers()
        trial.is_back()
        raise_now.unlink()
        trial.recovers()


AFTER_THE_LOSS = {
    "the pid file": ("server.pidfile", "create"),
    "the control socket": (
        "__import__('sys').modules['zdd_web.gunicorn.adapter.control_socket']",
        "resume",
    ),
    "systemd": ("master.notifier", "take_back"),
}


@pytest.mark.parametrize("what", AFTER_THE_LOSS)
def test_the_old_generation_returns_even_if_something_in_its_return_raises(make_service, what: str):
    owner, name = AFTER_THE_LOSS[what]
    service = make_service("gthread")
    raise_now = injected(service, owner, name)
    first = service.pid
    with service.under_load(clients=6) as load:
        held = HeldBy(service, generation=1)
        service.upgrade()
        raise_now.touch()
        os.kill(service.pid, signal.SIGKILL)
        service.wait_for(r"event=successor\.lost")
        assert held.release() == 1
        service.until_alone()
        assert service.pid == first
        assert service.snapshot().phase is Phase.SERVING
        answered_from(load, 50)
    service.stop(status=None)


def test_an_error_in_the_commit_does_not_hold_the_upgrade_for_ever(make_service):
    service = make_service("gthread")
    raise_now = injected(service, "master.notifier", "hand_over", times=10**6)
    raise_now.touch()
    with service.under_load(clients=6) as load:
        service.signal(signal.SIGUSR2)
        service.wait_for(r"event=upgrade\.(failed|committed)", patience=10)
        raise_now.unlink()
        service.until_alone()
        answered_from(load, 50)
    service.stop(status=None)
