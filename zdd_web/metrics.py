"""What a service has done and what it is doing, counted from its boards.

Counters go on across workers that come and go: the master adds up what workers that have ended had counted. And across
generations: each begins with the totals of the one before it, and follows that one's board for as long as it drains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from zdd_web.board import LAYOUT, Board, Header, WorkerState
from zdd_web.board.record import LARGEST
from zdd_web.health import Kind, Result
from zdd_web.lifecycle import Phase
from zdd_web.system import clock

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Totals(NamedTuple):
    """Counts since the first generation began. The order is that on the board: append only, sixteen at most."""

    requests: int = 0
    server_errors: int = 0
    late_requests: int = 0
    workers_lost: int = 0
    upgrades_done: int = 0
    upgrades_failed: int = 0
    upgrades_refused: int = 0
    #: Nanoseconds, and no totals: the last ones.
    last_upgrade: int = 0
    last_drain: int = 0
    connections_handed_over: int = 0
    connections_received: int = 0
    connections_closed_idle: int = 0

    def at_least(self, other: Totals) -> Totals:
        """Return what is greater, field by field: a worker's count is nowhere for an instant when it has gone."""
        greater = Totals(*map(max, self, other))
        return greater._replace(last_upgrade=self.last_upgrade, last_drain=self.last_drain)


def before(board: Board) -> Totals:
    """Return what a generation began with."""
    words = board.header.words
    return Totals(*(words[Header.BEFORE_AT + index] for index in range(len(Totals._fields))))


def carry(board: Board, predecessor: Board) -> None:
    """Note on a generation's board what its predecessor has come to; the master's call."""
    if predecessor.header.layout != LAYOUT:
        return
    now = totals(predecessor).at_least(before(board))
    words = board.header.words
    for index, value in enumerate(now):
        words[Header.BEFORE_AT + index] = min(value, LARGEST)


def take_back(board: Board, successor: Board) -> None:
    """Add to a generation's board what a successor had counted that is lost; its master's call."""
    if successor.header.layout != LAYOUT:
        return
    began, ours = before(board), totals(board)
    more = totals(successor).at_least(ours)
    for index, name in enumerate(Totals._fields):
        if not name.startswith("last_"):
            had = getattr(began, name) + getattr(more, name) - getattr(ours, name)
            board.header.words[Header.BEFORE_AT + index] = min(had, LARGEST)


def totals(board: Board, predecessor: Board | None = None) -> Totals:
    """Add up a generation's counts and those from before it.

    >>> board = Board.private()
    >>> board.header.requests_gone = 3
    >>> totals(board).requests
    3
    """
    header, began = board.header, before(board)
    if predecessor is not None and predecessor.header.layout == LAYOUT:
        # It counts on, and what this generation's master has noted of it is a tick old.
        began = totals(predecessor).at_least(began)
    slots = list(board.taken_slots())
    requests, errors = board.answered()
    return Totals(
        requests=began.requests + requests,
        server_errors=began.server_errors + errors,
        late_requests=began.late_requests + header.late_gone + sum(slot.late for slot in slots),
        workers_lost=began.workers_lost + header.workers_lost,
        upgrades_done=began.upgrades_done + header.upgrades_done,
        upgrades_failed=began.upgrades_failed + header.upgrades_failed,
        upgrades_refused=began.upgrades_refused + header.upgrades_refused,
        last_upgrade=header.upgrade_took or began.last_upgrade,
        last_drain=header.drain_took or began.last_drain,
        connections_handed_over=began.connections_handed_over
        + header.handed_over_gone
        + sum(slot.handed_over for slot in slots),
        connections_received=began.connections_received + header.received_gone + sum(slot.received for slot in slots),
        connections_closed_idle=began.connections_closed_idle
        + header.closed_idle_gone
        + sum(slot.closed_idle for slot in slots),
    )


