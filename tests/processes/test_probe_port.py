"""The probe port: its answers in every phase, its process in every trouble, and its socket across generations."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.processes.harness import (
    PATIENCE,
    Held,
    Service,
    answered_from,
    command_line,
    descriptors,
    lost,
    settled,
    successor,
    until,
)
from tests.processes.trial import WIDE_COMMIT_WINDOW, HeldBy
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.lifecycle import Phase
from zdd_web.system import proc

LIVE, READY, STARTUP = "/livez", "/readyz", "/startupz"

#: Statements for `deploy`.
WAIT_FOR_GO = "while not os.path.exists('go'): time.sleep(0.01)"
HANG = "time.sleep(600)"


#: For `configure`: the next processes of the probe port exit with the statuses in the file `exits`.
EXITS = """
import os
import zdd_web.gunicorn.master.probe_process as module
real = module.ProbePort._serve
def serve(self, master):
    exits = open("exits").read().split() if os.path.exists("exits") else []
    if exits:
        open("exits", "w").write(" ".join(exits[1:]))
        os._exit(int(exits[0]))
    real(self, master)
module.ProbePort._serve = serve
"""


@pytest.fixture
def probed(service: Service) -> Service:
    return service.configure(probe_bind="127.0.0.1:0")


@pytest.fixture
def one(make_service: Callable[..., Service]) -> Service:
    """One worker class where it makes no difference."""
    return make_service("gthread").configure(probe_bind="127.0.0.1:0")


def port_of(service: Service, generation: int = 1) -> int:
    line = service.wait_for(rf"generation={generation} event=probes\.listening")
    found = re.search(r"address=\S+:(\d+) ", line)
    assert found, line
    return int(found[1])


def process_of(service: Service) -> int:
    """The pid of the process that answers for the generation in office."""
    header = service.is_active().board.header
    return until("the probe port's process", lambda: header.probe_pid, service)


def ask(port: int, path: str, timeout: float = PATIENCE) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response
    finally:
        connection.close()


def statuses(port: int) -> tuple[int, int, int]:
    """What liveness, readiness and startup are answered."""
    live, ready, startup = (ask(port, path).status for path in (LIVE, READY, STARTUP))
    return live, ready, startup


def says(port: int, request: bytes) -> bytes:
    """Send bytes, and return all that comes back until the other end closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65536):
                received += data
        return received


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def is_gone(service: Service, port: int) -> None:
    service.ends(status=None)
    assert refuses(port)


@contextlib.contextmanager
def prober(port: int, path: str = READY, think: float = 0.02) -> Iterator[LoadThread]:
    """Ask about two hundred times a second, over new and kept connections; all must be told 200."""
    load = LoadThread(Load("127.0.0.1", port, (path,), 4, 0.5, think, 20.0, pace=think))
    with load:
        answered_from(load, 20)
        yield load
        answered_from(load, 20)
    assert lost(load) == []
    assert {sample.status for sample in load.samples if sample.outcome.answered} == {200}


# -- what it answers


def test_answers_in_every_phase_of_a_service_that_boots_serves_and_stops(probed: Service) -> None:
    probed.deploy("1", at_import=WAIT_FOR_GO)
    probed.configure(drain_delay=20).spawn()
    port = port_of(probed)
    assert statuses(port) == (200, 503, 503)
    (probed.directory / "go").touch()
    probed.wait_for(r"event=phase\.serving")
    probed.learn_port()
    assert statuses(port) == (200, 200, 200)
    with Held(probed) as held:
        master = probed.pid
        probed.signal(signal.SIGTERM)
        probed.wait_for(r"event=phase\.lame_duck")
        assert statuses(port) == (200, 503, 200)
        reply = ask(port, READY)
        assert (reply.getheader("Retry-After"), reply.getheader("Connection")) == ("5", "close")
        probed.signal(signal.SIGTERM, master)
        probed.wait_for(r"event=phase\.draining")
        assert statuses(port) == (200, 503, 200)
        assert held.finish().status == 200
    probed.ends(0)
    assert refuses(port)
    # Said once each, and nothing while it booted.
    assert len(probed.matches(r"event=probe\.failing probe=readiness")) == 1
    assert not probed.matches(r"event=probe\.(failing|passing) probe=liveness")


def test_answers_when_all_workers_are_busy_and_when_one_stands_still(probed: Service) -> None:
    probed.start()
    port = port_of(probed)
    most = probed.workers * (4 if probed.worker_class == "gthread" else 1)
    with ThreadPoolExecutor(64) as pool:
        replies = []
        # Which worker takes one is chance; those that are too many wait.
        while probed.snapshot().in_flight < most and len(replies) < 64:
            replies.append(pool.submit(probed.get, "/hold?busy"))
            time.sleep(0.02)
        until("busy workers", lambda: probed.snapshot().in_flight == most, probed)
        for _ in range(50):
            assert statuses(port) == (200, 200, 200)
        still = probed.snapshot().workers[0].pid
        os.kill(still, signal.SIGSTOP)
        until("a worker that stands still", lambda: proc.state(still) == "T", probed)
        assert statuses(port) == (200, 200, 200)
        os.kill(still, signal.SIGCONT)
        (probed.directory / "busy").touch()
        assert {reply.result().status for reply in replies} == {200}


