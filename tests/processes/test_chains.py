"""Upgrades one after the other, at once, and interrupted: in the end one generation serves, or none is left."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.processes.harness import (
    Service,
    answered_from,
    descriptors,
    generations_of,
    successor,
    until,
)
from tests.processes.trial import (
    HANG_SECOND,
    WIDE_COMMIT_WINDOW,
    HeldBy,
    at_gate,
    configure,
    ends_without_a_trace,
    takes_over,
)
from zdd_web.lifecycle import Phase
from zdd_web.system import proc


def test_four_generations_at_once_and_a_fifth_is_refused_with_the_reason(service: Service):
    configure(service).start()
    with service.under_load(clients=4):
        held = []
        for generation in (1, 2, 3):
            held.append(HeldBy(service, generation))
            service.upgrade()
        alive = [each.board.header.generation for each in service.generations()]
        assert alive == [1, 2, 3, 4]
        done = service.run("upgrade", "--name", service.name)
        assert done.returncode == 1
        assert "4 generations are alive, and MAX_GENERATIONS = 4" in done.stderr
        assert "MAX_GENERATIONS" in service.wait_for("event=refused")
        assert service.snapshot().generation == 4
        assert [each.release() for each in held] == [1, 2, 3]
        service.until_one_generation()
        takes_over(service, 5, version="1")
    assert not service.matches("event=successor.lost")
    ends_without_a_trace(service, status=None)


@pytest.mark.begins_first
def test_ten_upgrades_by_command_as_fast_as_they_go(service: Service):
    configure(service).start()
    seen = []
    with service.under_load(clients=8) as load:
        for number in range(2, 12):
            service.deploy(str(number))
            done = service.run("upgrade", "--name", service.name)
            assert done.returncode == 0, (number, done.stderr, service.log())
            # Done means done: nobody answers with the old code any more.
            assert service.get().version == str(number)
            service.until_one_generation()
            seen.append(len(descriptors(service.pid)))
    assert generations_of(load) == set(range(1, 12))
    # The channel to a predecessor is closed a turn of the loop after its end.
    until("no descriptor more than at first", lambda: len(descriptors(service.pid)) == min(seen), service)
    service.until_alone()
    ends_without_a_trace(service, status=None)


def test_usr2_the_moment_that_the_last_upgrade_is_committed(service: Service):
    configure(service).start()
    with service.under_load(clients=8) as load:
        master = service.pid
        for times in range(1, 7):
            os.kill(master, signal.SIGUSR2)
            master = successor(service, times, event="upgrade.committed")
        answered_from(load, 50)
    assert not service.matches("event=(refused|upgrade.failed|internal.error)")
    service.until_one_generation()
    assert service.pid == master
    assert service.snapshot().generation == 7
    assert service.pid_file.read_text() == f"{master}\n"
    ends_without_a_trace(service, status=None)


def test_a_storm_of_usr2_ends_serving(service: Service):
    configure(service).start()
    masters = {service.pid}
    with service.under_load(clients=6) as load:
        for _ in range(3):
            for _ in range(20):
                for each in service.generations():
                    # The new one too, as soon as it can hear: it is not in office yet, and must not die of it.
                    if each.board.header.phase == Phase.SERVING:
                        proc.kill(each.pid, each.board.header.master_start, signal.SIGUSR2)
            masters.add(service.pid)
            until("calm", lambda: len(service.generations()) == 1 and not under_way(service), service)
        answered_from(load, 50)
        takes_over(service, service.snapshot().generation + 1, version="1")
    assert service.matches(r"event=upgrade\.committed")
    assert not service.matches(r"event=(upgrade\.failed|successor\.lost|internal\.error)")
    service.until_alone()
    ends_without_a_trace(service, status=None)


def under_way(service: Service) -> bool:
    # A master that has heard the last signal of a storm says so on its board within a turn of its loop.
    return len(service.processes()) != 1 + service.workers


def test_an_upgrade_waits_for_background_work_of_the_old_generation(service: Service):
    configure(service).start()
    first = service.pid
    with service.under_load(clients=6):
        assert service.get("/job?seconds=16").generation == 1
        service.deploy("2")
        done = service.run("upgrade", "--name", service.name)
        assert done.returncode == 0
        assert not service.matches("job finished")
        assert service.get().version == "2"
        service.wait_for("job finished")
        until("the old generation's end", lambda: first not in [each.pid for each in service.generations()], service)
    assert not service.matches("event=background.abandoned")
    ends_without_a_trace(service)


STAGES = {
    "the new master was forked": r"generation=1 event=upgrade\.started",
    "the new master boots": r"generation=2 event=boot\.started",
    "the new workers boot": r"generation=2 event=boot\.started[\s\S]*Booting worker",
    "the new one is ready": r"generation=2 event=upgrade\.ready",
    "in the commit window": r"generation=2 event=phase\.serving",
    "committed": r"event=upgrade\.committed",
    "retiring": r"generation=1 event=phase\.retiring",
}


@pytest.mark.parametrize("whom", ["the service", "all masters", "all processes"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_in_the_middle_of_an_upgrade_leaves_nothing(make_service, stage: str, whom: str):
    service = make_service("gthread" if whom == "all processes" else "sync")
    configure(service, WIDE_COMMIT_WINDOW if stage == "in the commit window" else "", grace_period=10).start()
    service.signal(signal.SIGUSR2)
    until(stage, lambda: re.search(STAGES[stage], service.log()), service)
    if whom == "the service":
        service.signal(signal.SIGTERM)
    elif whom == "all masters":
        for each in service.generations():
            proc.kill(each.pid, each.board.header.master_start, signal.SIGTERM)
    else:
        # systemd's KillMode=control-group
        for pid in service.processes():
            proc.kill(pid, proc.start_time(pid), signal.SIGTERM)
    service.ends(status=None)
    service.leaves_no_trace()
    assert not service.matches("event=(internal.error|drain.abandoned)")


SLOW_TO_RETIRE = """
import logging, time
class Slow(logging.Handler):
    def emit(self, record):
        if "event=upgrade.committed" in record.getMessage():
            time.sleep(2)
