"""Steps of the random walk that attack: hostile workers, bad releases, pauses, floods, forgeries.

Each is a function of the walk, as those of random_walk.py. What an attack may cost is excused there (a worker that was
taken over, or that crashes, loses the requests that it has in hand); everything else that the walk looks at must hold.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zdd_web.board import UpgradeState
from zdd_web.system import proc

if TYPE_CHECKING:
    from tests.soak.random_walk import Walk
    from zdd_web.service import Generation

NOBODY = 65534

#: Appended to the app: what code in a worker can do to its slot, and a child of the app that is ended by SIGTERM.
HOSTILE_VIEWS = """
def hostile(application):
    import signal
    from zdd_web import process
    from zdd_web.board import Slot

    def claim(value):
        slot = process.current().slot
        for at in range(slot.base, slot.base + Slot.WORDS):
            slot.words[at] = value

    def fork():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)

    def answer(environ, start_response):
        path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        slot = process.current().slot
        if path == "/claim/everything":
            claim(int(query))
        elif path == "/claim/state":
            slot.words[slot.base + 2] = int(query)
        elif path == "/claim/pid":
            slot.pid, slot.start = map(int, query.split(","))
        elif path == "/fork":
            fork()
        return application(environ, start_response)

    return answer

app = hostile(app)
"""

#: Statements that a release runs at import, in generations from {first} on; the generation that serves is not harmed.
BAD_RELEASES = {
    "crashes after the gate": "after_the_gate(lambda: os.kill(os.getpid(), signal.SIGSEGV))",
    "freezes after the gate": "after_the_gate(lambda: os.kill(os.getpid(), signal.SIGSTOP))",
    "names a bystander": "names_a_bystander()",
}
BAD_RELEASE = """
import threading
from zdd_web import process
from zdd_web.board import WorkerState

def after_the_gate(do):
    def wait():
        while process.current().slot is None or process.current().slot.state != WorkerState.SERVING:
            time.sleep(0.01)
        time.sleep(0.3)
        do()
    threading.Thread(target=wait, daemon=True).start()

def names_a_bystander():
    slot = process.current().slot
    slot.pid, slot.start = {bystander}
    time.sleep(600)

if zdd_web.generation() >= {first}:
    {do}
"""

#: Put before a configuration: the new master prints until it is ended.
PRINTS_WITHOUT_END = "import os\nwhile True:\n    os.write(2, b'noise ' * 10000 + b'\\n')\n"

#: The log, and the memory of the master that serves, may grow by so much meanwhile, bytes.
NOISE_AT_MOST = 32 << 20

#: The holder of a forged board: another user's process.
FORGER = """
import os, sys
content = sys.stdin.buffer.read()
fd = os.memfd_create("zdd_web:" + sys.argv[1])
os.write(fd, content)
print("forged", flush=True)
import time
time.sleep(600)
"""


class Bystander:
    """A process that has nothing to do with the service, and that nothing may end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self.start = proc.start_time(self.process.pid)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# -- workers


def worker_claims(walk: Walk) -> None:
    """Have a worker write what is not so on its slot; one whose state makes no sense is replaced, others are killed."""
    what, argument = walk.dice.choice(
        (
            ("everything", "99"),
            ("everything", str(2**64 - 1)),
            ("everything", "0"),
            ("state", "99"),
            ("pid", f"{walk.bystander.process.pid},{walk.bystander.start}"),
            ("pid", f"{os.getpid()},{proc.start_time(os.getpid())}"),
        )
    )
    lives_for = walk.dice.choice((0.0, 0.5, 1.5))
    with contextlib.suppress(Exception):
        reply = walk.service.get(f"/claim/{what}?{argument}", timeout=5)
        walk.say(f"worker {reply.pid} claims {what} = {argument}")
        start = proc.start_time(reply.pid)
        walk.excuse_until_gone(f"worker {reply.pid} claims", reply.pid, start)
        if what == "state":
            return  # the master ends it
        time.sleep(lives_for)
        proc.kill(reply.pid, start, signal.SIGKILL)


def child_of_the_app(walk: Walk) -> None:
    walk.say("children of the app are ended by SIGTERM")
    for _ in range(3):
        with contextlib.suppress(OSError, http.client.HTTPException):
            walk.service.get("/fork", timeout=5)


# -- releases


def bad_release(walk: Walk) -> None:
    """Deploy what passes its start, or not even that, and must not come into office."""
    name = walk.dice.choice(sorted(BAD_RELEASES))
    office = walk.idle_office()
    if office is None or walk.may_be_down:
        return
    where = (walk.bystander.process.pid, walk.bystander.start)
    began, first = time.monotonic(), office.board.header.generation + 1
    walk.say(f"a release that {name}")
    walk.deploy_text(BAD_RELEASE.format(first=first, bystander=where, do=BAD_RELEASES[name]))
    try:
        _is_rejected(walk, office, f"a release that {name}")
    finally:
        walk.deploy("good")
    if name.endswith("after the gate"):
        # What these workers had accepted is lost, whatever becomes of their generation.
        walk.excuse(f"a release that {name}", began, time.monotonic())
    if name.startswith("freezes"):
        # gunicorn's `timeout` may have found its workers before the upgrade failed.
        walk.ever_stopped.update(timed_out(walk))


