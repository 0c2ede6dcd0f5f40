"""Every signal in every phase, as docs/reference/signals.md says; then signals that meet each other.

The tables of that page are the parametrisation: a row names a way into a phase (`PHASES`), a cell an outcome
(`OUTCOMES`). A row or cell that is not known here, or a known one that the page has not, fails.

Phases are held by facts and not by time: an import by a file that it waits for, the commit window by a file that the
configuration has the old master wait for, a drain by an upload whose end has not been sent.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.processes.harness import Held, Service, answered_from, settled, successor, until
from zdd_web import service as finder
from zdd_web.board import UpgradeState
from zdd_web.cli.rehearse.load import LoadThread
from zdd_web.lifecycle import SPAWNING, Phase
from zdd_web.system import proc

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "signals.md"

#: Says that it is there, and waits a minute at most, so that nothing is left behind when a test dies.
IMPORT_WAITS = """
open(f"importing-{os.getpid()}", "w").close()
for _ in range(3000):
    if os.path.exists("go"):
        break
    time.sleep(0.02)
"""

#: The commit window lasts until the test says so.
COMMIT_WAITS = """
import os
from zdd_web.gunicorn.upgrade import successor_process as upgrade
_committed = upgrade.Upgrade.committed
upgrade.Upgrade.committed = property(lambda self: os.path.exists("commit") and _committed.fget(self))
"""


# -- ways into a phase


@dataclass
class Scene:
    """A service in a phase. The signal goes to `master`; `other` is the other master, 0 when there is none."""

    service: Service
    master: int
    other: int = 0
    upload: Held | None = None
    load: LoadThread | None = None
    masters: set[int] = field(default_factory=set)

    @property
    def generation(self) -> finder.Generation:
        return until(f"the board of {self.master}", lambda: finder.generation_of(self.master), self.service)

    @property
    def phase(self) -> Phase:
        return self.generation.snapshot().phase

    def send(self, sig: signal.Signals, pid: int = 0) -> None:
        os.kill(pid or self.master, sig)

    def handled(self, sig: signal.Signals) -> None:
        """Wait until the master has handled the signal and been round its loop since."""
        name = sig.name[3:].lower()
        self.service.wait_for(rf"\[{self.master}\] \[INFO\] Handling signal: {name}")
        turns(self.service, self.generation, 2)

    def gone(self, pid: int) -> None:
        until(f"the end of {pid}", lambda: proc.state(pid) in ("", "Z"), self.service)

    def release(self) -> None:
        """Let go of whatever holds the phase."""
        for name in ("go", "commit"):
            (self.service.directory / name).touch()

    def finish(self) -> None:
        """Stop what is left; nothing may be."""
        service = self.service
        self.release()
        if self.upload is not None:
            self.upload.is_answered()
        told: set[int] = set()

        def stopped() -> bool:
            for generation in service.generations():
                if generation.pid not in told:
                    told.add(generation.pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(generation.pid, signal.SIGTERM)
            return not service.processes()

        until("the end of all processes", stopped, service)
        service.leaves_no_trace()
        assert not service.matches("internal.error"), service.log()


def turns(service: Service, generation: finder.Generation, count: int) -> None:
    """Wait until a master has been round its loop that many times."""
    for _ in range(count):
        seen = generation.board.header.tick_at
        until("a turn of the loop", lambda at=seen: generation.board.header.tick_at != at, service)


def started(service: Service, **settings: object) -> Scene:
    service.configure(COMMIT_WAITS, **settings).start()
    return Scene(service, service.pid)


def upgrading(service: Service, *, held_at: str) -> Scene:
    """Start an upgrade that waits at import, in the commit window, or not at all."""
    scene = started(service)
    if held_at == "import":
        service.deploy("2", at_import=IMPORT_WAITS)
    if held_at == "nothing":
        scene.release()
    scene.send(signal.SIGUSR2)
    scene.other = successor(service)
    if held_at == "import":
        importing(service)
    else:
        service.wait_for("generation=2 event=phase.serving")
    return scene


def first_boot(service: Service) -> Scene:
    service.configure(COMMIT_WAITS)
    service.deploy("1", at_import=IMPORT_WAITS)
    process = service.spawn()
    importing(service)
    service.learn_port()
    return Scene(service, process.pid)


def importing(service: Service) -> None:
    """Wait until all workers of a generation are held at import."""
    until("imports", lambda: len(list(service.directory.glob("importing-*"))) >= service.workers, service)


def swapped(scene: Scene) -> Scene:
    """The same scene, seen by the new master."""
    return Scene(scene.service, scene.other, scene.master, scene.upload)


def lame_duck(service: Service) -> Scene:
    scene = started(service, drain_delay=60, grace_period=90)
    scene.send(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    return scene


def draining(service: Service) -> Scene:
    scene = started(service)
    scene.upload = Held(service)
    scene.send(signal.SIGTERM)
    service.wait_for("event=phase.draining")
    return scene


def retiring(service: Service) -> Scene:
    scene = started(service)
    scene.upload = Held(service)
    scene.release()
    scene.send(signal.SIGUSR2)
    scene.other = successor(service)
    service.wait_for("generation=1 event=phase.retiring")
    return scene


PHASES: dict[str, Callable[[Service], Scene]] = {
    "`booting`, first start": first_boot,
    "`booting`, a successor": lambda service: swapped(upgrading(service, held_at="import")),
    "`serving`": started,
    "`serving`, its successor boots": lambda service: upgrading(service, held_at="import"),
    "`serving`, in the commit window": lambda service: upgrading(service, held_at="commit"),
    "`serving`, not yet active": lambda service: swapped(upgrading(service, held_at="commit")),
    "`lame_duck`": lame_duck,
    "`draining`": draining,
    "`retiring`": retiring,
}

#: Where connections are accepted, so that load may run while the signal is sent.
ANSWERED = set(PHASES) - {"`booting`, first start", "`draining`"}


# -- outcomes


def refused(scene: Scene, sig: signal.Signals) -> None:
    before = scene.phase
    scene.send(sig)
    assert "reason=" in scene.service.wait_for(rf"\[{scene.master}\].*event=refused signal={sig.name[3:]}")
    assert scene.phase is before


def no_effect(scene: Scene, sig: signal.Signals) -> None:
    before = scene.generation.snapshot()
    scene.send(sig)
    scene.handled(sig)
    after = scene.generation.snapshot()
    assert (after.phase, after.deadline) == (before.phase, before.deadline)
    # Those of a leaving generation go on leaving; nobody comes.
    assert {worker.pid for worker in after.workers} <= {worker.pid for worker in before.workers}
    if before.phase in SPAWNING:
        assert len(after.workers) == len(before.workers) == scene.service.workers


def goes_its_way(scene: Scene) -> None:
    """The start, the upgrade or the drain that a signal has not changed comes to its end."""
    before = scene.phase
    if before is Phase.BOOTING and not scene.other:
        scene.release()
        scene.service.wait_for("event=phase.serving")
    elif scene.other and before is not Phase.RETIRING:
        scene.release()
        scene.service.wait_for("event=upgrade.committed")
        assert until("generation 2", lambda: scene.service.get().generation == 2, scene.service)
    if scene.upload is not None:
        assert scene.upload.is_answered()
        scene.gone(scene.master)


def ends_in_3_s_at_most_status_1(scene: Scene, sig: signal.Signals) -> None:
    scene.send(sig)
    scene.gone(scene.master)
    # Nothing was served, so nothing was completed.
    scene.service.ends(status=1)


def ends_now_status_1(scene: Scene, sig: signal.Signals) -> None:
    scene.send(sig)
    scene.service.ends(status=1)


def ends_now(scene: Scene, sig: signal.Signals) -> None:
    scene.send(sig)
    scene.service.ends()


def ends_and_the_old_one_serves(scene: Scene, sig: signal.Signals) -> None:
    service, old = scene.service, Scene(scene.service, scene.other)
    scene.send(sig)
    scene.gone(scene.master)
    service.wait_for("event=upgrade.failed")
    assert old.phase is Phase.SERVING
    # Its workers answer what they have accepted, and accept until they have read their own signal.
    service.until_alone()
    assert service.get().generation == 1
    assert service.pid_file.read_text() == f"{old.master}\n"
    scene.release()
    service.upgrade()
    assert until("generation 2", lambda: service.get().generation == 2, service)


def lame_duck_drain_end(scene: Scene, sig: signal.Signals) -> None:
    upload = Held(scene.service)
    scene.send(sig)
    scene.service.wait_for("event=phase.lame_duck")
    drains(scene, upload)


def kills_it_drain_end(scene: Scene, sig: signal.Signals) -> None:
    upload = Held(scene.service)
    scene.send(sig)
    scene.gone(scene.other)
    scene.service.wait_for("event=upgrade.cancelled")
    assert upload.is_answered()
    scene.service.ends()


def kills_it_ends_now(scene: Scene, sig: signal.Signals) -> None:
    ends_now(scene, sig)
    assert scene.service.matches("event=upgrade.cancelled")


def both_drain_and_end(scene: Scene, sig: signal.Signals) -> None:
    upload = Held(scene.service)
    scene.send(sig)
    scene.service.wait_for("event=phase.draining", times=2)
    assert upload.is_answered()
    scene.service.ends()


def both_end_now(scene: Scene, sig: signal.Signals) -> None:
    ends_now(scene, sig)
    assert scene.service.matches(rf"\[{scene.other}\] \[INFO\] Handling signal: {sig.name[3:].lower()}")


def ends_now_the_new_one_serves(scene: Scene, sig: signal.Signals) -> None:
    scene.send(sig)
    scene.gone(scene.master)
    successor_serves_on(scene)


def successor_serves_on(scene: Scene) -> None:
    service = scene.service
    service.until_alone()
    assert service.get().generation == 2
    assert service.pid_file.read_text() == f"{scene.other}\n"
    assert service.pid == scene.other
    service.upgrade()
    assert until("generation 3", lambda: service.get().generation == 3, service)


def drains(scene: Scene, upload: Held) -> None:
    """What is in hand is answered; then all processes end, with status 0."""
    scene.service.wait_for("event=phase.draining")
    assert upload.is_answered()
    scene.service.ends()


def drains_now(scene: Scene, sig: signal.Signals) -> None:
    upload = Held(scene.service)
    scene.send(sig)
    drains(scene, upload)


def gets_a_deadline(scene: Scene, sig: signal.Signals) -> None:
    assert scene.generation.snapshot().deadline == 0
    scene.send(sig)
    deadline = until("a deadline", lambda: scene.generation.snapshot().deadline, scene.service)
    assert scene.phase is Phase.RETIRING
    scene.send(sig)
    until("the second one", lambda: len(scene.service.matches("Handling signal: term")) == 2, scene.service)
    turns(scene.service, scene.generation, 2)
    assert scene.generation.snapshot().deadline == deadline
    assert scene.upload is not None
    assert scene.upload.is_answered()
    scene.gone(scene.master)
    successor_serves_on(scene)


def reloads(scene: Scene, sig: signal.Signals) -> None:
    before = [worker.pid for worker in scene.generation.snapshot().workers]
    scene.service.deploy("2")
    scene.send(sig)
    scene.service.wait_for("event=reload.done")
    settled(scene.service, scene.service.workers, before)
    assert scene.service.get().version == "2"
    assert scene.service.get().generation == 1


def upgrades(scene: Scene, sig: signal.Signals) -> None:
    scene.release()
    scene.send(sig)
    scene.service.wait_for("event=upgrade.committed")
    scene.gone(scene.master)
    assert scene.service.get().generation == 2
    assert scene.service.pid_file.read_text() == f"{scene.service.pid}\n"


def upgrades_once_in_office(scene: Scene, sig: signal.Signals) -> None:
    scene.send(sig)
    scene.handled(sig)
    assert len(scene.service.matches("event=upgrade.started")) == 1
    scene.release()
    scene.service.wait_for("generation=2 event=upgrade.committed")
    assert until("generation 3", lambda: scene.service.get().generation == 3, scene.service)


def reopens_logs(scene: Scene, sig: signal.Signals) -> None:
    access = scene.service.directory / "access"
    until("the access log", access.exists, scene.service)
    access.rename(f"{access}.1")
    scene.send(sig)
    until("a new access log", access.exists, scene.service)
    scene.handled(sig)


def one_more(scene: Scene, sig: signal.Signals) -> None:
    _counts(scene, sig, scene.service.workers + 1)


def one_less(scene: Scene, sig: signal.Signals) -> None:
    _counts(scene, sig, scene.service.workers - 1)


def _counts(scene: Scene, sig: signal.Signals, count: int) -> None:
    before = scene.phase
    scene.send(sig)
    scene.handled(sig)
    assert scene.phase is before
    assert scene.generation.snapshot().workers_wanted == count
    if before is Phase.BOOTING:
        scene.release()
        until("service", lambda: scene.phase is Phase.SERVING, scene.service)
    # One more of the old generation imports what is on disk now, as any replacement does: here, code that waits.
    until(f"{count} workers", lambda: len(scene.generation.snapshot().workers) == count, scene.service)


OUTCOMES: dict[str, Callable[[Scene, signal.Signals], None]] = {
    "refused": refused,
    "no effect": no_effect,
    "ends in 3 s at most, status 1": ends_in_3_s_at_most_status_1,
    "ends now, status 1": ends_now_status_1,
    "ends now": ends_now,
    "ends; the old one serves": ends_and_the_old_one_serves,
    "lame duck, drain, end": lame_duck_drain_end,
    "kills it; drain, end": kills_it_drain_end,
    "kills it; ends now": kills_it_ends_now,
    "both drain and end": both_drain_and_end,
    "both end now": both_end_now,
    "ends now; the new one serves": ends_now_the_new_one_serves,
    "drains now": drains_now,
    "gets a deadline": gets_a_deadline,
    "reloads": reloads,
    "upgrades": upgrades,
    "upgrades once active": upgrades_once_in_office,
    "reopens logs": reopens_logs,
    "one more": one_more,
    "one less": one_less,
}

#: Outcomes that leave the phase as it was: all of one phase are played in one scene.
QUIET = {"refused", "no effect", "reopens logs"}

#: Outcomes that leave somebody serving: nobody may lose a request meanwhile.
HARMLESS = {
    "refused", "no effect", "ends; the old one serves", "reloads", "upgrades", "upgrades once active",
    "reopens logs", "one more", "one less",
}  # fmt: skip


assert QUIET <= HARMLESS, "one load runs while all cells of a quiet scene are played"


def cuts(cell: Cell) -> bool:
    """Whether requests of a generation that accepts are cut off by what the signal means."""
    return cell.phase == "`serving`, not yet active" and cell.signal in ("INT", "QUIT")


# -- the cells


@dataclass(frozen=True)
class Cell:
    phase: str
    signal: str
    outcome: str
    worker_class: str = "gthread"

    def __str__(self) -> str:
        words = re.sub(r"[^a-z]+", "_", self.phase.lower()).strip("_")
        return f"{words}-{self.signal}-{self.worker_class}"


def cells() -> list[Cell]:
    """Read the page's tables of phases and signals."""
    found, columns = [], []
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if first == "phase":
            columns = rest
        elif columns and not first.startswith("---"):
            found += [Cell(first, name, text) for name, text in zip(columns, rest, strict=True)]
    return found