def when_ready(server):
    logging.getLogger("gunicorn.error").addHandler(Slow())
"""


def test_a_stop_between_the_commit_and_the_retirement_ends_both(make_service):
    service = configure(make_service("sync"), SLOW_TO_RETIRE, grace_period=10).start()
    service.signal(signal.SIGUSR2)
    service.wait_for("event=upgrade.committed")
    service.signal(signal.SIGTERM)
    service.ends(status=None)
    assert service.matches("generation=2 event=phase.stopped")
    service.leaves_no_trace()


@pytest.mark.parametrize("stage", ["the new master boots", "in the commit window"])
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_in_the_middle_of_an_upgrade_leaves_nothing(make_service, stage: str, sig: signal.Signals):
    service = make_service("sync")
    configure(service, WIDE_COMMIT_WINDOW).start()
    service.signal(signal.SIGUSR2)
    until(stage, lambda: re.search(STAGES[stage], service.log()), service)
    service.signal(sig)
    service.ends(status=None)
    service.leaves_no_trace()


def test_a_stop_in_the_commit_window_answers_what_both_generations_have_in_hand(service: Service):
    configure(service, WIDE_COMMIT_WINDOW).start()
    first = HeldBy(service, generation=1)
    service.signal(signal.SIGUSR2)
    service.wait_for(r"generation=2 event=phase\.serving")
    second = HeldBy(service, generation=2)
    service.signal(signal.SIGTERM)
    service.wait_for(r"generation=2 event=phase\.draining")
    assert first.release() == 1
    assert second.release() == 2
    service.ends(status=None)
    service.leaves_no_trace()


def test_a_stop_while_the_new_master_stands_still_leaves_nothing(make_service):
    service = make_service("sync")
    configure(service, WIDE_COMMIT_WINDOW, grace_period=4).start()
    service.signal(signal.SIGUSR2)
    service.wait_for(r"generation=2 event=phase\.serving")
    os.kill(service.generations()[-1].pid, signal.SIGSTOP)
    service.signal(signal.SIGTERM)
    service.ends(status=None, patience=15)
    assert not service.is_open()


def test_a_stop_while_a_worker_of_two_hangs_at_the_gate_leaves_nothing(service: Service):
    configure(service).start()
    service.deploy("2", at_import=HANG_SECOND)
    service.signal(signal.SIGUSR2)
    master = successor(service)
    until("a worker at the gate", lambda: at_gate(service, master), service)
    ends_without_a_trace(service)
    assert service.matches(r"event=upgrade\.cancelled")


def test_stopping_the_service_while_three_generations_are_alive_finishes_all_their_requests(service: Service):
    configure(service).start()
    held = []
    for generation in (1, 2):
        held.append(HeldBy(service, generation))
        service.upgrade()
    held.append(HeldBy(service, 3))
    service.signal(signal.SIGTERM)
    service.wait_for(r"generation=3 event=phase\.draining")
    assert [each.release() for each in held] == [1, 2, 3]
    service.ends(status=None)
    service.leaves_no_trace()
    assert not service.matches(r"event=successor\.lost")