class Collector:
    """For `prometheus_client`: reads the board at each scrape."""

    def __init__(self, board: Board, predecessor: Board | None = None) -> None:
        self._board, self._predecessor = board, predecessor
        self._seen = Totals()
        #: Names of checks, and of the release, are for scrapers that may see details.
        self.details = True

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`. Raises `BoardError` for a board of another version."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(f"zdd_web_{name}", text, value=value)

        def counter(name: str, text: str, value: float) -> Metric:
            return CounterMetricFamily(f"zdd_web_{name}", text, value=value)

        board = self._board
        snapshot = board.snapshot()
        self._seen = total = totals(board, self._predecessor).at_least(self._seen)
        yield self._labelled("phase", "The generation's phase: 1 for the one it is in.", "phase",
                             {phase.label: phase is snapshot.phase for phase in Phase})  # fmt: skip
        yield gauge("generation", "The generation's number along a chain of upgrades.", snapshot.generation)
        silence = clock.since(snapshot.tick_at) if snapshot.tick_at else 0.0
        yield gauge("master_silence_seconds", "Since the master's main loop last ran.", silence)
        yield gauge("workers_wanted", "How many workers there should be.", snapshot.workers_wanted)
        states = Counter(worker.state for worker in snapshot.workers)
        yield self._labelled("workers", "Workers by what they do.", "state",
                             {state.label: states[state] for state in WorkerState if state})  # fmt: skip
        yield gauge("requests_in_flight", "Requests in hand.", snapshot.in_flight)
        yield counter("requests", "Requests that were answered.", total.requests)
        yield counter("server_errors", "Replies with a status of 500 or more, probes aside.", total.server_errors)
        yield counter("late_requests", "Requests that came after a stop had begun.", total.late_requests)
        yield counter("workers_lost", "Workers that ended without having been told to.", total.workers_lost)
        yield counter("connections_handed_over", "Kept connections that workers handed over as they left.",
                      total.connections_handed_over)  # fmt: skip
        yield counter("connections_received", "Kept connections that workers took over from others.",
                      total.connections_received)  # fmt: skip
        yield counter("connections_closed_idle", "Kept connections closed because a worker or the service ended.",
                      total.connections_closed_idle)  # fmt: skip
        yield gauge("background_tasks", "Background tasks in hand.", snapshot.tasks)
        yield gauge("background_oldest_seconds", "Age of the oldest background task in hand.", self._oldest())
        waiting, limits = {}, {}
        for each in board.listeners():
            waiting[each.name], limits[each.name] = each.length, each.limit
        yield self._labelled("accept_queue_length", "Connections that wait to be accepted.", "listener", waiting)
        yield self._labelled("accept_queue_limit", "How many may wait before they are dropped.", "listener", limits)
        upgrades = CounterMetricFamily("zdd_web_upgrades", "Upgrades by outcome.", labels=["outcome"])
        for outcome in ("done", "failed", "refused"):
            upgrades.add_metric([outcome], getattr(total, f"upgrades_{outcome}"))
        yield upgrades
        yield gauge("last_upgrade_seconds", "How long the last upgrade took, to its commit.", total.last_upgrade / 1e9)
        yield gauge("last_drain_seconds", "How long the last generation took to leave.", total.last_drain / 1e9)
        if not self.details:
            return
        if snapshot.release:
            yield self._labelled("info", "Which code the generation runs.", "release", {snapshot.release: 1})
        yield self._labelled("check_passes", "1 for a check that passes in every worker, 0 otherwise.", "check",
                             self._checks())  # fmt: skip

    def _labelled(self, name: str, text: str, label: str, values: dict[str, Any]) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"zdd_web_{name}", text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], float(value))
        return family

    def _oldest(self) -> float:
        # Read once: it may be over in between.
        began = [began for slot in self._board.taken_slots() if (began := slot.oldest_task)]
        return max(0.0, clock.since(min(began))) if began else 0.0

    def _checks(self) -> dict[str, bool]:
        passes: dict[str, bool] = {}
        now = clock.now_ns()
        for slot in self._board.taken_slots():
            if slot.state == WorkerState.SERVING:
                for record in (slot.check(index) for index in range(slot.checks)):
                    name = record.name
                    passes[name] = passes.get(name, True) and (
                        record.result == Result.PASSED
                        # What is asked once stays true.
                        and (now < record.fresh_until or record.kind == Kind.STARTUP)
                    )
        return passes


def exposition(collector: Collector, accept: str, *, details: bool = True) -> tuple[str, bytes]:
    """Return the content type and the body of an answer to a scrape, in the format that the client accepts.

    Raises ImportError without `prometheus_client`.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    collector.details = details
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        encode, content_type = choose_encoder(accept)
    except (ValueError, TypeError, LookupError):
        # A version in it that is not a number.
        encode, content_type = choose_encoder("")
    return content_type, encode(registry)
