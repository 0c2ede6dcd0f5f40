"""SIGTERM: what a stop does to requests, background work and probes."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes.harness import APP, LEAVES_BY, Service, answered_from, outlives, until
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Outcome
from zdd_web.listeners.accept_queue import Admission, block_new_connections


def test_a_request_in_hand_is_answered_and_the_port_is_closed(service: Service):
    service.start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=2")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        assert reply.result().status == 200
    service.ends()
    assert not service.is_open()
    assert not service.pid_file.exists()


TERM_IN_HOOK = """
import os, signal, time
def pre_request(worker, req):
    # Counted in by now, and gunicorn asks the listener for its name afterwards.
    os.kill(os.getppid(), signal.SIGTERM)
    until = time.monotonic() + 10
    while worker.cfg.worker_class_str == "sync" and worker.sockets[0].sock and time.monotonic() < until:
        time.sleep(0.01)
"""


def test_a_request_that_has_just_been_read_survives_the_close_of_its_listener(service: Service):
    service.workers = 1
    service.configure(TERM_IN_HOOK).start()
    assert service.get().status == 200
    service.ends()
    assert not service.matches("Error handling request")


def test_what_waits_in_the_accept_queue_is_answered(service: Service):
    service.start()
    # More connections than workers and threads: the rest waits in the kernel.
    with ThreadPoolExecutor(20) as pool:
        replies = [pool.submit(service.get, "/slow?seconds=0.5") for _ in range(20)]
        until(
            "all connections",
            lambda: connected_to(service.port) + sum(reply.done() for reply in replies) >= 20,
            service,
        )
        service.signal(signal.SIGTERM)
        assert [reply.result().status for reply in replies] == [200] * 20
    service.ends(status=None)


def may_close_the_door() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return block_new_connections(server) is Admission.BLOCKED


@pytest.mark.skipif(not may_close_the_door(), reason="needs CAP_NET_ADMIN for a filter on a listener")
def test_a_stop_under_load_resets_nobody(service: Service):
    # No lame duck, and clients that do not leave: the queue is never empty by itself.
    service.start()
    load = LoadThread(Load("127.0.0.1", service.port, ("/slow?seconds=0.02",), 40, 0.5, 0.02, 20.0))
    with load:
        answered_from(load, 200)
        service.signal(signal.SIGTERM)
        service.ends()
        # Whoever comes now is told at once that there is nobody, which every client may retry.
        until("a refusal", lambda: any(each.outcome is Outcome.REFUSED for each in list(load.samples)), service)
    found = Counter(sample.outcome for sample in load.samples)
    assert set(found) <= {Outcome.OK, Outcome.STALE, Outcome.REFUSED}, found
    line = service.wait_for(r"event=phase\.stopped .*late=\d+ late_by=[\d.]+ late_peer=127\.0\.0\.1:\d+ late_new=\d+")
    assert "[WARNING]" in line and 'remedy="DRAIN_DELAY = 5, GRACE_PERIOD = ' in line


def test_requests_that_come_in_a_lame_duck_are_late_and_need_no_longer_one(service: Service):
    service.configure(drain_delay=2, grace_period=10).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    assert service.get().status == 200
    service.ends()
    line = service.wait_for(r"event=phase\.stopped")
    assert " late=1 " in line and "late_peer=127.0.0.1:" in line
    assert "remedy=" not in line


def test_connections_that_come_while_the_last_requests_are_finished_are_refused(make_service):
    # A queue that somebody still holds open is not refused but waits, for nothing.
    service = make_service("gthread")
    service.start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=4")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        until("a closed port", lambda: not service.is_open(), service)
        assert service.snapshot().in_flight == 1
        assert reply.result().status == 200
    service.ends()


def test_a_stop_in_a_pod_begins_with_a_lame_duck(make_service):
    service = make_service("gthread")
    service.environ["KUBERNETES_SERVICE_HOST"] = "10.96.0.1"
    service.configure(grace_period=6).start()
    assert service.matches("event=boot.started .*grace_period=6 drain_delay=2 kubernetes=yes")
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    assert service.get("/readyz").status == 503
    assert service.get().status == 200
    service.ends()


def test_with_lame_duck_ready_a_lame_duck_is_ready_on_both_ports(make_service):
    service = make_service("gthread")
    service.configure(drain_delay=20, grace_period=30, lame_duck_ready=True, probe_bind="127.0.0.1:0").start()
    probes = int(service.matches(r"event=probes\.listening address=127\.0\.0\.1:(\d+)")[0])

    def readiness(port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/readyz")
            return connection.getresponse().status

    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    assert [readiness(service.port), readiness(probes)] == [200, 200]
    # The second one skips the rest.
    service.signal(signal.SIGTERM)
    service.ends()


def test_a_stop_that_abandons_work_leaves_its_status_and_a_message(service: Service):
    message = service.directory / "termination-log"
    message.touch()
    service.configure(grace_period=2, abandon_status=77, termination_log=str(message)).start()
    service.get("/job?seconds=600")
    service.stop(status=77)
    assert message.read_text().startswith("zdd_web: 0 requests and 1 background tasks were abandoned")


def connected_to(port: int) -> int:
    """Count the established connections to a port, from the server's side."""
    local = f":{port:04X}"
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(row[1].endswith(local) and row[3] == "01" for row in rows)