def test_liveness_fails_when_no_worker_has_beaten_for_the_worker_timeout(one: Service) -> None:
    one.arguments = ["--timeout", "1"]
    one.configure(upgrade_timeout=2).start()
    port = port_of(one)
    workers = settled(one, 2)
    # gunicorn kills them; those that it starts instead hang in their import, and do not beat either. That is borne for
    # as long as a boot may take.
    one.deploy("2", at_import=HANG)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    until("liveness to fail", lambda: ask(port, LIVE).status == 503, one)
    one.wait_for(r"event=probe\.failing probe=liveness reason=.heartbeat: the last one")
    until("the workers' end", lambda: not set(workers) & set(one.processes()), one)
    assert ask(port, LIVE).status == 503
    # They are killed on the way out.
    one.signal(signal.SIGQUIT)
    is_gone(one, port)


def test_a_master_whose_main_loop_has_stopped_is_reported_and_its_workers_serve_on(one: Service) -> None:
    one.start()
    port, master = port_of(one), one.pid
    assert one.run("status", "--pid", str(master)).returncode == 0
    os.kill(master, signal.SIGSTOP)
    line = one.wait_for(r"event=master\.stalled seconds=")
    assert "WARNING" in line
    assert statuses(port) == (200, 200, 200)
    assert b"[!]master its main loop has not run for " in says(port, b"GET /readyz?verbose HTTP/1.0\r\n\r\n")
    said = one.run("status", "--pid", str(master))
    assert said.returncode == 1
    assert "  serving, hangs  " in said.stdout
    assert f"generation 1 (pid {master}) hangs: its main loop has not run for " in said.stderr
    programs = one.run("status", "--pid", str(master), "--json")
    assert (programs.returncode, json.loads(programs.stdout)["generations"][0]["stalled_for"] > 5) == (1, True)
    assert one.get().status == 200
    os.kill(master, signal.SIGCONT)
    one.wait_for(r"event=master\.resumed")
    assert one.run("status", "--pid", str(master)).returncode == 0
    one.stop()


def test_readiness_fails_when_all_workers_are_dead_and_passes_when_others_serve(one: Service) -> None:
    one.start()
    port = port_of(one)
    workers = settled(one, 2)
    one.deploy("2", at_import=WAIT_FOR_GO)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    until("readiness to fail", lambda: statuses(port) == (200, 503, 200), one)
    one.wait_for(r"event=probe\.failing probe=readiness reason=.workers: 0 of 2 serve")
    (one.directory / "go").touch()
    until("readiness to pass", lambda: ask(port, READY).status == 200, one)
    one.wait_for(r"event=probe\.passing probe=readiness")


