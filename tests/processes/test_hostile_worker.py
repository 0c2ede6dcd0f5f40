"""A worker that has been taken over: arbitrary code as the workers' user, with all that a worker inherits.

The master is root and the workers are nobody's, as with gunicorn's `user`. The app below tries what it can against the
master, its board, the probe port's process, the keeper and a stranger's process; SECURITY.md says what is left to it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.processes.harness import Service, answered_from, until
from zdd_web.board import WorkerState
from zdd_web.system import proc

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the workers another user")

#: Preloaded: nobody cannot read the tests' directories.
CONF = f"""
user, group, preload_app, worker_tmp_dir = {NOBODY}, {NOBODY}, True, "/tmp"
"""

APP = """
import ctypes, fcntl, json, mmap, os, signal, sys, time
import zdd_web
from zdd_web import process
from zdd_web.board import Slot
from zdd_web.wsgi import ProbeMiddleware

LARGEST = 2**64 - 1
libc = ctypes.CDLL(None, use_errno=True)

def outcome(attack):
    # In a child, which has all that the worker has: most of these end the process that tries.
    pid = os.fork()
    if pid == 0:
        for sig in (signal.SIGSEGV, signal.SIGBUS):
            signal.signal(sig, signal.SIG_DFL)
        status = 99
        try:
            attack()
            status = 0
        except OSError as error:
            status = error.errno
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def boards():
    links = {fd: f"/proc/self/fd/{fd}" for fd in map(int, os.listdir("/proc/self/fd"))}
    return [fd for fd, link in links.items() if os.path.islink(link) and "memfd:zdd_web:" in os.readlink(link)]

def address():
    with open("/proc/self/maps") as maps:
        return next(int(line.partition("-")[0], 16) for line in maps if "/memfd:zdd_web:" in line)

def store(words, at, value):
    words[at] = value

def attacks():
    board = process.current().board
    header, own = board.header, process.current().slot
    words = header.words
    yield "the phase", lambda: store(words, 8, 99)
    yield "the master's pid", lambda: store(words, 5, 1)
    yield "the workers' number", lambda: store(words, 50, LARGEST)
    yield "its own order", lambda: store(words, own.order.base, 1)
    for index in range(8):
        if board.slot(index).base != own.base:
            yield f"slot {index}", lambda index=index: store(words, board.slot(index).base, 1)
    yield "the last page", lambda: store(words, len(words) - 1, 1)

    def unprotect():
        if libc.mprotect(ctypes.c_void_p(address()), 4096, 3):
            raise OSError(ctypes.get_errno(), "mprotect")
    yield "mprotect", unprotect

    def write_memory():
        fd = os.open("/proc/self/mem", os.O_RDWR)
        os.pwrite(fd, bytes(8), address())
    yield "/proc/self/mem", write_memory

    for fd in boards():
        yield f"map {fd}", lambda fd=fd: mmap.mmap(fd, mmap.PAGESIZE)
        yield f"write {fd}", lambda fd=fd: os.pwrite(fd, bytes(8), 0)
        yield f"cut {fd}", lambda fd=fd: os.ftruncate(fd, 0)
        yield f"grow {fd}", lambda fd=fd: os.ftruncate(fd, 1 << 30)
        yield f"seal {fd}", lambda fd=fd: fcntl.fcntl(fd, 1033, 8)

        def reopen(fd=fd):
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            mmap.mmap(again, mmap.PAGESIZE)
        yield f"reopen {fd}", reopen
    yield "kill the master", lambda: os.kill(header.master_pid, 0)
    for name in ("request", "history"):
        number = getattr(header, f"{name}_fd")

        def open_master(number=number):
            os.open(f"/proc/{header.master_pid}/fd/{number}", os.O_RDWR)
        yield f"open the {name} of the master", open_master

        def have(name=name):
            links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            links = [os.readlink(link) for link in links if os.path.islink(link)]
            maps = open("/proc/self/maps").read()
            if not any(f"zdd_web-{name}" in text for text in (*links, maps)):
                raise PermissionError(13, "it has none")
        yield f"have the {name}", have

def claim(what, argument):
    # What stands in its own slot, and can be anything.
    slot = process.current().slot
    words = slot.words
    if what == "everything":
        for at in range(slot.base, slot.base + Slot.WORDS):
            words[at] = int(argument)
    elif what == "pid":
        pid, start = map(int, argument.split(","))
        slot.pid, slot.start = pid, start
    elif what == "state":
        words[slot.base + 2] = int(argument)

def app(environ, start_response):
    path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
    said = "ok"
    if path == "/try":
        said = json.dumps({name: outcome(attack) for name, attack in attacks()})
    elif path.startswith("/claim/"):
        claim(path[7:], query)
    elif path == "/beat":
        # A worker that never leaves: it has its main thread, and obeys nothing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        slot = process.current().slot
        while True:
            slot.words[slot.base + 2] = 4
            slot.beat_at = time.monotonic_ns()
            time.sleep(0.05)
    body = f"{said}|{os.getuid()}|{os.getpid()}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