@pytest.mark.parametrize("cause", LEAVES_BY)
def test_background_work_is_finished(service: Service, cause: str):
    outlives(service, cause)


def test_background_work_past_the_deadline_is_named_and_the_status_tells(service: Service):
    service.configure(grace_period=3).start()
    service.get("/job?seconds=600")
    service.signal(signal.SIGTERM)
    line = service.wait_for("event=background.abandoned")
    assert "name=job" in line
    assert "age=" in line
    service.ends(1)


def test_a_request_past_the_deadline_is_cut_and_the_status_tells(service: Service):
    service.configure(grace_period=2).start()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(service.get, "/slow?seconds=600")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        line = service.wait_for("event=drain.abandoned")
        with pytest.raises((ConnectionError, OSError)):
            reply.result()
    assert "requests=1" in line
    service.ends(1)


def test_lame_duck_accepts_everything_while_readiness_is_503(service: Service):
    service.configure(drain_delay=20, grace_period=30).start()
    with service.under_load() as load:
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.lame_duck")
        ready = service.get("/readyz")
        assert (ready.status, ready.body) == (503, "lame_duck\n")
        assert ready.headers["Retry-After"]
        assert service.get("/healthz").status == 503
        assert service.get("/livez").status == 200
        answered_from(load, 100)
        assert service.get("/").headers["Connection"] == "close"
    # The second one skips the rest.
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.draining")
    service.ends()


def test_a_worker_that_dies_in_the_lame_duck_is_replaced(service: Service):
    service.configure(drain_delay=20, grace_period=30).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    victim = service.get().pid
    os.kill(victim, signal.SIGKILL)
    until(
        "two serving workers without the victim",
        lambda: [w.state.label for w in service.snapshot().workers if w.pid != victim] == ["serving"] * 2,
        service,
    )
    service.signal(signal.SIGTERM)
    service.ends(status=None)


def test_workers_signalled_with_the_group_leave_when_their_master_says_so(service: Service):
    service.configure(drain_delay=20, grace_period=30).start()
    workers = [worker.pid for worker in service.snapshot().workers]
    with service.under_load() as load:
        for pid in [service.pid, *workers]:
            os.kill(pid, signal.SIGTERM)
        service.wait_for("event=phase.lame_duck")
        answered_from(load, 200)
        assert [worker.pid for worker in service.snapshot().workers] == workers
    service.signal(signal.SIGTERM)
    service.ends(status=None)


def test_a_worker_that_alone_is_signalled_leaves_and_is_replaced(service: Service):
    service.start()
    victim = service.get().pid
    with service.under_load() as load:
        os.kill(victim, signal.SIGTERM)
        until("the worker's end", lambda: victim not in service.processes(), service)
        answered_from(load, 50)
    until("two workers", lambda: [w.state.label for w in service.snapshot().workers] == ["serving"] * 2, service)
    service.stop()


def test_a_killed_master_leaves_no_port_open(service: Service):
    service.start()
    service.signal(signal.SIGKILL)
    service.ends(status=None)
    assert not service.is_open()


def test_a_killed_master_leaves_no_worker_that_hangs_at_import(service: Service):
    service.deploy("1", at_import="time.sleep(600)")
    process = service.spawn()
    service.wait_for("Booting worker", times=2)
    until("boards", service.generations, service)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    service.ends(status=None)


def test_stop_while_booting_ends_soon(service: Service):
    service.deploy("1", at_import="time.sleep(600)")
    process = service.spawn()
    service.wait_for("Booting worker", times=2)
    os.kill(process.pid, signal.SIGTERM)
    service.wait_for("event=phase.draining")
    service.ends(status=None)
    assert not service.pid_file.exists()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_sigint_and_sigquit_stop_now(service: Service, sig: signal.Signals):
    service.start()
    service.signal(sig)
    service.ends(status=None)
    assert not service.is_open()
    assert not service.pid_file.exists()


def test_an_upload_in_hand_is_finished(service: Service):
    service.start()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + b"x" * 1000)
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        service.wait_for("event=phase.draining")
        client.sendall(b"x" * 2000)
        answer = b""
        while data := client.recv(4096):
            answer += data
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in answer
    service.ends(status=None)


#: Seconds that a slow upload and a stream take: more than a test run has, when asked for.
SLOW = float(os.environ.get("SLOW_SECONDS", "4"))


