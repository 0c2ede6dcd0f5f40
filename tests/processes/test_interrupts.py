"""Ctrl-C, SIGTERM and `zdd-web cancel` at each moment of an upgrade and of a stop: what is printed is what happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.processes.harness import Held, Service, until
from zdd_web.board import UpgradeState
from zdd_web.cli.upgrade import LEFT
from zdd_web.system import proc

GO_ON = "while not os.path.exists('go'): time.sleep(0.02)"
CANCELLED_BOOTING = r"^upgrade failed: cancelled by process \d+ before it was ready$"
CANCELLED_IN_WINDOW = r"^upgrade failed: cancelled by process \d+ in the commit window$"


class Command:
    """A `zdd-web` that runs, with its output in files."""

    def __init__(self, service: Service, *arguments: str) -> None:
        self.service = service
        self.out, self.err = (service.directory / f"{arguments[0]}.{name}" for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zdd_web", *arguments, "--pid-file", str(service.pid_file)],
                stdout=out, stderr=err,
            )  # fmt: skip

    def says(self, text: str) -> None:
        until(f"{text!r} of the command", lambda: text in self.text(), self.service)

    def text(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def interrupt(self, sig: signal.Signals = signal.SIGINT) -> None:
        self.process.send_signal(sig)

    def ends(self, status: int) -> str:
        code = self.process.wait(60)
        assert code == status, self.text() + self.service.log()
        return self.text()


@pytest.fixture
def service(make_service) -> Iterator[Service]:
    service = make_service("gthread")
    yield service
    if service.processes():
        service.stop(None)


def hold_boot(service: Service) -> None:
    service.deploy("2", at_import=GO_ON)


def let_go(service: Service) -> None:
    (service.directory / "go").touch()


def until_state(service: Service, *states: UpgradeState) -> None:
    until(f"upgrade state {states}", lambda: service.generations()[0].snapshot().upgrade_state in states, service)


def serves(service: Service, generation: int) -> None:
    # Workers of a generation that was withdrawn answer what they have accepted before they read their own signal.
    service.until_one_generation()
    service.until_alone()
    assert {service.get().generation for _ in range(8)} == {generation}
    assert service.snapshot().generation == generation


# -- an upgrade


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_the_new_generation_boots_cancels_it(service: Service, sig: signal.Signals):
    service.start()
    hold_boot(service)
    command = Command(service, "upgrade")
    command.says("worker 0 of 2 is ready")
    command.interrupt(sig)
    said = command.ends(1)
    assert "cancelling: waiting for what becomes of it" in said
    assert re.search(CANCELLED_BOOTING, said.splitlines()[-1])
    assert "generation 1 serves on" in said
    service.wait_for(r"event=upgrade\.cancelled")
    serves(service, 1)
    assert service.matches(r"event=upgrade\.failed") == []
    # The next one is not concerned.
    let_go(service)
    assert service.run("upgrade", "--name", service.name).returncode == 0
    serves(service, 2)


def test_interrupt_right_after_the_request_is_cancelled_or_too_late_and_says_which(service: Service):
    service.start()
    service.deploy("2")
    command = Command(service, "upgrade")
    command.says("generation 1 (pid")
    command.interrupt()
    status = command.process.wait(60)
    said = command.text()
    if status == 0:
        assert "too late to cancel" in said
        serves(service, 2)
    elif "Aborted!" in said:
        # Before anything was asked of the service.
        assert service.snapshot().upgrade_number == 0
    else:
        assert (status, "cancelled by process" in said) == (1, True)
        serves(service, 1)


def test_interrupt_while_a_check_is_waited_for_cancels_and_the_check_was_named(service: Service):
    check = "import zdd_web\ndef slow():\n    while not os.path.exists('go'): time.sleep(0.02)\n"
    service.start()
    text = (service.directory / "app.py").read_text()
    text = text.replace('VERSION = "1"', f'VERSION = "2"\n{check}zdd_web.check("storage", timeout=50)(slow)\n')
    (service.directory / "app.py").write_text(text)
    command = Command(service, "upgrade")
    # No two letters of it can be in the service's name.
    command.says("storage")
    command.interrupt()
    assert re.search(CANCELLED_BOOTING, command.ends(1).splitlines()[-1])
    serves(service, 1)


def test_interrupt_in_the_commit_window_cancels_under_load_without_a_loss(service: Service):
    service.configure(commit_window=30).start()
    service.deploy("2")
    with service.under_load():
        command = Command(service, "upgrade")
        command.says("commit window")
        until("an answer of the new one", lambda: service.get().generation == 2, service)
        command.interrupt()
        said = command.ends(1)
    assert re.search(CANCELLED_IN_WINDOW, said.splitlines()[-1])
    serves(service, 1)


def test_interrupt_after_the_commit_is_too_late_and_says_so(service: Service):
    service.start()
    service.deploy("2")
    with Held(service) as held:
        command = Command(service, "upgrade")
        service.wait_for(r"event=upgrade\.committed")
        # Until the old one accepts nothing more; it may have ended by now.
        command.interrupt()
        said = command.ends(0)
        assert "generation 2 serves" in said.splitlines()[-1]
        assert held.is_answered()
    serves(service, 2)


def test_second_interrupt_leaves_and_the_upgrade_is_cancelled_when_the_master_runs_again(service: Service):
    service.start()
    hold_boot(service)
    command = Command(service, "upgrade")
    command.says("worker 0 of 2 is ready")
    master = service.pid
    os.kill(master, signal.SIGSTOP)
    try:
        command.interrupt()
        command.says("cancelling")
        command.interrupt()
        assert "left: the master was asked to cancel, and its answer was not waited for" in command.ends(LEFT)
    finally:
        os.kill(master, signal.SIGCONT)
    service.wait_for(r"event=upgrade\.cancelled")
    serves(service, 1)


def test_upgrade_that_gave_up_on_a_hanging_master_does_not_happen_later(service: Service):
    service.start()
    service.deploy("2")
    master = service.pid
    os.kill(master, signal.SIGSTOP)
    try:
        done = service.run("upgrade", "--name", service.name)
    finally:
        os.kill(master, signal.SIGCONT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith(f"the master {master} did not answer SIGUSR2 within 10 s: its SIGUSR2 is withdrawn"), done
    assert "serves on" not in done.stderr
    assert "was cancelled by process" in service.wait_for(r"event=refused signal=USR2")
    serves(service, 1)
    assert service.run("upgrade", "--name", service.name).returncode == 0
    serves(service, 2)


def test_nothing_is_claimed_to_serve_while_the_service_boots(service: Service):
    service.deploy("1", at_import=GO_ON)
    service.spawn()
    service.wait_for(r"event=boot\.started")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 1
    assert "serves" not in done.stdout + done.stderr.replace("only a serving one", "")
    assert "generation 1 is booting" in done.stderr
    let_go(service)
    service.wait_for(r"event=phase\.serving")


# -- cancel


def test_cancel_gives_up_an_upgrade_and_both_commands_say_so(service: Service):
    service.start()
    hold_boot(service)
    command = Command(service, "upgrade")
    command.says("worker 0 of 2 is ready")
    done = service.run("cancel", "--name", service.name)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1] == "generation 1 serves on"
    assert re.search(CANCELLED_BOOTING, command.ends(1).splitlines()[-1])
    serves(service, 1)


def test_cancel_of_nothing_is_status_1(service: Service):
    service.start()
    done = service.run("cancel", "--name", service.name)
    assert (done.returncode, "no upgrade is under way" in done.stdout) == (1, True), done
    assert service.run("upgrade", "--name", service.name).returncode == 0


def test_cancel_is_not_remembered_for_a_takeover(make_service):
    old = make_service("gthread", workers=1, takeover=True).start()
    hold_boot(old)
    command = Command(old, "upgrade")
    command.says("worker 0 of 1 is ready")
    assert old.run("cancel", "--name", old.name).returncode == 0
    command.ends(1)
    new = make_service("gthread", workers=1, takeover=True)
    new.name, new.bind = old.name, f"127.0.0.1:{old.port}"
    new.configure().start()
    old.ends(0)
    new.stop()


def test_cancel_of_a_takeover_ends_the_new_master_and_the_old_one_serves(make_service):
    old = make_service("gthread", workers=1, takeover=True).start()
    new = make_service("gthread", workers=1, takeover=True)
    new.name, new.bind = old.name, f"127.0.0.1:{old.port}"
    new.deploy("2", at_import=GO_ON)
    new.configure().spawn()
    old.wait_for(r"event=upgrade\.started")
    done = old.run("cancel", "--pid", str(old.process.pid))
    assert done.returncode == 0, done
    new.ends(None)
    assert "cancelled by process" in new.log()
    serves(old, 1)
    old.stop()


# -- a stop


def test_interrupts_of_a_drain_say_that_it_goes_on_and_leave(service: Service):
    service.configure(grace_period=60).start()
    with Held(service) as held:
        command = Command(service, "drain")
        command.says("draining: 1 request")
        command.interrupt()
        command.says("a stop cannot be cancelled: it goes on")
        assert command.process.poll() is None
        command.interrupt(signal.SIGTERM)
        assert "left: the stop goes on" in command.ends(LEFT)
        assert held.is_answered()
    service.ends(0)


def test_one_interrupt_of_a_drain_is_followed_to_the_end(service: Service):
    service.configure(grace_period=60).start()
    with Held(service) as held:
        command = Command(service, "drain")
        command.says("draining: 1 request")
        command.interrupt()
        command.says("a stop cannot be cancelled: it goes on")
        assert held.is_answered()
    assert "nothing was cut off" in command.ends(0).splitlines()[-1]
    service.ends(0)


# -- who may


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_cancel(service: Service):
    service.start()
    master = service.pid
    numbers = [entry for entry in os.listdir(f"/proc/{master}/fd") if "zdd_web-cancel" in _link(master, entry)]
    assert len(numbers) == 1
    command = ["/bin/sh", "-c", f"echo x >> /proc/{master}/fd/{numbers[0]}"]
    done = subprocess.run(command, capture_output=True, user=65534, timeout=60, check=False)
    assert b"ermission denied" in done.stderr
    # ... nor do the workers have it open.
    for worker in service.snapshot().workers:
        assert proc.alive(worker.pid, worker.start)
        assert not any("zdd_web-cancel" in _link(worker.pid, each) for each in os.listdir(f"/proc/{worker.pid}/fd"))


def _link(pid: int, number: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""