def test_every_probe_that_kubernetes_and_people_send_is_answered(one: Service) -> None:
    one.start()
    port = port_of(one)
    for request in (
        b"GET /readyz HTTP/1.1\r\nHost: 10.1.2.3:8081\r\nUser-Agent: kube-probe/1.34\r\nAccept: */*\r\n"
        b"Connection: close\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /startupz/ HTTP/1.0\r\n\r\n",
        b"GET /readyz HTTP/1.0\r\nHost: shop.example\r\nX-Forwarded-Proto: http\r\n\r\n",
        b"GET http://10.1.2.3/healthz HTTP/1.1\r\nHost: 10.1.2.3\r\nConnection: close\r\n\r\n",
        b"HEAD /livez HTTP/1.1\nHost: a\nConnection: close\n\n",
        # HAProxy's `option httpchk /readyz`.
        b"OPTIONS /readyz HTTP/1.0\r\n\r\n",
    ):
        assert says(port, request).startswith(b"HTTP/1.1 200 OK\r\n"), request
    # Who asks from this machine may see why.
    verbose = says(port, b"GET /readyz?verbose HTTP/1.0\r\n\r\n")
    assert b"[+]workers 2 of 2 serve" in verbose
    assert says(port, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert says(port, b"POST /readyz HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").startswith(
        b"HTTP/1.1 405 "
    )


# -- its process


def test_its_process_is_forked_again_however_it_ends_and_nobody_is_refused(one: Service) -> None:
    one.configure(EXITS)
    one.start()
    port, first = port_of(one), process_of(one)
    before = {one.pid, *settled(one, 2)}
    # By these two gunicorn's workers end a service.
    (one.directory / "exits").write_text("3 4")
    os.kill(first, signal.SIGKILL)
    while len(one.matches(r"event=probes\.restarted")) < 3:
        assert not refuses(port)
        time.sleep(0.01)
    assert statuses(port) == (200, 200, 200)
    ended = [re.search(r'ended="([^"]+)"', line)[1] for line in one.matches(r"event=probes\.restarted")]  # type: ignore[index]
    assert ended == ["killed by SIGKILL", "exit status 3", "exit status 4"]
    assert {one.pid, *settled(one, 2)} == before
    assert not one.matches("Worker .* exited")
    one.stop()
    assert refuses(port)


def test_its_process_holds_nothing_of_the_masters_and_hears_no_signal_but_the_masters_end(one: Service) -> None:
    if os.geteuid() == 0:
        # Directories that only root can read: what a worker needs is loaded before it is another user.
        one.arguments = ["--user", "65534", "--group", "65534", "--preload"]
        one.configure("import random\nrandom.seed('')\n")
    one.start()
    port, pid = port_of(one), process_of(one)
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
                signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU):  # fmt: skip
        os.kill(pid, sig)
    assert statuses(port) == (200, 200, 200)
    assert process_of(one) == pid
    assert proc.state(pid) != "Z"
    assert not [target for target in descriptors(pid).values() if target.startswith(("pipe:", "/memfd"))]
    # The listener and the loop's own pair, once the last client's is closed.
    until("its clients' end", lambda: len(sockets(pid)) == 3, one)
    if os.geteuid() == 0:
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^Uid:\t65534\t65534", status, re.MULTILINE)
    for worker in settled(one, 2):
        assert not set(descriptors(worker).values()) & {listening_on(pid, port)}
    master = one.pid
    os.kill(master, signal.SIGKILL)
    is_gone(one, port)


def sockets(pid: int) -> list[str]:
    return [target for target in descriptors(pid).values() if target.startswith("socket:")]


def listening_on(pid: int, port: int) -> str:
    """The socket that a process listens on at that port, as its descriptor names it."""
    held = set(descriptors(pid).values())
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            found = f"socket:[{fields[9]}]"
            if found in held:
                return found
    return ""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
def test_stop_now_leaves_nothing_behind(one: Service, sig: signal.Signals) -> None:
    one.start()
    port = port_of(one)
    one.signal(sig)
    one.ends(0)
    assert refuses(port)


def test_a_reload_keeps_it_answering_and_brings_a_path_that_has_changed(one: Service) -> None:
    one.start()
    port = port_of(one)
    with prober(port, LIVE):
        one.signal(signal.SIGHUP)
        one.wait_for(r"event=reload\.done")
        one.configure(readiness_path="/ready")
        one.signal(signal.SIGHUP)
        one.wait_for(r"event=reload\.done", 2)
        until("the new path", lambda: ask(port, "/ready").status == 200, one)
        until("one process", lambda: len(one.processes()) == 2 + one.workers, one)
    one.stop()


# -- clients