CELLS = cells()
#: sync as well, where a worker's own loop has a part in it.
SYNC = [
    Cell(cell.phase, cell.signal, cell.outcome, "sync")
    for cell in CELLS
    if cell.signal in ("TERM", "HUP") and cell.outcome not in ("refused", "no effect")
]


def test_the_page_has_every_phase_and_signal_and_no_unknown_cell() -> None:
    names = ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "TTIN", "TTOU", "WINCH")
    assert sorted((cell.phase, cell.signal) for cell in CELLS) == sorted(
        (row, name) for row in PHASES for name in names
    )
    assert {cell.outcome for cell in CELLS} == set(OUTCOMES)


def scenes() -> list[list[Cell]]:
    """Return the cells that are played one after the other, with one service: the quiet ones of a phase, or one."""
    quiet = [[cell for cell in CELLS if cell.phase == phase and cell.outcome in QUIET] for phase in PHASES]
    return quiet + [[cell] for cell in CELLS + SYNC if cell.outcome not in QUIET]


def name(played: list[Cell]) -> str:
    return str(replace(played[0], signal="_".join(cell.signal for cell in played)))


@pytest.mark.parametrize("played", scenes(), ids=name)
def test_the_page_says_what_a_signal_does(played: list[Cell], make_service) -> None:
    first = played[0]
    service = make_service(first.worker_class)
    service.arguments = ["--access-logfile", str(service.directory / "access")]
    scene = PHASES[first.phase](service)

    def play() -> None:
        for cell in played:
            print(f"{cell}: {cell.outcome}")
            OUTCOMES[cell.outcome](scene, signal.Signals[f"SIG{cell.signal}"])
        if first.outcome in QUIET:
            goes_its_way(scene)

    if first.phase in ANSWERED and first.outcome in HARMLESS and not cuts(first):
        with service.under_load(clients=4) as load:
            play()
            answered_from(load, 20)
    else:
        play()
    scene.finish()


