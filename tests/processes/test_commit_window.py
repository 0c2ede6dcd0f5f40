"""The commit window: a release whose workers die, freeze or turn unready right after the gate is rejected."""

from __future__ import annotations

import signal

import pytest

from tests.processes.harness import Service
from tests.processes.trial import configure, on_trial

#: Run at import in a thread: `DO` happens a moment after the worker has passed the gate.
AFTER_THE_GATE = """
import threading
from zdd_web import process
from zdd_web.board import WorkerState

def after_the_gate():
    while process.current().slot is None or process.current().slot.state != WorkerState.SERVING:
        time.sleep(0.01)
    time.sleep({seconds})
    {do}

threading.Thread(target=after_the_gate, daemon=True).start()
"""

#: A check that passes until the worker has passed the gate.
CHECK = """
import zdd_web
broken = []

@zdd_web.check("stock", interval=0.1)
def stock():
    assert not broken, "no stock"
"""

FAULTS = {
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", r"worker \d+ ended in the commit window: killed by SIGSEGV"),
    "freeze": ("os.kill(os.getpid(), signal.SIGSTOP)", r"worker \d+ has not sent a heartbeat for [\d.]+ s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_release_whose_workers_fail_after_the_gate_is_rejected(service: Service, fault: str):
    do, reason = FAULTS[fault]
    # A worker with a request in hand is given as long as gunicorn gives it.
    service.arguments = ["--timeout", "8"]
    configure(service).start()
    service.deploy("2", at_import=AFTER_THE_GATE.format(do=do, seconds=0.3))
    # What a worker that crashes has in hand is lost, whatever becomes of its generation.
    with on_trial(service, may_lose=True) as trial:
        trial.fails(reason)
        trial.answers()
        trial.is_unharmed()
        assert not service.matches(r"event=upgrade\.committed")
        trial.recovers()


def test_a_release_that_turns_unready_after_the_gate_is_rejected(service: Service):
    configure(service, commit_window=5).start()
    service.deploy("2", at_import=CHECK + AFTER_THE_GATE.format(do="broken.append(1)", seconds=0.3))
    with on_trial(service) as trial:
        trial.fails("check 'stock' fails in the commit window: AssertionError: no stock")
        trial.answers()
        trial.is_unharmed()
        trial.recovers()


def test_workers_that_come_and_go_in_the_commit_window_are_no_failure(service: Service):
    service.arguments = ["--max-requests", "20"]
    configure(service, commit_window=3).start()
    service.deploy("2")
    with on_trial(service) as trial:
        successor = trial.begin()
        service.wait_for(r"generation=2 event=phase\.serving")
        service.signal(signal.SIGTTIN, successor)
        service.wait_for(r"generation=2 event=worker\.recycled", times=3)
        service.signal(signal.SIGTTOU, successor)
        service.wait_for(r"event=upgrade\.committed")
        trial.answers()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_frozen_workers_of_a_rejected_release_do_not_outlive_a_stop(make_service, sig: signal.Signals):
    service = make_service("gthread")
    service.arguments = ["--timeout", "5"]
    configure(service, grace_period=20).start()
    service.deploy("2", at_import=AFTER_THE_GATE.format(do=FAULTS["freeze"][0], seconds=0))
    # The stop comes before a sign that the workers stand still could be seen again.
    service.upgrade(expect="upgrade.failed")
    service.signal(sig)
    service.ends(status=None)
    service.leaves_no_trace()
