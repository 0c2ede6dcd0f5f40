"""From a board to an answer: what the adaptors and the probe port share.

`look()` reads the board and nothing else, so an answer takes microseconds, whatever the app and its dependencies do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from zdd_web import checks, process
from zdd_web.board import Board, CheckRecord, WorkerState
from zdd_web.board.record import one_of
from zdd_web.checks import registry
from zdd_web.health import CheckSeen, Health, Kind, Probe, Question, Reply, Result, WorkerHealth, answer, table
from zdd_web.lifecycle import Phase, stalled_for
from zdd_web.settings import FrameworkSettings, Settings, of_app
from zdd_web.system import clock, pauses


def look(board: Board, *, lame_duck_ready: bool = False) -> Health:
    """Read what a generation says of itself; `lame_duck_ready` is the setting of the process that answers."""
    header, now = board.header, clock.now_ns()
    alone = bool(header.alone)
    workers, beat_at, limit = [], header.ready_at, header.worker_timeout
    for slot in board.used_slots():
        beat_at = max(beat_at, min(slot.beat_at, now))
        state = slot.state if slot.order.taken or alone else WorkerState.FREE
        if state == WorkerState.BOOTING and limit:
            # It does not beat while it imports, and may be all that is left.
            limit = max(limit, header.boot_timeout)
        if state not in (WorkerState.FREE, WorkerState.LEAVING) or alone:
            seen = tuple(_check(slot.check(index), now) for index in range(slot.checks))
            workers.append(WorkerHealth(state == WorkerState.SERVING or alone, seen))
    phase = one_of(Phase, header.phase, Phase.STOPPED)
    successor = one_of(Phase, header.successor_phase, Phase.STOPPED) if header.successor_phase else None
    return Health(
        phase=phase,
        successor=successor,
        successor_trouble=header.successor_trouble,
        wanted=None if alone else header.workers_wanted,
        workers=tuple(workers),
        silence=max(0.0, pauses.since(beat_at)),
        worker_timeout=limit / 1e9 if limit else None,
        master_stalled=stalled_for(phase, header.tick_at, now),
        lame_duck_ready=lame_duck_ready,
        # A question to a generation that retires is about its successor, whose release is not known here.
        release="" if phase is Phase.RETIRING else header.release,
    )


def _check(record: CheckRecord, now: int) -> CheckSeen:
    return CheckSeen(
        name=record.name,
        kind=one_of(Kind, record.kind, Kind.READINESS),
        critical=bool(record.critical),
        result=one_of(Result, record.result, Result.NONE),
        fresh=now < record.fresh_until,
        failing_for=(now - record.failing_since) / 1e9 if record.failing_since else 0.0,
        message=record.message,
    )


def kinds(board: Board) -> dict[str, Kind]:
    """Return the names of all checks that any worker has, and their kinds."""
    records = (slot.check(index) for slot in board.used_slots() for index in range(slot.checks))
    return {record.name: one_of(Kind, record.kind, Kind.READINESS) for record in records}


def is_loopback(peer: str) -> bool:
    """Tell whether an address is of this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("10.0.0.7"), is_loopback("")
    (True, False, False)
    """
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def may_see(details: str, peer: str, default: str) -> bool:
    """Tell whether a client may see details, by the setting `DETAILS` and the default of the port."""
    details = details or default
    return details == "always" or (details == "loopback" and is_loopback(peer))


class Probes:
    """Which paths are probes, for one app, and the answers to them. For adaptors.

    `brought` is called for the app's own settings when they are first needed, and again after `forget()` and whenever
    the settings of the process, or its checks, have changed. `own` has the checks of this app, besides those that all
    apps share; in a worker of gunicorn, each app answers for all of them.
    """

    def __init__(
        self, brought: Callable[[], FrameworkSettings] | None = None, own: checks.Registry | None = None
    ) -> None:
        self._brought = brought
        self._own = own
        # Kept, since each request of the app is looked up in it; in one attribute, so that threads see all or nothing.
        self._made: tuple[int, Settings | None, dict[str, tuple[Probe, str]]] = (-1, None, {})

    def forget(self) -> None:
        """Have the app's settings read again: they have changed."""
        registry.changed()

    def asks(self, path: str) -> bool:
        """Tell whether a path is a probe; for everybody else's requests this is all that happens."""
        version, _, paths = self._made
        if version != registry.version:
            paths = self._make()
        return path in paths

    def must_wait(self) -> bool:
        """Whether an answer has to wait for the first results of checks: once, where there is no gunicorn."""
        return process.current().must_run_checks(self._checks)

    def wait(self) -> None:
        """Wait for them; in asyncio code in a thread."""
        process.current().results(self._checks)

    @property
    def _checks(self) -> checks.Registry:
        return self._own if self._own is not None else registry.shared

    def answer(self, path: str, method: str, *, query: str = "", accept: str = "", peer: str = "") -> Reply | None:
        """Return the reply to a probe; None when the path is none.

        `query` is the raw query string, `accept` the header, `peer` the client's address without its port.
        """
        if not self.asks(path):
            return None
        _, settings, paths = self._made
        asked = paths.get(path)
        if asked is None or settings is None:
            return None  # forgotten in between
        probe, only = asked
        here = process.current()
        if here.slot is not None:
            # A worker that answers is alive. After a pause (SIGSTOP, `docker pause`) it may answer before its next
            # heartbeat.
            here.slot.beat_at = clock.now_ns()
        results = here.results(self._checks)
        health = look(here.board, lame_duck_ready=settings.lame_duck_ready)
        if results is not here.board:
            health = health._replace(workers=look(results).workers)
        details = may_see(settings.details, peer, default="never")
        question = Question.read(method, query, accept, only=only, details=details)
        return answer(probe, question, health)

    def _make(self) -> dict[str, tuple[Probe, str]]:
        # First of all: what changes from here on changes the number again.
        version = registry.version
        here = process.current()
        settings = here.settings
        own = of_app(settings, here.fixed, self._brought()) if self._brought else settings
        if here.alone:
            # gunicorn's workers do so before they serve.
            checks.load(own.checks, into=self._checks)
            version = registry.version
        paths = table(own, self._checks.kinds() if here.alone else checks.kinds())
        self._made = version, own, paths
        return paths