# -- signals to a worker


@pytest.mark.parametrize("name", ["TERM", "QUIT", "INT", "ABRT"])
def test_a_worker_that_is_signalled_ends_and_is_replaced(make_service, name: str) -> None:
    scene = started(make_service())
    service = scene.service
    before = settled(service, 2)
    os.kill(before[0], signal.Signals[f"SIG{name}"])
    after = settled(service, 2, before[:1])
    assert before[1] in after
    assert scene.phase is Phase.SERVING
    assert service.get().status == 200
    scene.finish()


def test_a_worker_that_is_told_to_leave_finishes_its_request(service: Service) -> None:
    service.workers = 1
    scene = started(service)
    worker = settled(service, 1)[0]
    upload = Held(service)
    os.kill(worker, signal.SIGTERM)
    if service.worker_class == "gthread":
        # A sync worker hears the signal when its request is done.
        until("a replacement", lambda: len(service.snapshot().workers) == 2, service)
    assert upload.is_answered()
    settled(service, 1, [worker])
    scene.finish()


@pytest.mark.parametrize("name", ["QUIT", "INT", "ABRT"])
def test_a_worker_that_is_ended_cuts_its_request(service: Service, name: str) -> None:
    service.workers = 1
    scene = started(service)
    worker = settled(service, 1)[0]
    upload = Held(service)
    os.kill(worker, signal.Signals[f"SIG{name}"])
    # The upload does not end: nor may the worker wait for the thread that reads it.
    settled(service, 1, [worker])
    assert not upload.is_answered()
    scene.finish()


