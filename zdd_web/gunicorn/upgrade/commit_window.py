"""The commit window: whether a generation that has begun to serve goes on to.

Theory of operation
-------------------
From `go` on both generations accept. The window lasts `COMMIT_WINDOW` seconds, and then until each worker of the new
generation has sent a heartbeat: a worker that waits sends one each second, so with the default of one second this takes
no longer. A worker with a request in hand that blocks its heartbeat is waited for, for as long as gunicorn's `timeout`
allows that request, and at most for what is left of `UPGRADE_TIMEOUT`: nothing else tells it from one that is stuck.

In the window a generation is rejected when a worker ends without an order (a crash that its master answers with a new
worker at once included), when one is frozen (heartbeats.py), or when a check that counts fails in all workers. A worker
that is replaced (`max_requests`) or retired (TTOU) has the order of its master; one that boots (TTIN) is not judged. As
many workers as stood at the gate must serve at the end: one that has left by itself is replaced before the commit.

A canary (canary.py) has a second window, in which it grows to its full size. It ends when all of its workers serve.

`judge()` is the whole decision, pure: it compares what was seen with what was seen a moment before. `CommitWindow`
looks at the board for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from zdd_web.board import Board, WorkerState
from zdd_web.gunicorn.upgrade.heartbeats import AT_WORK, Heartbeats, WorkerSeen, frozen
from zdd_web.health import Finding, Probe, Status, examine
from zdd_web.lifecycle import Phase
from zdd_web.probes import look
from zdd_web.system import clock, pauses, proc

#: As reasons have the window, unless it is that of a canary which grows.
COMMIT_WINDOW = "the commit window"


class Window(NamedTuple):
    """When it began (monotonic nanoseconds), how long it lasts, and by how much it may be extended, seconds."""

    began: int
    seconds: float
    limit: float
    #: As reasons have it.
    name: str = COMMIT_WINDOW

    @property
    def ends(self) -> int:
        """When it ends unless it is extended, monotonic nanoseconds."""
        return self.began + int(self.seconds * 1e9)


class Seen(NamedTuple):
    """A generation in its commit window, at an instant."""

    #: Seconds since the window began, without pauses of this process.
    elapsed: float = 0.0
    workers: tuple[WorkerSeen, ...] = ()
    #: How many workers its master has lost, the last of them, and its wait status.
    lost: int = 0
    lost_pid: int = 0
    lost_status: int = 0
    #: gunicorn's `timeout`, seconds; 0 for none.
    timeout: float = 0.0
    #: How many workers must serve: those that stood at the gate, or as many as are wanted since.
    required: int = 0
    #: Checks that count and fail in all workers; those that have no result have not failed.
    failing: tuple[Finding, ...] = ()


class Judgement(NamedTuple):
    """`reason` when the generation is rejected, `waits_for` while it cannot be said; both empty: it is confirmed."""

    reason: str = ""
    waits_for: str = ""

    @property
    def confirmed(self) -> bool:
        """Whether the generation may be committed."""
        return not self.reason and not self.waits_for


def judge(before: Seen, now: Seen, window: Window) -> Judgement:
    """Judge a generation by two looks at it, one after the other.

    >>> window = Window(began=0, seconds=1.0, limit=60.0)
    >>> well = Seen(elapsed=1.02, workers=(WorkerSeen(11, beat_at=1_010_000_000),))
    >>> judge(well, well, window)
    Judgement(reason='', waits_for='')
    >>> judge(well, Seen(elapsed=1.04, lost=1, lost_pid=11, lost_status=9), window).reason
    'worker 11 ended in the commit window: killed by SIGKILL'
    """
    reason = _ended(before, now, window) or _frozen(now, window) or _unready(now, window)
    if reason:
        return Judgement(reason=reason)
    if now.elapsed < window.seconds:
        return Judgement(waits_for=f"the end of COMMIT_WINDOW = {window.seconds:g} s")
    late = [(worker, text) for worker in now.workers if (text := _outstanding(worker, window))]
    unknown = [f"a result of check {each.name!r}" for each in now.failing]
    serving = sum(worker.state == WorkerState.SERVING and not worker.retiring for worker in now.workers)
    if serving < now.required:
        # A worker may end by itself, with status 0, which its master does not count as lost.
        unknown.append(f"{now.required} workers to serve, of which {serving} do")
    if now.elapsed >= window.seconds + window.limit:
        # Nothing more will be known of a worker whose requests may take longer than this.
        late = [(worker, text) for worker, text in late if not worker.occupied]
        left = _joined(late, unknown)
        over = f"{window.name} was not over after {now.elapsed:.0f} s: it waits for {left}"
        return Judgement(reason=over if left else "")
    return Judgement(waits_for=_joined(late, unknown))


def _joined(late: list[tuple[WorkerSeen, str]], unknown: list[str]) -> str:
    return "; ".join([*(text for _, text in late), *unknown])


def _ended(before: Seen, now: Seen, window: Window) -> str:
    here = {worker.pid for worker in now.workers}
    lost = now.lost > before.lost
    # One that was ready and has not begun to serve is not counted as lost by its master.
    at_gate = [each for each in before.workers if each.pid not in here and each.state == WorkerState.READY]
    at_gate = [worker for worker in at_gate if not worker.retiring]
    if not lost and not at_gate:
        return ""
    missing = [worker.pid for worker in before.workers if worker.pid not in here and not worker.retiring]
    pid = now.lost_pid if lost and now.lost_pid else next(iter(missing), 0)
    how = f": {proc.describe(now.lost_status)}" if pid and pid == now.lost_pid else ""
    return f"worker {pid} ended in {window.name}{how}" if pid else f"a worker ended in {window.name}"


def _frozen(now: Seen, window: Window) -> str:
    judged = (worker for worker in now.workers if worker.state in AT_WORK and not worker.retiring)
    silent = next(filter(None, (frozen(worker, now.timeout) for worker in judged)), "")
    return f"{silent} in {window.name}" if silent else ""


def _unready(now: Seen, window: Window) -> str:
    failed = (each for each in now.failing if each.failing_for)
    return next((f"check {each.name!r} fails in {window.name}: {each.text}" for each in failed), "")


def _outstanding(worker: WorkerSeen, window: Window) -> str:
    if worker.retiring or not worker.known:
        return ""
    if worker.state == WorkerState.READY:
        return f"worker {worker.pid} to pass the gate"
    if worker.state == WorkerState.SERVING and worker.beat_at < window.ends:
        return f"a heartbeat of worker {worker.pid}"
    return ""


class CommitWindow:
    """A window that has begun, on the board of the new generation."""

    def __init__(self, board: Board, seconds: float, limit: float, *, grows: bool = False) -> None:
        """`grows` for a generation of which more workers are to serve than stood at the gate: all."""
        self._board, self._grows = board, grows
        name = "the growth to its full size" if grows else COMMIT_WINDOW
        self.window = Window(clock.now_ns(), seconds, limit, name)
        self._heartbeats = Heartbeats(board, self.window.began)
        at_work = (WorkerState.READY, WorkerState.SERVING)
        self._at_gate = sum(slot.state in at_work for slot in board.taken_slots())
        self._before = self._look()

    def judge(self) -> Judgement:
        """Look, and judge."""
        before, self._before = self._before, self._look()
        return judge(before, self._before, self.window)

    def _look(self) -> Seen:
        header = self._board.header
        # First of all: a worker that is counted is named, since the master writes the name before the number.
        lost = header.workers_lost
        return Seen(
            elapsed=pauses.since(self.window.began),
            workers=self._heartbeats.look(),
            lost=lost,
            lost_pid=header.lost_pid,
            lost_status=header.lost_status,
            timeout=self._heartbeats.timeout,
            required=header.workers_full if self._grows else min(self._at_gate, header.workers_wanted),
            failing=tuple(self._failing()),
        )

    def _failing(self) -> Iterator[Finding]:
        if self._board.header.phase != Phase.SERVING:
            return
        health = look(self._board)
        for probe in (Probe.READINESS, Probe.LIVENESS):
            for each in examine(probe, health):
                if each.is_check and each.status is Status.FAIL:
                    yield each
