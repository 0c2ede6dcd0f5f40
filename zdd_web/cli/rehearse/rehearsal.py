"""One rehearsal from the first request to the last: upgrades and scenarios under load, and the stop."""

from __future__ import annotations

import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from zdd_web import service
from zdd_web.board import Snapshot
from zdd_web.cli import control
from zdd_web.cli.rehearse import report
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.phases import PhaseWatch
from zdd_web.cli.rehearse.report import Report
from zdd_web.cli.rehearse.request_mix import Request
from zdd_web.cli.rehearse.samples import Handover, ScenarioResult, StopResult
from zdd_web.cli.rehearse.scenarios import SCENARIOS, Found
from zdd_web.cli.rehearse.server import Server
from zdd_web.cli.rehearse.tally import Tally
from zdd_web.lifecycle import Phase

#: Load that runs before the first upgrade and between two, seconds: more than the second on each side that is judged.
SETTLE = 1.5


@dataclass(frozen=True)
class Plan:
    """What a load is made of, and what is done under it; times in seconds."""

    requests: Sequence[Request] = (Request("/"),)
    clients: int = 32
    keepalive: float = 0.5
    think: float = 0.05
    timeout: float = 10.0
    rate: float | None = None
    duration: float = 0.0
    upgrades: int = 5
    scenarios: Sequence[str] = ()

    def load(self, host: str, port: int, tally: Tally, tls: ssl.SSLContext | None = None) -> LoadThread:
        """Return the load that this plan means; `tls` as `Load` has it. Raises ValueError."""
        return LoadThread(
            Load(
                host,
                port,
                self.requests,
                self.clients,
                self.keepalive,
                self.think,
                self.timeout,
                rate=self.rate,
                tls=tls,
                sink=tally.append,
            )
        )

    @property
    def settle(self) -> float:
        """How long the load runs between two events."""
        events = self.upgrades + len(self.scenarios)
        return max(SETTLE, self.duration / (events + 1))


@dataclass
class Progress:
    """Is called as a rehearsal proceeds: with a line for the user, and before each upgrade with its number."""

    say: Callable[[str], object] = field(default=lambda text: None)
    upgrade: Callable[[int], object] = field(default=lambda number: None)


class Course:
    """Takes a started service through a plan; `generation` is the one that serves."""

    def __init__(
        self, server: Server, generation: service.Generation, plan: Plan, progress: Progress | None = None
    ) -> None:
        self.server, self.generation, self.tally = server, generation, Tally()
        self._plan, self._progress = plan, progress or Progress()
        self._handovers = 0
        self._scenarios: list[ScenarioResult] = []
        self._stop: StopResult | None = None
        self._phases = PhaseWatch()
        self._load = plan.load("127.0.0.1", server.port, self.tally)

    def run(self) -> Report:
        """Run the plan and report; after a KeyboardInterrupt, on what was measured until then."""
        interrupted = ""
        with self._phases:
            self._phases.add(self.generation)
            try:
                with self._load:
                    self._perform()
            except KeyboardInterrupt as error:
                interrupted = f"by {error or 'Ctrl-C'} after {self._handovers} of {self._plan.upgrades} upgrades"
            spans = self._phases.spans()
        return report.of(
            self.tally,
            stop=self._stop,
            scenarios=self._scenarios,
            phases=spans,
            generator=self._load.health(),
            interrupted=interrupted,
        )

    def _perform(self) -> None:
        with self._dropped_when_interrupted():
            time.sleep(self._plan.settle)
            for number in range(1, self._plan.upgrades + 1):
                self._progress.upgrade(number)
                self._upgrade(number)
                self._handovers = number
                time.sleep(self._plan.settle)
            for name in self._plan.scenarios:
                self._progress.say(f"scenario: {name}")
                self._scenario(name)
            self._stop = self._end()

    @contextmanager
    def _dropped_when_interrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            # An interrupted rehearsal does not wait for its slowest request.
            self._load.stop(at_once=True)
            raise

    @property
    def settle(self) -> float:
        """How long the load runs between two events, seconds."""
        return self._plan.settle

    def snapshot(self) -> Snapshot:
        """Return the board of the generation that serves."""
        return self.generation.snapshot()

    def generation_changed(self) -> None:
        """Find out which generation serves now."""
        self.generation = service.is_active(self.server.generations())
        self._phases.add(self.generation)

    def _upgrade(self, number: int) -> None:
        before = self.generation.board.header.generation
        self.tally.expect(time.monotonic())
        outcome = control.upgrade(self.generation)
        done_at = time.monotonic()
        ready_at = None
        if outcome.ok:
            self.generation_changed()
            # From the board: the instant before the gate opened, on the clock that the samples have too.
            ready_at = self.generation.board.header.ready_at / 1e9
        else:
            self._progress.say(f"\nupgrade {number} {outcome.reason}\n{outcome.log}")
        self.tally.handover(
            Handover(
                number=number,
                from_generation=before,
                to_generation=outcome.generation,
                requested_at=outcome.requested_at,
                ready_at=ready_at,
                done_at=done_at,
                ok=outcome.ok,
                reason=outcome.reason,
            )
        )

    def _scenario(self, name: str) -> None:
        requests, lost = self.tally.totals()
        begun_at = time.monotonic()
        self.tally.changes_at(begun_at)
        try:
            found = SCENARIOS[name](self)
        except OSError as error:
            found = Found(f"the master {self.generation.pid} cannot be reached: {error.strerror}")
        ended_at = time.monotonic()
        time.sleep(self._plan.settle)
        requests_after, lost_after = self.tally.totals()
        self._scenarios.append(
            ScenarioResult(
                name=name,
                begun_at=begun_at,
                ended_at=ended_at,
                ok=not found.reason,
                detail=found.detail,
                reason=found.reason,
                requests=requests_after - requests,
                lost=lost_after - lost,
                excused=min(found.excused, lost_after - lost),
            )
        )

    def _end(self) -> StopResult:
        # Clients begin nothing new from now on, as after a load balancer took this backend out; what is in flight
        # at the signal must still be answered.
        self._until_alone()
        # Before the signal, not beside it: a connection to a closed listener is refused, which the service cannot help.
        self._load.dismiss()
        in_flight = self._load.in_flight
        requested_at = time.monotonic()
        self.tally.changes_at(requested_at)
        os.kill(self.generation.pid, signal.SIGTERM)
        status = self.server.wait(self.generation, timeout=self._grace())
        ended_at = time.monotonic()
        self._load.stop()
        left = self.server.generations()
        if status is None:
            reason = "the service did not end in time"
        elif status != 0:
            reason = f"the service ended with status {status}"
        elif left:
            reason = f"generations still alive: {', '.join(str(each.pid) for each in left)}"
        else:
            reason = ""
        return StopResult(requested_at, ended_at, status, in_flight, not reason, reason)

    def _until_alone(self) -> None:
        # Its predecessor would take the exit status of the last one, and is bounded by the requests it still has.
        deadline = time.monotonic() + 30
        while len(self.server.generations()) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _grace(self) -> float:
        # The service's own GRACE_PERIOD is what it may take; a day would be its longest.
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            header = self.generation.board.header
            if header.phase == Phase.STOPPED:
                return 30.0
            if header.deadline:
                return max(0.0, header.deadline / 1e9 - time.monotonic()) + 5.0
            time.sleep(0.01)
        return 30.0