@pytest.mark.parametrize("name", ["HUP", "USR2"])
def test_a_signal_that_only_a_master_knows_does_nothing_to_a_worker(service: Service, name: str) -> None:
    service.workers = 1
    scene = started(service)
    worker = settled(service, 1)[0]
    upload = Held(service)
    os.kill(worker, signal.Signals[f"SIG{name}"])
    assert upload.is_answered()
    assert settled(service, 1) == [worker]
    scene.finish()


def test_a_replacement_that_hangs_at_import_is_given_up_and_tried_again(make_service) -> None:
    # gunicorn's `timeout` begins with a worker's first heartbeat: one that never gets there is never missed.
    scene = started(make_service(), upgrade_timeout=2)
    service = scene.service
    before = settled(service, 2)
    service.deploy("2", at_import=IMPORT_WAITS)
    os.kill(before[0], signal.SIGKILL)
    until("an import that hangs", lambda: list(service.directory.glob("importing-*")), service)
    service.deploy("3")
    assert before[1] in settled(service, 2, before[:1])
    assert service.matches("event=worker.boot_failed")
    scene.finish()


def test_usr1_to_a_worker_reopens_its_logs(make_service) -> None:
    service = make_service()
    service.arguments = ["--access-logfile", str(service.directory / "access")]
    scene = started(service)
    before = settled(service, 2)
    access = service.directory / "access"
    access.rename(f"{access}.1")
    os.kill(before[0], signal.SIGUSR1)
    until("a new access log", access.exists, service)
    assert settled(service, 2) == before
    scene.finish()


