"""A random walk through signals, kills, standstills, deploys and attacks (attacks.py), under load.

    python -m tests.soak.random_walk --sequences 200 --seed 1 [--start 17] [--worker-class gthread]

Each sequence is a service of its own, from its own random numbers: `--seed S --start N --sequences 1` repeats one.
The decisions repeat exactly, the moments do not: what a step meets depends on the machine.

After every step somebody answers, unless a step may have ended the service; then the walk sees that all of it is gone
and starts it again. After some steps, and at the end, the walk puts good code on disk, wakes whoever stands still,
waits until the service has settled, and looks:

- one generation, serving, with all its workers; the pid file names its master; `zdd-web status --json` agrees
- every process with the service's marker is that master or a worker on its board
- every command `zdd-web upgrade` has ended
- no request was lost, except those that a worker had when it was killed, ended at once or taken over, and those that
  were begun while the service was meant to be down
- nothing has ended a process that is not the service's, and gunicorn's `timeout` no worker that had not stood still

The first violation prints the seed, the steps and the log, and ends the walk with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.ports import free_port
from tests.processes.harness import APP, Service, lost
from tests.soak.attacks import ATTACKS, HOSTILE_VIEWS, Bystander, timed_out
from zdd_web import service as finder
from zdd_web.board import UpgradeState, WorkerState
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Sample
from zdd_web.lifecycle import Phase
from zdd_web.system import proc

#: Longer than anything that the walk starts takes: UPGRADE_TIMEOUT 2, gunicorn's `timeout` 5, the stale successor's 15.
ANSWER_WITHIN = 20.0
SETTLE_WITHIN = 45.0
#: A connection is counted to what happened to its server this many seconds around it.
SLACK = 0.3
#: So much of a log is printed with a violation, characters.
LOG_SHOWN = 200_000

CODE = {
    "good": "",
    "slow": "time.sleep(0.7)",
    "import_error": "raise ImportError('boom at import')",
    "hang": "time.sleep(600)",
}


class Violation(Exception):
    """What was promised and is not so."""


@dataclass(frozen=True)
class Window:
    """A time in which requests may be lost: those that were in hand in it or, from a stop on, begun in it."""

    why: str
    began: float
    ended: float
    begun_only: bool = False

    def excuses(self, sample: Sample) -> bool:
        if self.begun_only:
            return self.began - SLACK <= sample.started <= self.ended + SLACK
        return sample.started <= self.ended + SLACK and sample.ended >= self.began - SLACK


class Walk:
    """One sequence of steps on one service."""

    grace_period = 8.0

    def __init__(self, directory: Path, dice: random.Random, worker_class: str) -> None:
        self.dice = dice
        self.steps: list[str] = []
        self.version, self.kind = 1, "good"
        self.windows: list[Window] = []
        self.may_be_down = False
        self.down_since: float | None = None
        self.begun_only = False
        self.stopped: dict[int, float] = {}
        self.ever_stopped: set[int] = set()
        self.bystander = Bystander()
        self.forgers: list[subprocess.Popen[Any]] = []
        self.commands: list[subprocess.Popen[Any]] = []
        self.watching: list[threading.Thread] = []
        self.pool = ThreadPoolExecutor(8)
        self.starts = 0
        self.service = Service(
            directory, worker_class, upgrade_timeout=2, grace_period=self.grace_period, recycle_timeout=3,
            drain_delay=dice.choice((0, 0, 1)), generation_header="X-Zdd-Generation", probe_bind="127.0.0.1:0",
        )  # fmt: skip
        self.service.write_conf("from zdd_web.gunicorn import install\ninstall(globals(), {settings})")
        self.service.port = free_port()
        self.service.bind = f"127.0.0.1:{self.service.port}"
        # Long: a machine so busy that a client pauses for two seconds would meet gunicorn's own keep-alive timeout.
        self.service.arguments = ["--timeout", "5", "--keep-alive", "30", "--graceful-timeout", "5"]
        self.load = LoadThread(
            Load(
                "127.0.0.1", self.service.port, ("/", "/", "/slow?seconds=0.2"), 4, 0.5, 0.02, ANSWER_WITHIN, pace=0.02
            )
        )

    def say(self, text: str) -> None:
        self.steps.append(f"{time.strftime('%H:%M:%S')} {text}")

    # -- the walk

    def run(self, length: int) -> None:
        self.start()
        with self.load:
            for _ in range(length):
                step = self.dice.choices(STEPS, [weight for weight, _ in STEPS])[0][1]
                step(self)
                time.sleep(self.dice.choice((0, 0, 0.05, 0.3, 1.0)))
                self.somebody_answers()
                if self.dice.random() < 0.15:
                    self.settle()
            self.settle()
        self.nothing_was_lost()
        self.end()

    def start(self) -> None:
        self.starts += 1
        service = self.service
        service.log_file = service.directory / f"log{self.starts}"
        self.deploy("good")
        process = service.spawn()
        self.until("a start", lambda: service.matches(r"event=phase\.serving") or process.poll() is not None)
        if process.poll() is not None:
            raise Violation(f"the service did not start: status {process.poll()}")

    def end(self) -> None:
        service = self.service
        service.signal(signal.SIGTERM)
        self.until("the end of all processes", lambda: not service.processes())
        if service.is_open():
            raise Violation("the port is open after the stop")
        if service.pid_file.exists():
            raise Violation(f"the pid file is there after the stop: {service.pid_file.read_text()!r}")
        left = sorted(path.name for path in service.directory.glob(".*.zdd_web"))
        if left:
            raise Violation(f"left behind: {left}")

    def until(self, what: str, probe: Callable[[], object], patience: float = SETTLE_WITHIN) -> None:
        deadline = time.monotonic() + patience
        while not probe():
            if time.monotonic() > deadline:
                raise Violation(f"waited {patience:g} s for {what}")
            time.sleep(0.02)

    def deploy(self, kind: str) -> None:
        self.version += 1
        self.kind = kind
        self.deploy_text(CODE[kind])

    def deploy_text(self, at_import: str) -> None:
        """Put an app on disk that runs these statements at import, in one step: a worker may load it at any moment."""
        text = textwrap.dedent(APP).replace('VERSION = "1"', f'VERSION = "{self.version}"\n{at_import}\n')
        new = self.service.directory / "app.new"
        new.write_text(text + HOSTILE_VIEWS)
        new.replace(self.service.directory / "app.py")

    # -- who is there

    def masters(self) -> dict[str, finder.Generation]:
        """The masters by their part: "office", "successor" (not yet in office), "old"."""
        found: dict[str, finder.Generation] = {}
        generations = [each for each in self.service.generations() if each.alive]
        if not generations:
            return {}
        office = finder.is_active(generations)
        for each in generations:
            if each is office:
                found["office"] = each
            elif each.board.header.generation < office.board.header.generation:
                found["old"] = each
            else:
                found["successor"] = each
        return found

    def a_master(self) -> tuple[str, finder.Generation] | None:
        masters = sorted(self.masters().items())
        return self.dice.choice(masters) if masters else None

    def a_worker(self) -> tuple[int, int] | None:
        chosen = self.a_master()
        if chosen is None:
            return None
        workers = [(each.pid, each.start) for each in chosen[1].snapshot().workers if each.pid]
        return self.dice.choice(workers) if workers else None

    def idle_office(self) -> finder.Generation | None:
        """The master in office once no upgrade is under way; None if that does not come soon."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            masters = self.masters()
            office = masters.get("office")
            under_way = (UpgradeState.BOOTING, UpgradeState.COMMITTING)
            if office and "successor" not in masters and office.board.header.upgrade_state not in under_way:
                return office
            time.sleep(0.02)
        return None

    def violated(self, text: str) -> None:
        raise Violation(text)

    def excuse(self, why: str, began: float, ended: float) -> None:
        self.windows.append(Window(why, began, ended))

    def can_answer(self) -> bool:
        """Whether any worker serves that is not stopped."""
        workers = [worker for each in self.service.generations() for worker in each.snapshot().workers]
        return any(each.state is WorkerState.SERVING and proc.state(each.pid) not in ("", "T", "Z") for each in workers)

    # -- invariants

    def somebody_answers(self) -> None:
        deadline = time.monotonic() + ANSWER_WITHIN
        error: Exception | None = None
        while time.monotonic() < deadline:
            if self.may_be_down and not self.service.processes():
                self.restart()
                return
            self.wake_orphans()
            if self.kind not in ("good", "slow") and not self.can_answer():
                # The last worker was ended while what is on disk cannot replace it: nobody promised anything.
                self.say("(mends the code)")
                self.deploy("good")
                self.wake()
                deadline = time.monotonic() + SETTLE_WITHIN
            try:
                reply = self.service.get(timeout=max(0.1, deadline - time.monotonic()))
                if reply.status == 200:
                    return
            except Exception as failure:
                error = failure
            time.sleep(0.05)
        raise Violation(f"nobody answered within {ANSWER_WITHIN:g} s: {error!r}; may be down: {self.may_be_down}")

    def restart(self) -> None:
        self.say("(down; starts again)")
        self.wake()
        if self.service.is_open():
            raise Violation("the service is gone and its port is open")
        self.may_be_down = False
        self.start()
        assert self.down_since is not None
        self.windows.append(Window("down", self.down_since, time.monotonic(), self.begun_only))
        self.down_since, self.begun_only = None, False

    def goes_down(self, *, finishes: bool) -> None:
        """Note that a step may end the service; `finishes` if what was begun before is finished."""
        if self.down_since is None:
            self.down_since, self.begun_only = time.monotonic(), finishes
        self.begun_only &= finishes
        self.may_be_down = True

    def wake(self) -> None:
        for pid, since in list(self.stopped.items()):
            if proc.state(pid) in ("", "Z"):
                self.windows.append(Window(f"{pid} stood still and was killed", since, time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            del self.stopped[pid]

    def wake_orphans(self) -> None:
        """Send SIGCONT to what stands still and has lost its master, as whatever has sent it SIGTERM does.

        A release may stop its own workers (attacks.py), and its master, and that of the old generation, be killed by
        the step that follows: nothing of the service is left then that could end them.
        """
        for pid in self.service.processes():
            if proc.state(pid) == "T" and proc.parent(pid) == 1:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def settle(self) -> None:
        self.deploy("good")
        self.wake()
        self.say("settle")
        self.until("the service to settle", lambda: self._restarted_if_down() or self.is_settled())
        for thread in self.watching:
            thread.join(SETTLE_WITHIN)
        self.until("the end of the commands", lambda: all(each.poll() is not None for each in self.commands))
        # A command may have begun another upgrade meanwhile.
        self.until("the service to settle", lambda: self._restarted_if_down() or self.is_settled())
        self.may_be_down = False
        if self.down_since is not None:
            # It did not go down: nothing is excused, except what a kill has cut.
            self.down_since = None
        self.all_agree()
        if self.service.matches("event=internal.error"):
            raise Violation("an internal error was logged")
        if not self.bystander.lives:
            raise Violation("a process that is not the service's was ended")
        if wrongly := set(timed_out(self)) - self.ever_stopped:
            raise Violation(f"gunicorn's timeout has ended workers that had not stood still: {wrongly}")

    def _restarted_if_down(self) -> bool:
        if self.may_be_down and not self.service.processes():
            self.restart()
        return False

    def is_settled(self) -> bool:
        masters = self.masters()
        if list(masters) != ["office"]:
            return False
        snapshot = masters["office"].snapshot()
        states = [worker.state for worker in snapshot.workers]
        if snapshot.phase is not Phase.SERVING or states != [WorkerState.SERVING] * snapshot.workers_wanted:
            return False
        if any(worker.retiring for worker in snapshot.workers):
            return False
        if snapshot.upgrade_state in (UpgradeState.BOOTING, UpgradeState.COMMITTING):
            return False
        # Whoever else carries the marker is an orphan, a proof of a reload, or on its way out.
        header = masters["office"].board.header
        known = {snapshot.master_pid, header.probe_pid, *(worker.pid for worker in snapshot.workers)}
        return set(self.service.processes()) - self._helpers() == known

    def _helpers(self) -> set[int]:
        return {each.pid for each in self.commands}

    def all_agree(self) -> None:
        """Wait until the pid file and `status` name the master in office."""
        said: object = None
        office: finder.Generation | None = None

        def agree() -> bool:
            nonlocal said, office
            # Looked for each time: a signal that was sent right before may begin an upgrade only now.
            office = self.masters().get("office")
            if office is None or self.service.pid_file.read_text() != f"{office.pid}\n":
                said = self.service.pid_file.read_text()
                return False
            done = self.service.run("status", "--json", "--name", self.service.name)
            if done.returncode != 0:
                raise Violation(f"status: {done.stderr}")
            generations = json.loads(done.stdout)["generations"]
            said = [(each["master_pid"], each["phase"], len(each["workers"])) for each in generations]
            # A reload that was asked for just before may still bring workers.
            return said == [(office.pid, "serving", office.board.header.workers_wanted)] and self.is_settled()

        try:
            self.until("pid file and status to agree", agree)
        except Violation:
            snapshot = office.snapshot() if office is not None else None
            raise Violation(f"pid file or status: {said!r}; in office is {snapshot}") from None

    def nothing_was_lost(self) -> None:
        missed = [s for s in lost(self.load) if not any(window.excuses(s) for window in self.windows)]
        if missed:
            raise Violation(
                "lost:\n" + "\n".join(map(str, missed)) + "\nexcused:\n" + "\n".join(map(str, self.windows))
            )

    def excuse_until_gone(self, why: str, pid: int, start: int) -> None:
        """Excuse the requests that a process has, from now to its end."""
        began = time.monotonic()

        def watch() -> None:
            deadline = began + SETTLE_WITHIN
            while proc.alive(pid, start) and time.monotonic() < deadline:
                time.sleep(0.005)
            self.windows.append(Window(why, began, time.monotonic()))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        self.watching.append(thread)

    def clean_up(self) -> None:
        for pid in list(self.stopped):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for command in [*self.commands, *self.forgers]:
            command.kill()
            command.wait()
        self.bystander.close()
        self.service.clean_up()
        self.pool.shutdown(wait=False, cancel_futures=True)


# -- steps


def put_code_on_disk(walk: Walk) -> None:
    kind = walk.dice.choice(("good", "good", "slow", "import_error", "hang"))
    walk.say(f"code: {kind}")
    walk.deploy(kind)


def deploy(walk: Walk) -> None:
    put_code_on_disk(walk)
    signal_office(walk, signal.SIGUSR2)


def deploy_well(walk: Walk) -> None:
    walk.say("code: good")
    walk.deploy("good")
    signal_office(walk, signal.SIGUSR2)


def upgrade_by_command(walk: Walk) -> None:
    walk.say("zdd-web upgrade")
    walk.commands.append(
        subprocess.Popen(
            [sys.executable, "-m", "zdd_web.cli", "upgrade", "--name", walk.service.name],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        )
    )  # fmt: skip


def signal_office(walk: Walk, sig: signal.Signals) -> None:
    office = walk.masters().get("office")
    if office is not None:
        walk.say(f"{sig.name} to the master in office {office.pid}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(office.pid, sig)


def change(walk: Walk) -> None:
    choices = (
        signal.SIGHUP,
        signal.SIGHUP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGWINCH,
    )
    sig = walk.dice.choice(choices)
    for _ in range(walk.dice.choice((1, 1, 1, 3))):
        signal_office(walk, sig)


def signal_any_master(walk: Walk) -> None:
    chosen = walk.a_master()
    if chosen is None:
        return
    part, master = chosen
    sig = walk.dice.choice((signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU))
    if sig is signal.SIGUSR1 and not master.board.header.ready_at:
        sig = signal.SIGTTIN
    if part == "successor" and not master.board.header.tick_at:
        return  # it has no handlers yet
    walk.say(f"{sig.name} to the {part} {master.pid}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(master.pid, sig)


def end_a_master(walk: Walk) -> None:
    chosen = walk.a_master()
    if chosen is None:
        return
    part, master = chosen
    sig = walk.dice.choice(
        (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL, signal.SIGKILL)
    )
    now = sig in (signal.SIGINT, signal.SIGQUIT)
    if master.pid in walk.stopped:
        return  # it would not hear, and take the workers' requests with it when it wakes
    walk.say(f"{sig.name} to the {part} {master.pid}")
    if sig is signal.SIGKILL:
        walk.wake()  # a worker that stands still and has no master any more is beyond everybody's reach
    if now:
        for worker in master.snapshot().workers:
            walk.excuse_until_gone(f"{sig.name} to master {master.pid}", worker.pid, worker.start)
    began = time.monotonic()
    if part == "office":
        walk.goes_down(finishes=sig is signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.kill(master.pid, sig)
    # The office may have changed hands just before.
    office = walk.masters().get("office")
    if part != "old" and (office is None or office.pid == master.pid or master.board.header.phase != Phase.BOOTING):
        after = walk.masters().get("old")
        if part == "office" or (after is not None and after.board.header.phase == Phase.RETIRING):
            walk.goes_down(finishes=sig is signal.SIGTERM)
            walk.down_since = min(walk.down_since or began, began)


def signal_a_worker(walk: Walk) -> None:
    worker = walk.a_worker()
    if worker is None:
        return
    pid, start = worker
    sig = walk.dice.choice(
        (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT, signal.SIGABRT, signal.SIGHUP)
    )
    walk.say(f"{sig.name} to worker {pid}")
    if sig is not signal.SIGTERM:
        walk.excuse_until_gone(f"{sig.name} to worker {pid}", pid, start)
    proc.kill(pid, start, sig)


def stop_a_worker(walk: Walk) -> None:
    worker = walk.a_worker()
    if worker is None or worker[0] in walk.stopped:
        return
    pid, start = worker
    if not proc.kill(pid, start, signal.SIGSTOP):
        return
    walk.ever_stopped.add(pid)
    began = time.monotonic()
    seconds = walk.dice.choice((0.2, 1.0, None))
    walk.say(f"SIGSTOP to worker {pid} for {seconds}")
    if seconds is None:
        # gunicorn's `timeout` finds and kills it, or settling wakes it.
        walk.excuse_until_gone(f"worker {pid} stood still", pid, start)
        walk.stopped[pid] = began
        walk.watching.pop()
        return
    time.sleep(seconds)
    if not proc.kill(pid, start, signal.SIGCONT):
        walk.windows.append(Window(f"worker {pid} stood still and was killed", began, time.monotonic()))


def stop_a_master(walk: Walk) -> None:
    chosen = walk.a_master()
    if chosen is None or chosen[1].pid in walk.stopped:
        return
    part, master = chosen
    start = master.board.header.master_start
    if not proc.kill(master.pid, start, signal.SIGSTOP):
        return
    seconds = walk.dice.choice((0.2, 1.5, None if part == "successor" else 2.5))
    walk.say(f"SIGSTOP to the {part} {master.pid} for {seconds}")
    if seconds is None:
        walk.stopped[master.pid] = time.monotonic()
        return
    time.sleep(seconds)
    proc.kill(master.pid, start, signal.SIGCONT)


def slow_request(walk: Walk) -> None:
    seconds = walk.dice.choice((0.5, 1.5, 3.0))
    walk.say(f"a request of {seconds} s")
    walk.pool.submit(walk.service.get, f"/slow?seconds={seconds}")


def background_job(walk: Walk) -> None:
    seconds = walk.dice.choice((0.5, 2.0))
    walk.say(f"a job of {seconds} s")
    with contextlib.suppress(Exception):  # the invariants judge, the load counts
        walk.service.get(f"/job?seconds={seconds}", timeout=5)


def pass_the_commit_window(walk: Walk) -> None:
    """Wait for the end of an upgrade, so that what follows meets a retiring master."""
    walk.say("waits for the upgrade")
    deadline = time.monotonic() + 4
    while "successor" in walk.masters() and time.monotonic() < deadline:
        time.sleep(0.02)


STEPS: list[tuple[int, Callable[[Walk], None]]] = [
    (3, deploy),
    (4, deploy_well),
    (2, put_code_on_disk),
    (2, upgrade_by_command),
    (3, change),
    (2, signal_any_master),
    (3, end_a_master),
    (3, signal_a_worker),
    (2, stop_a_worker),
    (2, stop_a_master),
    (3, slow_request),
    (1, background_job),
    (2, pass_the_commit_window),
    *ATTACKS,
]


# -- the command


def walk_once(seed: int, number: int, worker_class: str) -> tuple[str, Walk]:
    dice = random.Random(f"{seed}-{number}")
    directory = Path(tempfile.mkdtemp(prefix="zdd_web-walk-"))
    walk = Walk(directory, dice, worker_class)
    try:
        walk.run(dice.randint(5, 8))
        verdict = ""
    except Violation as violation:
        verdict = str(violation)
    finally:
        processes = describe(walk.service)
        walk.clean_up()
    if verdict:
        verdict += f"\n--- processes\n{processes}"
    return verdict, walk


def describe(service: Service) -> str:
    return "\n".join(
        f"{pid} parent {proc.parent(pid)} {proc.state(pid)} {' '.join(proc.words(pid))}" for pid in service.processes()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--start", type=int, default=1, help="the number of the first sequence")
    parser.add_argument("--worker-class", default="gthread", choices=("gthread", "sync"))
    parser.add_argument("--keep-going", action="store_true", help="report a violation and go on")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began, steps, requests, violations = time.monotonic(), 0, 0, 0
    for number in range(options.start, options.start + options.sequences):
        verdict, walk = walk_once(options.seed, number, options.worker_class)
        steps += len(walk.steps)
        requests += len(walk.load.samples)
        seconds = time.monotonic() - began
        if verdict:
            violations += 1
            print(f"--- violation: seed {options.seed} sequence {number}: {verdict}\n--- steps")
            print("\n".join(walk.steps))
            for log in sorted(walk.service.directory.glob("log*"), key=lambda path: int(re.sub(r"\D", "", path.name))):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-LOG_SHOWN:]}")
            print(f"repeat: python -m tests.soak.random_walk --seed {options.seed} --start {number} --sequences 1")
        shutil.rmtree(walk.service.directory, ignore_errors=True)
        if number % 10 == 0 or verdict:
            print(f"{number}: {seconds:.0f} s, {steps} steps, {requests} requests", flush=True)
        if verdict and not options.keep_going:
            return 1
    print(f"{options.sequences} sequences, {steps} steps, {requests} requests, {violations} violations, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
