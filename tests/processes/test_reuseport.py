"""`reuseport` mode: a queue for each worker, all held by the master; and two masters that share a port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.casting import PLAYS_ALL
from tests.helpers.ports import free_port
from tests.processes.harness import (
    WORKER_CLASSES,
    Held,
    Service,
    answered_from,
    descriptors,
    generations_of,
    lost,
    serving_workers,
    settled,
    skip_unless_installed,
    until,
)
from tests.processes.test_listeners import refused
from tests.processes.test_worker_classes import deploy
from zdd_web.board import Slot
from zdd_web.board.admission import Admission
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.listeners.reuseport import bpf as kernel
from zdd_web.system import proc

Make = Callable[..., Service]


@pytest.fixture
def reuseport(make_service: Make, worker_class: str) -> Service:
    """A service in this mode, not started yet."""
    return make_service(worker_class, workers=3).configure(listener="reuseport")


#: Each has its scene; both with ZDD_WEB_TEST_CLASSES=all.
UPGRADED, RESIZED = (
    (WORKER_CLASSES, WORKER_CLASSES) if PLAYS_ALL else (["sync", "gevent", WORKER_CLASSES[-1]], ["gthread", "asgi"])
)


@pytest.mark.parametrize("worker_class", UPGRADED)
@pytest.mark.begins_first
def test_upgrades_under_load_lose_nothing_whatever_the_number_of_workers(make_service: Make, worker_class: str):
    service = make_service(skip_unless_installed(worker_class), workers=3, grace_period=15)
    # On the command line the number would be the same for ever.
    count = service.directory / "count"
    count.write_text("3")
    service.workers = 0
    service.configure("workers = int(open('count').read())\n", listener="reuseport")
    if worker_class not in ("sync", "gthread"):
        deploy(service, "1")
    service.start()
    has_queues(service, 3)
    with service.under_load(8) as load:
        for generation, workers in ((2, 5), (3, 2), (4, 3)):
            count.write_text(str(workers))
            service.upgrade()
            assert service.snapshot().generation == generation
            settled(service, workers)
            has_queues(service, workers)
        answered_from(load, 100)
    service.stop()


def has_queues(service: Service, count: int) -> None:
    """Wait until a service has so many queues, on the board and in the kernel."""

    def found() -> bool:
        names = {each.name for each in service.snapshot().listeners}
        said = names <= {f"http://127.0.0.1:{service.port}#{slot}" for slot in range(99)}
        return said and len(names) == count == len(kernel.entries(service.port, kernel.LISTEN))

    until(f"{count} queues", found, service)


def who_accepts(service: Service, slot: int) -> int:
    """Count the workers that have accepted from a queue."""
    board = service.is_active().board
    at = next(index for record, index in board.listener_records() if record.name.endswith(f"#{slot}"))
    return sum(bool(each.words[each.base + Slot.ACCEPTS_AT + at]) for each in board.used_slots())


@pytest.mark.parametrize("worker_class", RESIZED)
def test_workers_that_come_and_go_bring_and_take_their_queues(make_service: Make, worker_class: str):
    service = make_service(skip_unless_installed(worker_class), workers=2).configure(listener="reuseport")
    if worker_class not in ("sync", "gthread"):
        deploy(service, "1")
    service.start()
    with service.under_load(8) as load:
        for count in (3, 4, 3, 4, 3, 2):
            before = len(service.snapshot().listeners)
            service.signal(signal.SIGTTIN if count > before else signal.SIGTTOU)
            settled(service, count)
            has_queues(service, count)
            answered_from(load, 20)
            if count == 4:
                # Those that were forked before the queue was opened, too.
                until("all to accept from it", lambda: who_accepts(service, 3) == 4, service)
        answered_from(load, 100)
    service.stop()


def test_more_workers_than_sockets_were_bound_for_share_them_until_an_upgrade_binds_more(make_service: Make):
    service = make_service("sync", workers=2)
    count = service.directory / "count"
    count.write_text("2")
    service.workers = 0
    service.configure("workers = int(open('count').read())\n", listener="reuseport").start()
    with service.under_load(8) as load:
        for workers in range(3, 12):
            service.signal(signal.SIGTTIN)
            settled(service, workers)
        has_queues(service, 10)
        count.write_text("12")
        service.upgrade()
        settled(service, 12)
        has_queues(service, 12)
        answered_from(load, 20)
    assert not service.matches("event=listener.added")
    service.stop()


def test_workers_leave_also_while_the_queues_are_never_empty(make_service: Make):
    service = make_service("sync", workers=4).configure(listener="reuseport").start()
    settled(service, 4)
    with load_on(service.port, "/slow?seconds=0.1", clients=16) as load:
        for count in (3, 2):
            service.signal(signal.SIGTTOU)
            settled(service, count)
        has_queues(service, 2)
        answered_from(load, 50)
        assert lost(load) == []
    service.stop()


def test_whoever_has_outlived_an_elder_knows_its_queues_after_an_upgrade_too(make_service: Make):
    port = free_port()
    old = make_service("sync", workers=2).configure(listener="reuseport")
    new = make_service("sync", workers=3).configure(listener="reuseport")
    old.bind = new.bind = f"127.0.0.1:{port}"
    old.start()
    with load_on(port) as load:
        new.start()
        new.upgrade()
        old.stop()
        new.upgrade()
        new.until_one_generation()
        for count in (2, 3, 2):
            new.signal(signal.SIGTTOU if count == 2 else signal.SIGTTIN)
            settled(new, count)
            has_queues(new, count)
            answered_from(load, 50)
        assert lost(load) == []
    new.stop()


def test_a_configuration_that_gevent_has_patched_has_its_queues_too(make_service: Make):
    skip_unless_installed("gevent")
    service = make_service("gevent", workers=2)
    service.configure("from gevent import monkey\nmonkey.patch_all()\n", listener="reuseport").start()
    service.signal(signal.SIGTTIN)
    settled(service, 3)
    has_queues(service, 3)
    with service.under_load(8) as load:
        service.upgrade()
        answered_from(load, 20)
    service.stop()


def test_a_port_that_others_are_on_keeps_its_queues(make_service: Make):
    port = free_port()
    old, new = (make_service("sync", workers=2).configure(listener="reuseport") for _ in range(2))
    old.bind = new.bind = f"127.0.0.1:{port}"
    old.start()
    with load_on(port) as load:
        new.start()
        for service in (old, new):
            service.signal(signal.SIGTTIN)
            settled(service, 3)
            assert len(service.snapshot().listeners) == 2
        answered_from(load, 50)
        old.stop()
        until("a queue for the third", lambda: len(service.snapshot().listeners) == 3, new)
        # Whoever was behind them has taken the places of those that have left: the last is not the last any more.
        new.signal(signal.SIGTTOU)
        until("its end", lambda: len(service.snapshot().listeners) == 2, new)
        answered_from(load, 50)
        assert lost(load) == []
    new.stop()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGUSR2, signal.SIGTTIN])
def test_whoever_waits_in_a_queue_on_its_way_out_is_answered(make_service: Make, sig: signal.Signals):
    service = make_service("sync", workers=3).configure(listener="reuseport").start()
    settled(service, 3)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Held(service)) for _ in range(3)]
        # Each is there when one of them is in hand; a worker that is still free would empty the queues.
        until("three in hand", lambda: service.snapshot().in_flight == 3, service)
        waiting = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 30)) for _ in range(30)]
        for each in waiting:
            each.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        until("all queues used", lambda: all(each.length for each in service.snapshot().listeners), service)
        service.signal(signal.SIGTTOU)
        doors = service.is_active().board.listener_records
        until("a queue on its way out", lambda: any(each.door == Admission.STEERED for each, _ in doors()), service)
        service.signal(sig)
        if sig == signal.SIGUSR2:
            service.wait_for("event=upgrade.committed")
        assert all(each.is_answered() for each in held)
        # At once: gunicorn's sync worker waits for two seconds for a client to close.
        with ThreadPoolExecutor(len(waiting)) as pool:
            assert set(pool.map(status_and_close, waiting)) == {b"HTTP/1.1 200"}
    if sig == signal.SIGTERM:
        service.ends()
    else:
        has_queues(service, 3)
        service.stop()


def status_and_close(client: socket.socket) -> bytes:
    with client:
        return client.recv(12)


def test_every_queue_is_emptied_by_whoever_is_idle(make_service: Make):
    service = make_service("sync", workers=2).configure(listener="reuseport").start()
    settled(service, 2)
    with Held(service):
        # One of two is busy: with a queue of its own for each, half of these would wait behind it.
        assert len({service.get().pid for _ in range(30)}) == 1
    until("both queues used", lambda: all(each.accepted for each in service.snapshot().listeners), service)
    assert sum(each.accepted for each in service.snapshot().listeners) >= 31
    service.stop()


def test_workers_that_are_recycled_or_come_and_go_lose_nothing(reuseport: Service):
    reuseport.arguments = ["--max-requests", "50"]
    reuseport.start()
    with reuseport.under_load(8) as load:
        storm = (signal.SIGTTIN, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTTOU, signal.SIGTTOU, signal.SIGTTIN) * 2
        for number, sig in enumerate(storm, 1):
            reuseport.signal(sig)
            answered_from(load, 20)
            # Two that wait for the master are one.
            until("the signal", lambda n=number: len(reuseport.matches("Handling signal: tt")) == n, reuseport)
        until("some recycled workers", lambda: len(reuseport.matches("event=worker.recycled")) > 3, reuseport)
    settled(reuseport, 3)
    reuseport.stop()


def test_a_worker_that_is_killed_costs_what_it_had_accepted_and_no_more(make_service: Make):
    service = make_service("sync", workers=3).configure(listener="reuseport").start()
    with service.under_load(8, may_lose=True) as load:
        victim = serving_workers(service)[0]
        os.kill(victim, signal.SIGKILL)
        settled(service, 3, [victim])
        answered_from(load, 100)
    # A sync worker has one in hand.
    assert len(lost(load)) <= 1
    service.stop()


def test_a_stop_resets_nobody_who_waits(reuseport: Service):
    reuseport.start()
    with reuseport.under_load(16, may_lose=True) as load:
        reuseport.stop()
        until("a refusal", lambda: any(each.outcome.name == "REFUSED" for each in load.samples), reuseport)
    bad = {each.outcome.name for each in lost(load)}
    assert bad <= {"REFUSED"}, bad


# -- two masters that know nothing of each other


def unprivileged() -> list[str]:
    """Return what starts a command without any capability, where that is possible."""
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []


@contextlib.contextmanager
def load_on(port: int, path: str = "/", clients: int = 8) -> Iterator[LoadThread]:
    load = LoadThread(Load("127.0.0.1", port, (path,), clients, 0.5, 0.1, 20.0, pace=0.1))
    with load:
        answered_from(load, 50)
        yield load


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1)])
def test_two_masters_share_a_port_and_the_one_that_stops_loses_nothing(
    make_service: Make, worker_class: str, sizes: tuple[int, int]
):
    port = free_port()

    def another(number: int) -> Service:
        service = make_service(worker_class, workers=sizes[number % 2])
        service.bind = f"127.0.0.1:{port}"
        service.launcher = [*unprivileged(), *service.launcher]
        service.configure(listener="reuseport", generation_header="X-Zdd-Generation")
        return service.start()

    old = another(0)
    with load_on(port) as load:
        for number in range(1, 5):
            new = another(number)
            answered_from(load, 50)
            old.stop()
            assert old.matches("event=listener.steered"), old.log()
            answered_from(load, 50)
            old = new
        # The last to come goes first: a rollback.
        back = another(5)
        answered_from(load, 50)
        back.stop()
        assert back.matches("event=listener.steered"), back.log()
        answered_from(load, 50)
        assert lost(load) == [], (lost(load), old.log(), new.log())
        assert generations_of(load) == {1}
    old.stop()


FORKS = """
    import os, time

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/fork" and os.fork() == 0:
            with open("forked", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
"""


@pytest.mark.parametrize("beside", [False, True])
def test_a_child_of_the_apps_that_lives_on_keeps_nobody_waiting(make_service: Make, beside: bool):
    port = free_port()
    services = [make_service("sync", workers=2).configure(listener="reuseport") for _ in range(2)]
    for service in services:
        service.bind = f"127.0.0.1:{port}"
        service.write_app(FORKS)
    old, new = services
    old.start()
    assert old.get("/fork").status == 200
    child = int(until("the child", lambda: (found := old.directory / "forked").exists() and found.read_text(), old))
    try:
        if beside:
            new.start()
        master = old.pid
        old.signal(signal.SIGTERM)
        until("its end", lambda: proc.state(master) in ("", "Z"), old)
        if not beside:
            new.start()
        # It has copies of all that the worker had.
        assert any("socket:" in each for each in descriptors(child).values())
        assert {new.get(timeout=5).status for _ in range(40)} == {200}
        assert len(kernel.entries(port, kernel.LISTEN)) == 2
    finally:
        os.kill(child, signal.SIGKILL)
    new.stop()


def test_others_on_the_port_are_named_at_the_start(make_service: Make):
    with socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        first = make_service("sync", workers=2).configure(listener="reuseport")
        first.bind = f"127.0.0.1:{theirs.getsockname()[1]}"
        first.start()
        assert "WARNING" in first.wait_for(rf"event=listener.shared port={first.port} others=1 unknown=1")
    second = make_service("sync", workers=2).configure(listener="reuseport")
    second.bind = f"127.0.0.1:{first.port}"
    second.start()
    assert "INFO" in second.wait_for("event=listener.shared .*others=2 unknown=0")
    second.stop()
    first.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="without CAP_NET_ADMIN a stop may reset a few")
def test_two_masters_that_stop_at_once_reset_nobody(make_service: Make):
    port = free_port()
    both = [make_service("sync", workers=2).configure(listener="reuseport") for _ in range(2)]
    for service in both:
        service.bind = f"127.0.0.1:{port}"
        service.start()
    with LoadThread(Load("127.0.0.1", port, ("/",), 8, 0.5, 0.02, 20.0)) as load:
        answered_from(load, 50)
        for service in both:
            service.signal(signal.SIGTERM)
        for service in both:
            service.ends()
        until("a refusal", lambda: any(each.outcome.name == "REFUSED" for each in load.samples))
    assert {each.outcome.name for each in lost(load)} <= {"REFUSED"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_port_of_another_user_is_named_with_the_user(make_service: Make):
    service = make_service("sync").configure(listener="reuseport")
    with socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        theirs.bind(("127.0.0.1", 0))
        os.seteuid(65534)
        try:
            with socket.socket() as taken:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                os.seteuid(0)
                service.bind = f"127.0.0.1:{taken.getsockname()[1]}"
                assert "nobody (65534)" in refused(service)
        finally:
            os.seteuid(0)


def test_binds_that_cannot_share_a_port_are_refused(make_service: Make):
    port = free_port()
    for binds, said in (
        ([f"unix:{os.devnull}"], "a Unix socket"),
        ([f"0.0.0.0:{port}", f"[::]:{port}"], "bound by another address too"),
        ([f"127.0.0.1:{port}", f"0.0.0.0:{port}"], "bound by another address too"),
        (["fd://7"], "a descriptor"),
    ):
        service = make_service("sync")
        service.bind = None
        service.configure(f"bind = {binds!r}\n", listener="reuseport")
        assert said in refused(service)


def test_a_master_on_an_address_that_covers_this_one_is_named(make_service: Make):
    first = make_service("sync", workers=1).configure(listener="reuseport").start()
    second = make_service("sync", workers=1).configure(listener="reuseport")
    second.bind = f"[::]:{first.port}"
    assert "covers this one" in refused(second)
    first.stop()
    with socket.create_server(("127.0.0.1", 0)) as plain:
        third = make_service("sync", workers=1).configure(listener="reuseport")
        third.bind = f"127.0.0.1:{plain.getsockname()[1]}"
        assert "without SO_REUSEPORT" in refused(third)


def test_gunicorns_own_reuse_port_stays_refused(make_service: Make):
    service = make_service("sync").configure(listener="reuseport")
    service.arguments = ["--reuse-port"]
    assert "reuse_port" in refused(service)