def test_all_workers_signalled_at_once_lose_nothing(service: Service) -> None:
    scene = started(service)
    before = settled(service, 2)
    with service.under_load(clients=4) as load:
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        settled(service, 2, before)
        answered_from(load, 50)
    scene.finish()


# -- signals that meet


def test_term_to_the_whole_group_finishes_what_is_in_hand(service: Service) -> None:
    scene = started(service)
    upload = Held(service)
    for pid in service.processes():
        os.kill(pid, signal.SIGTERM)
    drains(scene, upload)
    scene.finish()


def test_term_to_the_whole_group_during_an_upgrade_ends_both_generations(service: Service) -> None:
    scene = upgrading(service, held_at="import")
    upload = Held(service)
    for pid in service.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert upload.is_answered()
    service.ends(status=None)
    scene.finish()


def test_int_to_the_whole_group_ends_everything(service: Service) -> None:
    # What Ctrl-C in a terminal does.
    scene = started(service)
    for pid in service.processes():
        os.kill(pid, signal.SIGINT)
    service.ends()
    scene.finish()


@pytest.mark.parametrize("name", ["INT", "QUIT"])
def test_a_stop_now_takes_no_longer_than_a_stop_that_finishes_work(make_service, name: str) -> None:
    # Python joins the threads of a gthread worker that exits, and gunicorn waits for `graceful_timeout`, 30 s.
    service = make_service()
    scene = started(service, grace_period=2)
    upload = Held(service)
    scene.send(signal.Signals[f"SIG{name}"])
    service.ends(status=None, patience=15)
    assert not upload.is_answered()
    scene.finish()