def rss(pid: int) -> int:
    """Megabytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def test_survives_slow_broken_and_hostile_clients_within_its_memory(one: Service) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    one.start()
    port, pid = port_of(one), process_of(one)
    assert statuses(port) == (200, 200, 200)
    before = rss(pid)
    with contextlib.ExitStack() as clients:
        idle = [clients.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(1000)]
        assert statuses(port) == (200, 200, 200)
        for sock in idle[-300:]:
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /readyz HTTP/1.1\r\nX-Slow: ")  # and no end
        assert statuses(port) == (200, 200, 200)
        # Who asks on and on, and reads nothing.
        deaf = clients.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        deaf.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                deaf.sendall(b"GET /readyz?verbose HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
        assert statuses(port) == (200, 200, 200)
        for _ in range(20):
            assert b" 431 " in says(port, b"GET / HTTP/1.1\r\nX-Long: " + b"x" * (1 << 20) + b"\r\n\r\n")[:20]
            assert says(port, os.urandom(20_000)).startswith(b"HTTP/1.1 4")
            assert b" 400 " in says(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")[:20]
            assert says(port, b"POST /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZ")
        assert statuses(port) == (200, 200, 200)
        assert len(sockets(pid)) <= 520
    assert process_of(one) == pid
    assert rss(pid) - before < 30
    assert not one.matches(r"event=internal\.error")
    assert not one.matches(r"event=probes\.restarted")


# -- its socket


def test_upgrade_under_probers_on_both_ports_loses_no_probe_and_answers_none_wrongly(probed: Service) -> None:
    probed.start()
    port = port_of(probed)
    # The last ones leave their connections silent for longer than a retirement takes.
    with prober(port), prober(port, LIVE), prober(probed.port), prober(port, think=0.5):
        for _ in range(2):
            probed.upgrade()
            probed.until_one_generation()
        until("their processes", lambda: len(probed.processes()) == 2 + probed.workers, probed)
    assert port_of(probed, 3) == port
    probed.stop()
    assert refuses(port)


def test_upgrade_to_another_address_and_to_none(one: Service) -> None:
    one.start()
    first = port_of(one)
    one.configure(probe_bind="127.0.0.2:0")
    held = HeldBy(one, 1)
    one.upgrade()
    second = re.search(r"address=127\.0\.0\.2:(\d+)", one.wait_for(r"generation=2 event=probes\.listening"))
    assert second, one.log()
    # Nobody else answers on the old one, which is still here.
    assert ask(first, READY).status == 200
    assert held.release() == 1
    one.until_one_generation()
    until("the old port's end", lambda: refuses(first), one)
    connection = http.client.HTTPConnection("127.0.0.2", int(second[1]), timeout=PATIENCE)
    connection.request("GET", READY)
    assert connection.getresponse().status == 200
    connection.close()
    one.configure(probe_bind="")
    one.upgrade()
    one.until_one_generation()
    one.until_alone()
    one.stop()


def test_failed_upgrade_costs_no_probe_and_leaves_no_process(one: Service) -> None:
    one.start()
    port = port_of(one)
    with prober(port):
        one.deploy("bad", at_import="raise RuntimeError('boom')")
        one.upgrade("upgrade.failed")
        until("one process", lambda: len(one.processes()) == 2 + one.workers, one)


def test_successor_that_dies_in_the_commit_window_costs_no_probe(one: Service) -> None:
    one.configure(WIDE_COMMIT_WINDOW).start()
    port = port_of(one)
    with prober(port) as load:
        one.signal(signal.SIGUSR2)
        master = successor(one)
        one.wait_for(r"generation=2 event=phase\.serving")
        answered_from(load, 50)
        os.kill(master, signal.SIGKILL)
        one.wait_for(r"event=upgrade\.failed")
        until("one process", lambda: len(one.processes()) == 2 + one.workers, one)


def test_retiring_generation_leaves_the_port_to_its_successor_and_takes_it_back(one: Service) -> None:
    one.start()
    port, first = port_of(one), process_of(one)
    held = HeldBy(one, 1)
    one.upgrade()
    old = next(each for each in one.generations() if each.board.header.generation == 1)
    until("an old process that accepts no more", lambda: not old.board.header.probe_accepts, one)
    assert old.snapshot().phase is Phase.RETIRING
    assert process_of(one) != first
    assert statuses(port) == (200, 200, 200)
    os.kill(one.pid, signal.SIGKILL)
    assert ask(port, LIVE).status == 200
    one.wait_for(r"event=successor\.lost")
    # Its own workers were told to leave: until others are there nobody serves, and it says so.
    until("readiness", lambda: statuses(port) == (200, 200, 200), one)
    assert process_of(one) == first
    assert held.release() == 1
    one.stop()
    assert refuses(port)


def test_old_generation_answers_again_when_the_service_stops_and_it_still_has_work(one: Service) -> None:
    one.start()
    port = port_of(one)
    held = HeldBy(one, 1)
    one.upgrade()
    one.signal(signal.SIGTERM)
    until("one generation", lambda: len(one.generations()) == 1, one)
    assert statuses(port)[:2] == (200, 503)
    assert held.release() == 1
    is_gone(one, port)


def test_keeper_does_not_hold_the_port(one: Service) -> None:
    one.configure(keep_pid=True).start()
    port, first = port_of(one), one.pid
    one.upgrade()
    one.wait_for(r"event=keeper\.started")
    until("the keeper", lambda: "zdd_web.keeper" in command_line(first), one)
    assert statuses(port) == (200, 200, 200)
    assert sockets(first) == []
    until("the old process's end", lambda: len(one.processes()) == 3 + one.workers, one)
    one.signal(signal.SIGTERM, first)
    one.ends(0)
    assert refuses(port)


# -- a start that cannot work


def test_address_in_use_ends_the_start(one: Service) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        process = one.configure(probe_bind=bind).spawn()
        assert process.wait(PATIENCE) == 1
    assert f"PROBE_BIND = '{bind}': address already in use: " in one.log()
    assert "Traceback" not in one.log()
    one.leaves_no_trace()


def test_the_apps_own_address_ends_the_start(one: Service) -> None:
    port = free_port()
    one.bind = f"127.0.0.1:{port}"
    process = one.configure(probe_bind=f"0.0.0.0:{port}").spawn()
    assert process.wait(PATIENCE) == 1
    assert f"the app itself is served there (bind 127.0.0.1:{port})" in one.log()
    assert "Traceback" not in one.log()
    one.leaves_no_trace()