app = ProbeMiddleware(app)
"""

#: A worker of a new generation, which runs before it is ready: it names somebody else's process as itself, and hangs.
FORGES_AND_HANGS = """
def post_worker_init(worker):
    from zdd_web import process
    slot = process.current().slot
    slot.pid, slot.start = {pid}, {start}
    slot.words[slot.base + 2] = 1
    print("forged", flush=True)
    import time
    while True:
        worker.tmp.notify()
        time.sleep(0.05)
"""


@contextmanager
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of root's that has nothing to do with the service."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        yield process
        assert process.poll() is None, "somebody else's process was ended"
    finally:
        process.kill()
        process.wait()


def start(service: Service, **settings: object) -> Service:
    service.write_app(APP)
    return service.configure(CONF, **settings).start()


def ask(service: Service, path: str) -> tuple[str, int]:
    """Return what the app says and the pid of the worker, which is nobody's."""
    said, uid, pid = service.get(path).body.split("|")
    assert int(uid) == NOBODY
    return said, int(pid)


def test_a_worker_can_write_its_own_slot_and_nothing_else(make_service):
    service = start(make_service("gthread"))
    outcomes = json.loads(ask(service, "/try")[0])
    stores = {name for name in outcomes if name.startswith(("slot", "the ", "its "))}
    assert {name: outcomes[name] for name in stores} == dict.fromkeys(stores, -signal.SIGSEGV)
    assert len(stores) >= 12
    rest = {name: code for name, code in outcomes.items() if name not in stores}
    assert {"open the request of the master", "have the request", "have the history"} <= set(rest)
    assert any(name.startswith("map ") for name in rest)
    refused = {errno.EPERM, errno.EACCES, errno.EIO, errno.EFAULT, errno.EBUSY}
    assert {name: code for name, code in rest.items() if code not in refused} == {}
    service.stop()


@pytest.mark.parametrize("value", [2**64 - 1, 99, 0])
def test_whatever_a_worker_claims_the_master_obeys_and_says_the_truth(make_service, value: int):
    service = start(make_service("gthread"), probe_bind="127.0.0.1:0", recycle_timeout=1)
    with bystander():
        ask(service, f"/claim/everything?{value}")
        # It has turned since, and all readers have had a look.
        ticks = service.is_active().board.header.tick_at
        until("ticks", lambda: service.is_active().board.header.tick_at > ticks, service)
        assert service.get("/livez").status == 200
        assert service.run("status", "--name", service.name, "--json").returncode == 0
        service.upgrade()
        until("two workers that serve", lambda: serving(service) == 2, service)
        assert service.matches("internal.error") == []
        service.stop(status=None)


def serving(service: Service) -> int:
    return sum(worker.state is WorkerState.SERVING for worker in service.snapshot().workers)


@pytest.mark.parametrize("settings", [{}, {"keep_pid": True}])
def test_a_failed_upgrade_signals_no_process_that_a_worker_names(make_service, settings: dict[str, object]):
    service = start(make_service("gthread"), upgrade_timeout=12, **settings)
    with bystander() as victim:
        conf = FORGES_AND_HANGS.format(pid=victim.pid, start=proc.start_time(victim.pid))
        service.configure(CONF + conf)
        service.upgrade(expect="upgrade.failed")
        # What it printed is relayed beside that line.
        service.wait_for("forged", times=2)
        service.configure(CONF)
        service.stop()


def test_the_keeper_signals_no_process_that_a_worker_names(make_service):
    service = start(make_service("gthread"), keep_pid=True)
    kept = service.pid
    with bystander() as victim:
        service.upgrade()
        service.wait_for("event=keeper.started")
        ask(service, f"/claim/pid?{victim.pid},{proc.start_time(victim.pid)}")
        service.signal(signal.SIGKILL)
        until("the keeper's end", lambda: not proc.alive(kept, proc.start_time(kept)), service)
        service.ends(status=None)


def leaving(service: Service) -> int:
    """Return the pid of a worker that says it leaves, 0 for none."""
    return next((each.pid for each in service.snapshot().workers if each.state is WorkerState.LEAVING), 0)


def test_a_worker_that_only_says_that_it_leaves_is_replaced_and_killed(make_service):
    service = start(make_service("sync"), recycle_timeout=0.2, grace_period=6)
    before = {worker.pid for worker in service.snapshot().workers}
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"GET /beat HTTP/1.1\r\nHost: localhost\r\n\r\n")
        hostile = until("a worker that leaves", lambda: leaving(service), service)
        with service.under_load() as load:
            line = service.wait_for("event=worker.overdue")
            assert f"pid={hostile}" in line
            until("its end", lambda: not proc.state(hostile).strip("Z"), service)
            answered_from(load, 50)
    after = {worker.pid for worker in service.snapshot().workers}
    assert len(before & after) == 1
    service.stop()