def test_usr2_twice_at_once_is_one_upgrade_and_loses_nothing(service: Service) -> None:
    scene = started(service)
    scene.release()
    with service.under_load(clients=4) as load:
        scene.send(signal.SIGUSR2)
        scene.send(signal.SIGUSR2)
        service.wait_for("event=upgrade.committed")
        scene.gone(scene.master)
        answered_from(load, 50)
    assert service.get().generation == 2
    scene.finish()


def test_usr2_then_term_stops(service: Service) -> None:
    scene = started(service)
    upload = Held(service)
    scene.send(signal.SIGUSR2)
    scene.send(signal.SIGTERM)
    drains(scene, upload)
    scene.finish()


def test_term_then_usr2_stops(service: Service) -> None:
    scene = started(service)
    upload = Held(service)
    scene.send(signal.SIGTERM)
    service.wait_for("event=phase.draining")
    scene.send(signal.SIGUSR2)
    assert "the generation is draining" in service.wait_for("event=refused signal=USR2")
    assert upload.is_answered()
    service.ends(status=None)
    scene.finish()


def test_term_twice_at_once_is_one_stop(service: Service) -> None:
    scene = started(service)
    upload = Held(service)
    scene.send(signal.SIGTERM)
    scene.send(signal.SIGTERM)
    drains(scene, upload)
    scene.finish()


def test_usr2_during_the_proof_of_a_reload_is_refused(make_service) -> None:
    scene = started(make_service())
    service = scene.service
    service.deploy("2", at_import=IMPORT_WAITS)
    with service.under_load(clients=4) as load:
        scene.send(signal.SIGHUP)
        service.wait_for("event=reload.started")
        scene.send(signal.SIGUSR2)
        assert "a reload (SIGHUP) is under way" in service.wait_for("event=refused signal=USR2")
        scene.release()
        service.wait_for("event=reload.done")
        until("version 2", lambda: service.get().version == "2", service)
        service.upgrade()
        answered_from(load, 50)
    scene.finish()


def test_usr2_while_a_reload_replaces_workers_upgrades(make_service) -> None:
    scene = started(make_service())
    service = scene.service
    service.deploy("2")
    scene.release()
    with service.under_load(clients=4) as load:
        scene.send(signal.SIGHUP)
        service.wait_for("event=reload.done")
        scene.send(signal.SIGUSR2)
        service.wait_for("event=upgrade.committed")
        scene.gone(scene.master)
        answered_from(load, 50)
    assert service.get().generation == 2
    scene.finish()


