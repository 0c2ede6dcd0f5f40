"""Commands that are killed before the master takes their request: what they asked for is done, or nothing is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.harness import Service, until
from tests.processes.releases import runs, standing
from tests.processes.test_interrupt_moments import stopped, until_pending
from tests.processes.test_rollback import deploy, order, releases
from zdd_web.deploy_request import DeployRequest

__all__ = ["releases"]


def box_of(service: Service) -> Path:
    generation = service.is_active()
    return Path(f"/proc/{generation.pid}/fd/{generation.header.request_fd}")


def text_in(box: Path) -> bytes:
    return box.read_bytes().rstrip(b"\0")


def killed_before_it_is_taken(service: Service, *words: str) -> None:
    """Run a command until its signal waits for the master, which stands still, and kill it; then the master goes on."""
    with stopped(service.pid):
        command = subprocess.Popen(
            [sys.executable, "-m", "zdd_web", *words, "--name", service.name],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until_pending(service, service.pid, signal.SIGUSR2)
        command.kill()
        command.wait()


@pytest.mark.parametrize("words", [["upgrade", "--to"], ["rollback"], ["upgrade", "--watch", "60"]])
def test_request_of_a_killed_command_is_refused_and_not_taken_for_another(releases, words):
    service, all_releases = releases
    service.start()
    deploy(service, all_releases, "r2")
    service.until_one_generation()
    all_releases.flip("r3")
    if words[-1] == "--to":
        words = [*words, str(all_releases.path("r1"))]
    killed_before_it_is_taken(service, *words)
    line = service.wait_for(r"event=refused signal=USR2")
    assert "by a command that has ended before this master took it up" in line
    assert words[0] in line
    runs(service, all_releases, "r2", 2)
    # Once: the next one counts, whichever way it is asked for.
    assert text_in(box_of(service)) == b""
    service.upgrade()
    runs(service, all_releases, "r3", 3)


def test_plain_upgrade_of_a_killed_command_is_what_its_signal_asks_for(releases):
    service, all_releases = releases
    service.start()
    all_releases.flip("r2")
    killed_before_it_is_taken(service, "upgrade")
    service.wait_for(r"event=upgrade\.committed")
    runs(service, all_releases, "r2", 2)


def test_request_whose_signal_never_came_is_forgotten_before_a_later_signal(releases):
    service, all_releases = releases
    service.start()
    generation = service.is_active()
    with standing(generation, DeployRequest(to=str(all_releases.path("r3")))):
        pass  # it has ended before it sent the signal
    box = box_of(service)
    until("an empty box", lambda: text_in(box) == b"", service)
    deploy(service, all_releases, "r2")
    runs(service, all_releases, "r2", 2)
    assert service.matches(r"event=refused") == []


def test_plain_upgrade_by_the_command_replaces_what_a_dead_one_has_left(releases):
    service, all_releases = releases
    service.start()
    generation = service.is_active()
    all_releases.flip("r2")
    with stopped(generation.pid):
        with standing(generation, DeployRequest(back=True)):
            pass
        command = subprocess.Popen([sys.executable, "-m", "zdd_web", "upgrade", "--name", service.name])
        until_pending(service, generation.pid, signal.SIGUSR2)
    assert command.wait(60) == 0
    runs(service, all_releases, "r2", 2)


def test_plain_upgrade_does_not_take_the_request_of_a_command_that_has_not_sent_its_signal(releases):
    service, all_releases = releases
    service.start()
    generation = service.is_active()
    with standing(generation, DeployRequest(to=str(all_releases.path("r3")))):
        assert "another command has" in order(service, "upgrade", status=2)
        assert service.matches(r"event=(refused|upgrade)") == []
    runs(service, all_releases, "r1", 1)


def test_plain_upgrade_beside_a_command_whose_request_was_taken_is_up_to_the_master(releases):
    service, all_releases = releases
    service.start()
    generation = service.is_active()
    # A command that stands still, such as by Ctrl-Z: it holds its lock, and nothing is asked for any more.
    with standing(generation, DeployRequest(back=True)):
        service.signal(signal.SIGUSR2)
        assert "no other release has served" in service.wait_for(r"event=refused signal=USR2")
        all_releases.flip("r2")
        order(service, "upgrade")
    runs(service, all_releases, "r2", 2)