def test_a_slow_upload_begun_before_the_stop_is_finished(service: Service):
    # gunicorn's own limit for one request of a sync worker.
    service.arguments = ["--timeout", str(round(SLOW) + 30)]
    service.configure(grace_period=SLOW + 10).start()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        size = round(SLOW * 10) * 100
        client.sendall(f"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.signal(signal.SIGTERM)
        # A hundred bytes each tenth of a second: what a client on a bad line sends.
        for _ in range(size // 100):
            client.sendall(b"x" * 100)
            time.sleep(0.1)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    service.ends()


def test_a_stream_begun_before_the_stop_is_finished_and_one_without_end_is_cut(service: Service):
    service.configure(grace_period=SLOW + 4).start()
    with ThreadPoolExecutor(2) as pool:
        finite = pool.submit(service.get, f"/stream?seconds={SLOW}")
        endless = pool.submit(service.get, "/stream?seconds=3600")
        until("both", lambda: service.snapshot().in_flight == 2, service)
        service.signal(signal.SIGTERM)
        assert finite.result().body.endswith("done")
        with pytest.raises((OSError, http.client.HTTPException)):
            endless.result()
    service.ends(status=1)
    assert service.matches("event=drain.abandoned .*requests=1")


def test_abandoned_work_is_told_with_its_request_and_stack_handed_back_and_the_last_hooks_run(service: Service):
    service.write_app(APP.replace('name="job")', 'name="job", on_abandon=hand_back)') + LAST_STEPS)
    service.configure(grace_period=3).start()
    service.get("/job?seconds=600")
    service.stop(status=1)
    line = service.wait_for("event=background.abandoned.*")
    assert 'request="GET /job"' in line and " age=" in line
    assert "    time.sleep(seconds)" in service.log()
    assert service.matches("handed back job, begun with \\(600.0,\\)")
    # Last in, first out.
    assert service.log().index("second hook") < service.log().index("first hook")


LAST_STEPS = """
    def hand_back(entry):
        print("handed back", entry.name + ", begun with", entry.args, file=sys.stderr, flush=True)

    zdd_web.on_drained(lambda: print("first hook", file=sys.stderr, flush=True))
    zdd_web.on_drained(lambda: print("second hook", file=sys.stderr, flush=True))
"""


MANY = (
    APP.replace('name="job")', 'name="job", on_abandon=hand_back)')
    + """
    real_app = app

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/jobs":
            for number in range(500):
                # Every third has no end within the budget.
                job_number(600 if number % 3 == 0 else 0.001)
        return real_app(environ, start_response)

    def job_number(seconds):
        zdd_web.background.go(quiet_job, seconds, name="job", on_abandon=hand_back)

    def quiet_job(seconds):
        time.sleep(seconds)
        note("finished")

    def hand_back(entry):
        note("handed-back")

    def note(name):
        with open(name, "ab", buffering=0) as file:
            file.write(b".")
"""
)


def test_ten_thousand_tasks_are_finished_or_counted_and_handed_back_or_counted(service: Service):
    service.write_app(MANY)
    # Two seconds to name and hand back: on a busy machine one is not enough for all of them.
    service.configure(grace_period=20).start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(service.get, ["/jobs"] * 20))
    service.stop(status=1)
    # Two threads may finish, or hand back, while the process ends: by what they have done, not by what they say.
    finished, handed_back = ((service.directory / name).stat().st_size for name in ("finished", "handed-back"))
    cut = sum_of(service, "background.deadline", "tasks")
    assert finished + cut == 10_000, (finished, cut)
    assert cut >= 3_334
    assert f"tasks={cut} " in service.wait_for("event=drain.abandoned")
    named = len(service.matches("event=background.abandoned "))
    assert named + sum_of(service, "background.abandoned_by_name", "tasks") == cut
    assert named <= 100 * service.workers
    not_run = sum_of(service, "background.handed_back", "not_run")
    assert handed_back + not_run == cut, (handed_back, not_run)


def sum_of(service: Service, event: str, key: str) -> int:
    """Return the sum of a number in all lines of an event."""
    return sum(int(value) for value in re.findall(rf"event={re.escape(event)} .*\b{key}=(\d+)", service.log()))


SLEEPS_ARE_SEEN = """
import types
from gunicorn import arbiter

class Seen(types.ModuleType):
    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        print("gunicorn sleeps", file=sys.stderr, flush=True)
        time.sleep(seconds)

import sys, time
arbiter.time = Seen("time")
"""


def test_a_master_that_has_killed_its_workers_waits_for_nothing_else(service: Service):
    """What it takes to end after the deadline is taken from GRACE_PERIOD, after which the platform kills."""
    service.configure(SLEEPS_ARE_SEEN, grace_period=2).start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(service.get, "/slow?seconds=600")
        until("the request", lambda: service.snapshot().in_flight == 1, service)
        service.stop(status=1)
    assert service.matches("event=drain.abandoned workers=1 requests=1")
    assert not service.matches("gunicorn sleeps")