def test_term_during_the_proof_of_a_reload_stops_and_blames_nobody(make_service) -> None:
    scene = started(make_service())
    service = scene.service
    service.deploy("2", at_import=IMPORT_WAITS)
    upload = Held(service)
    scene.send(signal.SIGHUP)
    service.wait_for("event=reload.started")
    scene.send(signal.SIGTERM)
    drains(scene, upload)
    assert not service.matches("event=refused"), service.log()
    scene.finish()


def test_a_storm_of_hup_reloads_and_loses_nothing(service: Service) -> None:
    scene = started(service)
    before = settled(service, 2)
    service.deploy("2")
    with service.under_load(clients=4) as load:
        for number in range(1, 21):
            scene.send(signal.SIGHUP)
            # Each is handled before the next is sent: the kernel makes one of two that are pending.
            service.wait_for("Handling signal: hup", times=number)
        service.wait_for("event=reload.done")
        settled(service, 2, before)
        until("version 2", lambda: service.get().version == "2", service)
        answered_from(load, 50)
    assert len(service.matches("event=reload.started")) + len(service.matches("event=refused signal=HUP")) == 20
    scene.finish()


def test_a_storm_of_ttin_and_ttou_ends_where_it_began(service: Service) -> None:
    scene = started(service)
    with service.under_load(clients=4) as load:
        for number in range(1, 11):
            scene.send(signal.SIGTTIN)
            service.wait_for("Handling signal: ttin", times=number)
        for number in range(1, 11):
            scene.send(signal.SIGTTOU)
            service.wait_for("Handling signal: ttou", times=number)
        until("the number", lambda: service.snapshot().workers_wanted == 2, service)
        settled(service, 2)
        answered_from(load, 50)
    scene.finish()


def test_ttou_keeps_the_last_worker(make_service) -> None:
    scene = started(make_service())
    for number in range(1, 5):
        scene.send(signal.SIGTTOU)
        scene.service.wait_for("Handling signal: ttou", times=number)
    assert len(settled(scene.service, 1)) == 1
    scene.finish()


def test_a_successor_has_the_number_of_workers_of_the_configuration(make_service) -> None:
    scene = started(make_service())
    scene.release()
    scene.send(signal.SIGTTIN)
    settled(scene.service, 3)
    scene.service.upgrade()
    until("generation 2", lambda: scene.service.snapshot().generation == 2, scene.service)
    settled(scene.service, 2)
    scene.finish()


def test_an_old_master_with_a_deadline_does_not_return_to_office(make_service) -> None:
    scene = retiring(make_service())
    service = scene.service
    scene.send(signal.SIGTERM)
    until("a deadline", lambda: scene.generation.snapshot().deadline, service)
    scene.send(signal.SIGKILL, scene.other)
    assert scene.upload is not None
    assert scene.upload.is_answered()
    service.ends(status=None)
    assert not service.matches("event=successor.lost")
    # SIGKILL leaves no one to remove it.
    service.pid_file.unlink(missing_ok=True)
    scene.finish()


def test_an_old_master_killed_in_the_commit_window_leaves_no_file_beside_the_pid_file(make_service) -> None:
    scene = upgrading(make_service(), held_at="commit")
    service = scene.service
    scene.send(signal.SIGKILL)
    service.wait_for("event=predecessor.lost")
    until("the new one's office", lambda: service.pid_file.read_text() == f"{scene.other}\n", service)
    assert until("generation 2", lambda: service.get().generation == 2, service)
    scene.finish()


def test_the_command_ends_when_the_successor_is_told_to_stop(make_service) -> None:
    scene = upgrading(make_service(), held_at="nothing")
    service = scene.service
    scene.gone(scene.master)
    (service.directory / "go").unlink()
    service.deploy("3", at_import=IMPORT_WAITS)
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(service.run, "upgrade", "--name", service.name)
        third = successor(service, times=2)
        importing(service)
        os.kill(third, signal.SIGTERM)
        try:
            service.wait_for("event=upgrade.failed")
        finally:
            if not service.matches("event=upgrade.failed"):
                service.clean_up()  # the command follows until the master's end
        assert command.result().returncode == 1
    scene.finish()