def release_that_prints(walk: Walk) -> None:
    """Deploy a configuration that prints without end: it takes neither the memory of the host nor the log."""
    office = walk.idle_office()
    if office is None or walk.may_be_down:
        return
    conf = walk.service.directory / "gunicorn.conf.py"
    good, before = conf.read_text(), _weight(walk, office.pid)
    walk.say("a release that prints without end")
    try:
        conf.write_text(PRINTS_WITHOUT_END)
        _is_rejected(walk, office, "a release that prints without end")
        if office.alive and (grown := _weight(walk, office.pid) - before) > NOISE_AT_MOST:
            walk.violated(f"a release that prints without end has cost {grown} bytes of memory and log")
    finally:
        conf.write_text(good)


def _is_rejected(walk: Walk, office: Generation, what: str) -> None:
    header = office.board.header
    number = header.upgrade_number
    under_way = (UpgradeState.BOOTING, UpgradeState.COMMITTING)
    with contextlib.suppress(ProcessLookupError):
        os.kill(office.pid, signal.SIGUSR2)
    walk.until(
        f"the end of an upgrade to {what}",
        lambda: not office.alive or (header.upgrade_number != number and header.upgrade_state not in under_way),
    )
    if office.alive and header.upgrade_state not in (UpgradeState.FAILED, UpgradeState.REFUSED):
        walk.violated(f"{what} is in office: {UpgradeState(header.upgrade_state).name}")


def _weight(walk: Walk, pid: int) -> int:
    """Memory of a master, what it holds in memory files included, and the size of the log; bytes."""
    size = walk.service.log_file.stat().st_size
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                size += int(line.split()[1]) << 10
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if "/memfd:" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                    size += os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * 512
    return size


# -- the host


def pause(walk: Walk) -> None:
    """Stop the whole tree for longer than gunicorn's `timeout`, as a paused virtual machine does."""
    walk.say("all processes are paused")
    paused: list[int] = []
    while new := [pid for pid in walk.service.processes() if pid not in paused and pid not in walk.stopped]:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        paused += new
    time.sleep(walk.dice.choice((1.0, 6.5)))
    walk.dice.shuffle(paused)
    for pid in paused:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def timed_out(walk: Walk) -> list[int]:
    """Return the workers that gunicorn's `timeout` has ended."""
    return [int(pid) for pid in re.findall(r"WORKER TIMEOUT \(pid:(\d+)\)", walk.service.log())]


# -- clients


@contextlib.contextmanager
def _connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                made.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2)))
        yield made


def probe_flood(walk: Walk) -> None:
    """Pipeline requests for metrics on eight connections and see that the probe port answers beside them."""
    found = re.findall(r"event=probes\.listening address=\S+:(\d+) ", walk.service.log())
    if not found or walk.may_be_down:
        return
    walk.say("a flood of pipelined requests at the probe port")
    port = int(found[-1])
    with _connections(port, 8) as flood:
        for client in flood:
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n" * 500)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/livez")
            connection.getresponse().read()
        except OSError as error:
            walk.violated(f"/livez beside a flood: {error!r}")
        finally:
            connection.close()


def lazy_clients_in_a_lame_duck(walk: Walk) -> None:
    """Stop the service while clients that never close their connections ask."""
    office = walk.idle_office()
    if office is None or walk.may_be_down:
        return
    walk.wake()
    start = office.board.header.master_start
    walk.say(f"SIGTERM to the master in office {office.pid}, and lazy clients")
    walk.goes_down(finishes=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(office.pid, signal.SIGTERM)
    with _connections(walk.service.port, 24) as lazy:
        for client in lazy:
            with contextlib.suppress(OSError):
                client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        for client in lazy:
            with contextlib.suppress(OSError):
                client.recv(4096)
        walk.until("the end beside lazy clients", lambda: not proc.alive(office.pid, start), walk.grace_period + 4)


# -- mistakes and forgeries


def second_start(walk: Walk) -> None:
    """Start the service again by mistake: it fails, and the one that runs is as it was."""
    office = walk.idle_office()
    if office is None or walk.may_be_down:
        return
    walk.say("a second start")
    service = walk.service
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with (service.directory / "second").open("ab") as log:
        second = subprocess.Popen(
            service.command(), cwd=service.directory, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    walk.commands.append(second)
    walk.until("the end of a second start", lambda: second.poll() is not None)
    if second.returncode == 0 and office.alive:
        walk.violated(f"a second start has ended with status 0: {(service.directory / 'second').read_text()}")


def forged_board(walk: Walk) -> None:
    """Have another user's process hold a board of this service's name; the commands must not believe it."""
    office = walk.masters().get("office")
    if os.geteuid() != 0 or office is None:
        return
    content = walk.dice.choice((b"", b"\0" * 4096, b"\xff" * 65536, bytes(office.board.memory)))
    walk.say(f"a forged board of {len(content)} bytes")
    forger = subprocess.Popen(
        ["/usr/bin/env", "python3", "-c", FORGER, walk.service.name],
        user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    walk.forgers.append(forger)
    assert forger.stdin is not None and forger.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        forger.stdin.write(content)
        forger.stdin.close()
    if forger.stdout.readline() != b"forged\n":
        return
    done = walk.service.run("status", "--json", "--name", walk.service.name)
    if done.returncode == 0 and forger.pid in [each["master_pid"] for each in json.loads(done.stdout)["generations"]]:
        walk.violated(f"status believes the forger {forger.pid}")


ATTACKS: list[tuple[int, Callable[[Walk], None]]] = [
    (3, worker_claims),
    (1, child_of_the_app),
    (4, bad_release),
    (1, release_that_prints),
    (2, pause),
    (1, probe_flood),
    (1, lazy_clients_in_a_lame_duck),
    (1, second_start),
    (1, forged_board),
]
