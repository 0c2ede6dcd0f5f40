"""`zdd-web upgrade --canary`: a few workers of the new release are watched, then the rest start."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.processes.harness import Service, answered_from, lost, skip_unless_installed, until
from tests.processes.test_interrupts import Command
from tests.processes.test_watch_deploy import really_lost, write
from zdd_web.board import Snapshot, WorkerState

#: Worker class and listener: where each worker has a queue of its own, the queues of the workers that a canary lacks
#: must not be fed yet; and where an event loop accepts.
PLAYED = [("sync", "fd"), ("gthread", "fd"), ("gthread", "reuseport"), ("asgi", "fd")]
LONG = ("--watch", "600")


@pytest.fixture(params=PLAYED, ids="-".join)
def service(make_service, request) -> Service:
    worker_class, listener = request.param
    service = make_service(skip_unless_installed(worker_class), workers=3)
    write(service, "1")
    return service.configure(generation_header="X-Zdd-Generation", upgrade_timeout=60, listener=listener)


def serving(snapshot: Snapshot) -> int:
    return sum(worker.state is WorkerState.SERVING and not worker.retiring for worker in snapshot.workers)


def watched(service: Service) -> tuple[Snapshot, Snapshot]:
    """Wait until both generations serve; return them, the old one first."""

    def both() -> tuple[Snapshot, Snapshot] | None:
        found = [each.snapshot() for each in service.generations()]
        return (found[0], found[1]) if len(found) == 2 and all(map(serving, found)) else None

    return until("two generations that serve", both, service)


def history(service: Service) -> dict:
    return json.loads(service.run("history", "--json", "--name", service.name).stdout)["entries"][-1]


def test_good_release_grows_to_its_full_size_and_loses_nothing(service):
    service.start()
    write(service, "2", at_import="while os.path.exists('held'): time.sleep(0.02)")
    with service.under_load(clients=8) as load:
        command = Command(service, "upgrade", "--watch", "3", "--canary", "1")
        old, new = watched(service)
        (service.directory / "held").touch()
        assert (new.workers_wanted, new.workers_full, len(new.workers)) == (1, 3, 1)
        assert serving(old) == 3
        # The rest boot, and are held in their import: nothing of the old one goes before they serve.
        service.wait_for(r"generation=2 event=upgrade\.grows workers=3 canary=1 reason=\"the watch is passed\"")
        command.says("it grows: 1 of 3 workers serve")
        old, new = watched(service)
        assert (serving(old), serving(new), new.workers_wanted) == (3, 1, 3)
        assert service.matches(r"event=phase\.retiring") == []
        (service.directory / "held").unlink()
        command.ends(0)
        answered_from(load, 50)
    assert service.get().version == "2"
    service.until_alone()
    assert serving(service.snapshot()) == 3
    last = history(service)
    assert (last["outcome"], last["canary"]) == ("done", "1 of 3 workers")


def test_bad_release_is_withdrawn_and_never_grows(service):
    service.configure(watch=60, canary="25%").start()
    write(service, "2", fails="yes")
    with service.under_load(clients=8, may_lose=True) as load:
        done = service.run("upgrade", "--name", service.name, "--max-errors", "1%")
        assert done.returncode == 1, done.stdout + done.stderr
        answered_from(load, 50)
    assert "it answers with more errors" in done.stderr
    assert "generation 1 serves on" in done.stderr
    service.until_alone()
    assert really_lost(load) == [], service.log()
    assert {sample.generation for sample in lost(load)} == {2}
    assert service.matches(r"event=upgrade\.grows") == []
    last = history(service)
    assert (last["outcome"], last["canary"]) == ("failed", "1 of 3 workers")
    assert serving(service.snapshot()) == 3


def test_canary_whose_predecessor_is_killed_grows(service):
    service.start()
    write(service, "2")
    with service.under_load(clients=4, may_lose=True):
        command = Command(service, "upgrade", *LONG, "--canary", "1")
        old, _ = watched(service)
        os.kill(old.master_pid, signal.SIGKILL)
        service.wait_for(r"generation=2 event=upgrade\.grows workers=3 canary=1 reason=\"no predecessor is left\"")
        until("three workers", lambda: serving(service.snapshot()) == 3, service)
    assert f"the master {old.master_pid} ended during the upgrade" in command.ends(1)
    service.until_alone()
    assert service.get().version == "2"
    service.stop(None)


def test_signals_to_a_canary_and_a_cancel(make_service):
    service = make_service("gthread", workers=2).configure().start()
    write(service, "2")
    command = Command(service, "upgrade", *LONG, "--canary", "50%")
    old, new = watched(service)
    status = service.run("status", "--name", service.name).stdout
    assert "generation 2 is a canary: 1 of 2 workers until its watch is passed" in status
    service.signal(signal.SIGTTIN, new.master_pid)
    until("three workers in the end", lambda: watched(service)[1].workers_full == 3, service)
    service.signal(signal.SIGTTIN, old.master_pid)
    until("three old workers", lambda: serving(watched(service)[0]) == 3, service)
    for pid in (old.master_pid, new.master_pid):
        service.signal(signal.SIGHUP, pid)
    service.wait_for(r"event=refused signal=HUP reason=\"an upgrade is under way\"", 2)
    new = watched(service)[1]
    assert (new.workers_wanted, serving(new)) == (1, 1)
    assert service.run("cancel", "--name", service.name).returncode == 0
    assert "in the commit window" in command.ends(1).splitlines()[-1]
    service.workers = 3
    service.until_alone()
    # Of the old generation one worker has imported what is on disk now.
    assert (service.get().generation, history(service)["outcome"]) == (1, "cancelled")


def test_worker_that_cannot_boot_while_the_canary_grows_takes_it_back(make_service):
    service = make_service("gthread", workers=2).configure(upgrade_timeout=8).start()
    write(service, "2", at_import="if os.path.exists('broken'): raise RuntimeError('gone bad')")
    command = Command(service, "upgrade", "--watch", "1", "--canary", "1")
    watched(service)
    (service.directory / "broken").touch()
    said = command.ends(1)
    assert "the growth to its full size was not over after" in said
    assert "2 workers to serve, of which 1 do" in said
    service.until_alone()
    assert service.get().version == "1"
    assert serving(service.snapshot()) == 2


def test_canary_without_a_watch_is_refused(make_service):
    service = make_service("gthread", workers=2).start()
    done = service.run("upgrade", "--name", service.name, "--canary", "1")
    assert done.returncode == 1
    assert "--canary 1: nothing is watched: give --watch SECONDS too, or set WATCH" in " ".join(done.stderr.split())
    assert "generation 1 serves on" in done.stderr