@pytest.mark.parametrize("name", ["TERM", "INT", "QUIT", "USR1", "TTIN", "TTOU", "WINCH", "HUP", "USR2"])
def test_a_retiring_master_whose_pid_must_stay_sends_signals_on(make_service, name: str) -> None:
    service = make_service()
    service.arguments = ["--access-logfile", str(service.directory / "access")]
    service.configure(COMMIT_WAITS, keep_pid=True).start()
    scene = Scene(service, service.pid)
    scene.upload = Held(service)
    scene.release()
    scene.send(signal.SIGUSR2)
    scene.other = successor(service)
    service.wait_for("generation=1 event=phase.retiring")
    sig = signal.Signals[f"SIG{name}"]
    scene.send(sig)
    service.wait_for(rf"\[{scene.other}\] \[INFO\] Handling signal: {name.lower()}")
    if name not in ("TERM", "INT", "QUIT"):
        assert scene.upload.is_answered()
        service.wait_for("event=keeper.started")
    scene.upload.is_answered()
    # The keeper has the pid, and ends when the service does.
    if name not in ("TERM", "INT", "QUIT"):
        until("the master in office", lambda: service.generations()[0].pid == scene.other, service)
        os.kill(scene.master, signal.SIGTERM)
    service.ends()
    scene.finish()


# -- --daemon


def daemon(service: Service) -> Scene:
    service.arguments = ["--daemon", "--error-logfile", str(service.log_file)]
    service.configure(COMMIT_WAITS)
    process = service.spawn()
    service.wait_for("event=phase.serving")
    process.wait()
    service.process = None
    service.learn_port()
    return Scene(service, service.pid)


@pytest.mark.parametrize("remedy", ["TTIN", "HUP", "USR2"])
def test_winch_takes_a_daemons_workers_away_until_others_are_asked_for(make_service, remedy: str) -> None:
    scene = daemon(make_service())
    service = scene.service
    scene.release()
    scene.send(signal.SIGWINCH)
    until("no workers", lambda: not service.snapshot().workers, service)
    with ThreadPoolExecutor(1) as pool:
        # It waits in the kernel's queue.
        reply = pool.submit(service.get)
        scene.send(signal.Signals[f"SIG{remedy}"])
        assert reply.result().status == 200
    scene.finish()


def test_winch_does_not_have_a_booting_daemon_serve_without_workers(make_service) -> None:
    service = make_service()
    service.arguments = ["--daemon", "--error-logfile", str(service.log_file)]
    service.configure(COMMIT_WAITS)
    service.deploy("1", at_import=IMPORT_WAITS)
    service.spawn().wait()
    service.process = None
    importing(service)
    service.learn_port()
    scene = Scene(service, service.pid)
    scene.send(signal.SIGWINCH)
    scene.handled(signal.SIGWINCH)
    assert scene.phase is Phase.BOOTING
    scene.finish()


def test_winch_during_an_upgrade_of_a_daemon_does_not_take_the_only_workers_away(make_service) -> None:
    # gunicorn's documented upgrade is USR2, then WINCH to the old master.
    scene = daemon(make_service())
    service = scene.service
    service.deploy("2", at_import=IMPORT_WAITS)
    scene.send(signal.SIGUSR2)
    scene.other = successor(service)
    importing(service)
    scene.send(signal.SIGWINCH)
    scene.handled(signal.SIGWINCH)
    assert [worker.retiring for worker in scene.generation.snapshot().workers] == [False, False]
    scene.release()
    service.wait_for("event=upgrade.committed")
    assert scene.generation.snapshot().upgrade_state in (UpgradeState.COMMITTING, UpgradeState.DONE)
    scene.finish()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_successor_that_stands_still_in_the_commit_window_does_not_outlive_a_stop(make_service) -> None:
    scene = upgrading(make_service(), held_at="commit")
    with stopped(scene.other):
        scene.send(signal.SIGTERM)
        scene.gone(scene.master)
        scene.service.ends(status=None)
    scene.finish()


if sys.platform != "linux":
    pytest.skip("signals are looked up under /proc", allow_module_level=True)
