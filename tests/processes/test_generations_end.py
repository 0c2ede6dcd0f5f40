"""A generation never outlives its stop: retirement has a limit, and a stop reaches every generation."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.processes.harness import CONF, Held, Service, until


def retire(service: Service) -> Held:
    """Upgrade with a request in hand in the generation that was in office; it does not end by itself."""
    held = Held(service)
    before = service.is_active().board.header.generation
    service.signal(signal.SIGUSR2)
    service.wait_for(rf"generation={before} event=phase\.retiring")
    until("the old workers to leave", lambda: not service._old_ones_that_accept(), service)
    return held


def test_a_retirement_that_takes_too_long_is_cut_off_and_named(make_service) -> None:
    service = make_service("gthread", workers=1)
    service.configure(retire_timeout=3).start()
    service.get("/job?seconds=600")
    with retire(service):
        line = service.wait_for(r"generation=1 event=drain\.abandoned")
        service.until_one_generation()
    assert "requests=1 tasks=1" in line and 'limit="RETIRE_TIMEOUT = 3"' in line
    assert service.matches("generation=1 event=background.abandoned .*name=job")
    assert re.search(r"seconds=([3-9]|\d\d)", line)
    assert service.get().generation == 2
    # The status is that of the process which was started, the first master.
    service.stop(status=1)


def test_a_stop_reaches_every_generation_and_drain_counts_what_it_cuts_off(make_service) -> None:
    service = make_service("gthread", workers=1)
    service.configure(grace_period=4).start()
    with retire(service), retire(service):
        # The second has a predecessor and a successor.
        assert [each.board.header.generation for each in service.generations()] == [1, 2, 3]
        done = service.run("drain", "--name", service.name)
        assert service.generations() == [], done.stdout
    assert done.returncode == 1
    assert "cut off: 2 requests" in done.stderr, done.stdout + done.stderr
    service.ends(status=None)
    assert len(service.matches("generation=3 event=stop.forwarded signal=TERM")) == 2
    assert len(service.matches("event=drain.abandoned")) == 2


def test_an_old_generation_with_a_longer_grace_period_has_the_deadline_of_the_new_one(make_service) -> None:
    service = make_service("gthread", workers=1)
    service.configure(grace_period=300).start()
    service.settings["grace_period"] = 3
    service.write_conf(CONF)
    with retire(service):
        service.signal(signal.SIGTERM)
        deadlines = until("deadlines", lambda: {each.snapshot().deadline for each in service.generations()} - {0})
        service.ends(status=None)
    # Of either, whichever was there first.
    assert max(deadlines) - time.monotonic_ns() < 10e9


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_stop_now_reaches_every_generation(make_service, sig: signal.Signals) -> None:
    # The heartbeat of a sync worker would end it in the meantime.
    service = make_service("gthread", workers=1)
    service.arguments = ["--graceful-timeout", "2"]
    service.start()
    with retire(service):
        service.signal(sig)
        service.ends(status=None)
    assert not service.is_open()


def test_a_master_whose_pid_stays_does_not_send_the_stop_back(make_service) -> None:
    service = make_service("gthread", workers=1)
    service.configure(keep_pid=True, drain_delay=2, grace_period=20).start()
    with retire(service) as held:
        until("office", lambda: service.is_active().board.header.generation == 2, service)
        second = service.pid
        service.signal(signal.SIGTERM, second)
        service.wait_for("generation=2 event=stop.forwarded")
        until("a deadline", lambda: service.generations()[0].snapshot().deadline, service)
        assert held.is_answered()
    service.ends()
    # One more would have ended the lame duck.
    assert len(re.findall(rf"\[{second}\] \[INFO\] Handling signal: term", service.log())) == 1
    assert re.search(r"generation=2 event=phase.draining after=[2-9]", service.log())
