"""The history of a service: what is noted, by whom it is kept, and how it goes from generation to generation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.processes.harness import PATIENCE, Held, Service, until
from tests.processes.test_interrupts import Command
from zdd_web import history


def entries(service: Service) -> list[dict[str, Any]]:
    """Return what `zdd-web history --json` shows."""
    done = service.run("history", "--json", "--name", service.name)
    assert done.returncode == 0, done.stderr + service.log()
    found = json.loads(done.stdout)
    assert found["format"] == 1
    return found["entries"]


def kinds(service: Service) -> list[tuple[str, str, int]]:
    return [(each["kind"], each["outcome"], each["generation"]) for each in entries(service)]


def noted(service: Service, *expected: tuple[str, str, int]) -> None:
    """Wait until the history is this, which a master notes in its loop."""
    until(f"the history {expected}", lambda: kinds(service) == list(expected), service)


def test_starts_deploys_and_reloads_are_noted_with_outcome_and_reason(make_service):
    service = make_service(release="1.0", upgrade_timeout=20).start()
    noted(service, ("start", "done", 1))
    service.configure(release="2.0")
    service.deploy("2", at_import="raise RuntimeError('boom')")
    service.upgrade(expect="upgrade.failed")
    service.signal(signal.SIGHUP)
    service.wait_for("event=refused signal=HUP")
    service.deploy("2")
    service.signal(signal.SIGHUP)
    service.wait_for(r"event=reload\.done")
    # What is called so now is what the reload has brought.
    assert service.snapshot().release == "2.0"
    service.upgrade()
    service.upgrade()
    noted(
        service, ("start", "done", 1), ("deploy", "failed", 2), ("reload", "failed", 1), ("reload", "done", 1),
        ("deploy", "done", 2), ("deploy", "done", 3),
    )  # fmt: skip
    found = entries(service)
    assert "RuntimeError: boom" in found[1]["reason"]
    assert "RuntimeError: boom" in found[2]["reason"]
    assert [each["release"] for each in found] == ["1.0", "2.0", "1.0", "2.0", "2.0", "2.0"]
    assert all(each["directory"] == str(service.directory.resolve()) for each in found)
    assert all(0 < each["seconds"] < 60 for each in found)
    assert "release=2.0" in service.matches(r"event=upgrade\.committed")[-1]


def test_upgrade_that_is_cancelled_is_noted_and_so_is_a_watch(make_service):
    service = make_service(upgrade_timeout=60).start()
    service.deploy("2", at_import="while not os.path.exists('go'): time.sleep(0.02)")
    service.signal(signal.SIGUSR2)
    service.wait_for(r"event=upgrade\.started")
    assert service.run("cancel", "--name", service.name).returncode == 0
    noted(service, ("start", "done", 1), ("deploy", "cancelled", 2))
    assert "cancelled by process" in entries(service)[-1]["reason"]
    (service.directory / "go").touch()
    watch = Command(service, "upgrade", "--watch", "600")
    watch.says("both generations serve while it is watched")
    watch.interrupt()
    assert "in the commit window" in watch.ends(1)
    noted(service, ("start", "done", 1), ("deploy", "cancelled", 2), ("deploy", "cancelled", 2))
    # Nothing of the watch is left: the next upgrade is a plain one.
    service.upgrade()
    assert kinds(service)[-1] == ("deploy", "done", 2)


def test_release_that_is_found_is_the_directory_and_the_commit(make_service):
    service = make_service()
    (service.directory / ".git").mkdir()
    (service.directory / ".git" / "HEAD").write_text("3f2a1b9c4d5e6f708192a3b4c5d6e7f801234567\n")
    service.configure(details="always").start()
    expected = f"{service.directory.resolve()}@3f2a1b9c4d5e"
    assert service.snapshot().release == expected
    assert f"[+]release {expected}" in service.get("/readyz?verbose").body
    assert f"{service.directory.name}@3f2a1b9" in service.run("status", "--name", service.name).stdout
    noted(service, ("start", "done", 1))
    assert entries(service)[0]["commit"] == "3f2a1b9c4d5e6f708192a3b4c5d6e7f801234567"


def test_history_is_not_lost_with_a_master_that_is_killed_before_the_handover(make_service):
    service = make_service(commit_window=600).start()
    noted(service, ("start", "done", 1))
    old = service.pid
    service.signal(signal.SIGUSR2)
    service.wait_for(r"generation=2 event=phase\.serving")
    service.signal(signal.SIGKILL, old)
    service.wait_for(r"event=predecessor\.lost")
    until("generation 2", lambda: [each.header.generation for each in service.generations()] == [2], service)
    noted(service, ("start", "done", 1), ("deploy", "done", 2))
    service.stop(status=None)


def test_lost_successor_is_noted_by_the_one_that_serves_again(make_service):
    service = make_service().start()
    held = Held(service)
    service.upgrade()
    new = service.pid
    service.signal(signal.SIGKILL, new)
    service.wait_for(r"event=successor\.lost")
    noted(service, ("start", "done", 1), ("deploy", "done", 2), ("deploy", "lost", 2))
    assert held.is_answered()


def test_history_goes_on_beside_a_keeper(make_service):
    service = make_service(keep_pid=True).start()
    first = service.pid
    service.upgrade()
    service.wait_for(r"event=keeper\.started")
    # The pid that stays means the service.
    done = service.run("history", "--json", "--pid", str(first))
    assert done.returncode == 0, done.stderr
    assert [each["kind"] for each in json.loads(done.stdout)["entries"]] == ["start", "deploy"]
    service.stop()


def test_takeover_is_noted_and_brings_the_history_along(make_service, tmp_path):
    service = make_service(takeover=True, takeover_socket=str(tmp_path / "meet")).start()
    service.bind = f"127.0.0.1:{service.port}"
    first = service.process
    service.spawn()
    service.wait_for(r"event=upgrade\.committed")
    assert first is not None
    first.wait(timeout=PATIENCE)
    noted(service, ("start", "done", 1), ("takeover", "done", 2))


def test_nothing_is_leaked_and_nothing_is_left_open(make_service):
    service = make_service(workers=1, probe_bind="127.0.0.1:0").start()

    def memfds(pid: int) -> list[str]:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        return sorted(link.removesuffix(" (deleted)") for link in links if link.startswith("/memfd:zdd_web-"))

    for _ in range(3):
        service.upgrade()
        service.until_one_generation()
    # The inherited one is closed in the first turn after the handover. A mapping of Python's has a descriptor as well.
    expected = ["/memfd:zdd_web-cancel", *[f"/memfd:{history.MEMFD_NAME}"] * 2, "/memfd:zdd_web-request"]
    until(f"{expected}, and not {memfds(service.pid)}", lambda: memfds(service.pid) == expected, service)
    (worker,) = service.snapshot().workers
    for pid in (worker.pid, service.is_active().board.header.probe_pid):
        assert memfds(pid) == []
        # Nor what it could write to without a descriptor.
        assert "zdd_web-" not in Path(f"/proc/{pid}/maps").read_text()
