"""The commit window as a table: what is seen on a successor's board, and what is decided."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from zdd_web.board import Board, Heartbeat, Slot, WorkerState
from zdd_web.gunicorn.upgrade import heartbeats
from zdd_web.gunicorn.upgrade.commit_window import CommitWindow, Judgement, Seen, Window, judge
from zdd_web.gunicorn.upgrade.heartbeats import FROZEN_AFTER, Heartbeats, WorkerSeen, frozen
from zdd_web.health import Finding, Kind, Result, Status
from zdd_web.lifecycle import Phase
from zdd_web.system import clock

SECOND = 10**9
WINDOW = Window(began=100 * SECOND, seconds=1.0, limit=60.0)
AFTER, IN = WINDOW.ends + 1, WINDOW.began + 1

#: A worker that has sent a heartbeat since the end of the window, and one that has not.
HEARD, UNHEARD = WorkerSeen(11, beat_at=AFTER), WorkerSeen(12, beat_at=IN)
READY = HEARD._replace(state=WorkerState.READY)
RETIRING = UNHEARD._replace(retiring=True)
LEAVING = UNHEARD._replace(state=WorkerState.LEAVING, occupied=True)
BOOTING = UNHEARD._replace(pid=13, state=WorkerState.BOOTING, occupied=True, silence=40.0)
SEGFAULT = int(signal.SIGSEGV)
FAILED = Finding("database", Status.FAIL, "no connection", True, failing_for=0.2)
NO_RESULT = Finding("database", Status.FAIL, "no recent result", True)


def seen(*workers: WorkerSeen, elapsed: float = 1.1, **fields: object) -> Seen:
    return Seen(elapsed=elapsed, workers=workers, timeout=30.0, **fields)  # type: ignore[arg-type]


CONFIRMED = Judgement()
TABLE = {
    "all have sent a heartbeat": (seen(HEARD), seen(HEARD), CONFIRMED),
    "the window is not over": (
        seen(HEARD), seen(HEARD, elapsed=0.9), Judgement(waits_for="the end of COMMIT_WINDOW = 1 s"),
    ),
    "one has not sent a heartbeat yet": (
        seen(HEARD, UNHEARD), seen(HEARD, UNHEARD), Judgement(waits_for="a heartbeat of worker 12"),
    ),
    "one is not through the gate yet": (seen(READY), seen(READY), Judgement(waits_for="worker 11 to pass the gate")),
    "one crashes": (
        seen(HEARD), seen(lost=1, lost_pid=11, lost_status=SEGFAULT),
        Judgement("worker 11 ended in the commit window: killed by SIGSEGV"),
    ),
    "one crashes early in the window": (
        seen(HEARD, elapsed=0.3), seen(elapsed=0.3, lost=1, lost_pid=11, lost_status=3 << 8),
        Judgement("worker 11 ended in the commit window: exit status 3"),
    ),
    "one crashes and another is there at once": (
        seen(HEARD), seen(HEARD._replace(pid=19), lost=1, lost_pid=11, lost_status=SEGFAULT),
        Judgement("worker 11 ended in the commit window: killed by SIGSEGV"),
    ),
    "one crashes, and its slot is free a moment before it is counted": (
        seen(), seen(lost=1, lost_pid=11, lost_status=SEGFAULT),
        Judgement("worker 11 ended in the commit window: killed by SIGSEGV"),
    ),
    "one crashes under a master that does not say which": (
        seen(HEARD, RETIRING), seen(lost=1), Judgement("worker 11 ended in the commit window"),
    ),
    "one crashes that was never seen, under such a master": (
        seen(), seen(lost=1), Judgement("a worker ended in the commit window"),
    ),
    "one was lost before": (seen(HEARD, lost=1, lost_pid=7), seen(HEARD, lost=1, lost_pid=7), CONFIRMED),
    "one ends at the gate": (
        seen(READY), seen(lost_pid=11, lost_status=9),
        Judgement("worker 11 ended in the commit window: killed by SIGKILL"),
    ),
    "one that was told to leave is gone (max_requests, TTOU)": (seen(HEARD, RETIRING), seen(HEARD), CONFIRMED),
    "one was told to leave and is gone between two looks": (seen(HEARD, UNHEARD), seen(HEARD), CONFIRMED),
    "one leaves": (seen(HEARD, LEAVING), seen(HEARD, LEAVING), CONFIRMED),
    "one that was told to leave at the gate is gone": (
        seen(HEARD, READY._replace(pid=12, retiring=True)), seen(HEARD), CONFIRMED,
    ),
    "another boots (TTIN)": (seen(HEARD), seen(HEARD, BOOTING), CONFIRMED),
    "one is frozen": (
        seen(HEARD), seen(UNHEARD._replace(silence=5.2, idle_for=5.1)),
        Judgement("worker 12 has not sent a heartbeat for 5.2 s in the commit window"),
    ),
    "one is frozen at the gate": (
        seen(READY), seen(READY._replace(silence=6.0, idle_for=6.0)),
        Judgement("worker 11 has not sent a heartbeat for 6.0 s in the commit window"),
    ),
    "one has had a request in hand for long": (
        seen(HEARD), seen(HEARD, UNHEARD._replace(occupied=True, silence=29.0)),
        Judgement(waits_for="a heartbeat of worker 12"),
    ),
    "one has had a request in hand for longer than gunicorn allows": (
        seen(HEARD), seen(HEARD, UNHEARD._replace(occupied=True, silence=30.1)),
        Judgement("worker 12 has not sent a heartbeat for 30.1 s in the commit window"),
    ),
    "one has had a request in hand for longer than can be waited for": (
        seen(HEARD), seen(HEARD, UNHEARD._replace(occupied=True, silence=61), elapsed=61.0)._replace(timeout=0.0),
        CONFIRMED,
    ),
    "one does not come through the gate for ever": (
        seen(READY), seen(READY, elapsed=61.0),
        Judgement("the commit window was not over after 61 s: it waits for worker 11 to pass the "
                  "gate"),
    ),
    "one has ended by itself, and its replacement boots": (
        seen(HEARD, required=1), seen(BOOTING, required=1), Judgement(waits_for="1 workers to serve, of which 0 do"),
    ),
    "no replacement comes for ever": (
        seen(BOOTING, required=1), seen(BOOTING, required=1, elapsed=61.0),
        Judgement("the commit window was not over after 61 s: it waits for 1 workers to serve, of which 0 do"),
    ),
    "as many serve as did, and one more boots": (
        seen(HEARD, required=1), seen(HEARD, BOOTING, required=1), CONFIRMED,
    ),
    "one of another version sends none": (
        seen(HEARD), seen(UNHEARD._replace(known=False, silence=14.0)), CONFIRMED,
    ),
    "one of another version has sent none for longer than gunicorn allows": (
        seen(HEARD), seen(UNHEARD._replace(known=False, silence=30.1)),
        Judgement("worker 12 has not sent a heartbeat for 30.1 s in the commit window"),
    ),
    "a check fails": (
        seen(HEARD), seen(HEARD, failing=(FAILED,), elapsed=0.5),
        Judgement("check 'database' fails in the commit window: no connection"),
    ),
    "a check has no result yet": (
        seen(HEARD), seen(HEARD, failing=(NO_RESULT,)), Judgement(waits_for="a result of check 'database'"),
    ),
    "a check never has a result": (
        seen(HEARD), seen(HEARD, failing=(NO_RESULT,), elapsed=61.0),
        Judgement("the commit window was not over after 61 s: it waits for a result of check "
                  "'database'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_decision(case: str) -> None:
    before, now, decided = TABLE[case]
    assert judge(before, now, WINDOW) == decided


# -- what is seen


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The monotonic clock, standing still at its first element."""
    clocks = [WINDOW.began]
    monkeypatch.setattr(clock, "now_ns", lambda: clocks[0])
    monkeypatch.setattr(heartbeats.pauses, "since", lambda instant: (clocks[0] - instant) / 1e9)
    yield clocks


def board_of(*states: WorkerState, heartbeat: Heartbeat = Heartbeat.BETWEEN_REQUESTS) -> tuple[Board, list[Slot]]:
    board = Board.create("commit-window", slots=8)
    slots = []
    for age, state in enumerate(states, 1):
        slot = board.claim(age)
        slot.order.pid, slot.order.start, slot.state, slot.heartbeat = 10 + age, 1, state, heartbeat
        slot.beat_at = WINDOW.began
        slots.append(slot)
    board.header.phase = Phase.SERVING
    board.header.worker_timeout = 30 * SECOND
    return board, slots


@pytest.mark.parametrize(
    ("heartbeat", "in_flight", "occupied", "known"),
    [
        (Heartbeat.ALWAYS, 0, False, True),
        (Heartbeat.ALWAYS, 3, False, True),
        (Heartbeat.BETWEEN_REQUESTS, 0, False, True),
        (Heartbeat.BETWEEN_REQUESTS, 1, True, True),
        (Heartbeat.AFTER_CONNECTION, 0, True, True),
        (Heartbeat.UNKNOWN, 0, False, False),
        (99, 0, False, False),
    ],
)
def test_worker_that_may_be_silent(
    now: list[int], heartbeat: Heartbeat, in_flight: int, occupied: bool, known: bool
) -> None:
    board, (slot,) = board_of(WorkerState.SERVING, heartbeat=heartbeat)
    slot.in_flight = in_flight
    watch = Heartbeats(board, now[0])
    (before,) = watch.look()
    assert (before.occupied, before.known) == (occupied, known)
    now[0] += int((FROZEN_AFTER + 0.1) * SECOND)
    (after,) = watch.look()
    assert bool(frozen(after, watch.timeout)) == (known and not occupied)
    board.close()


def test_request_that_has_blocked_a_worker_for_long_ends_without_a_verdict(now: list[int]) -> None:
    board, (slot,) = board_of(WorkerState.SERVING)
    slot.in_flight = 1
    watch = Heartbeats(board, now[0])
    watch.look()
    now[0] += 20 * SECOND
    watch.look()
    # The request is over, and the heartbeat comes a moment later.
    slot.in_flight = 0
    (worker,) = watch.look()
    assert (worker.silence, worker.idle_for, frozen(worker, watch.timeout)) == (20.0, 0.0, "")
    now[0] += 6 * SECOND
    (worker,) = watch.look()
    assert frozen(worker, watch.timeout) == "worker 11 has not sent a heartbeat for 26.0 s"
    slot.beat_at = now[0]
    (worker,) = watch.look()
    assert frozen(worker, watch.timeout) == ""
    board.close()


def test_state_that_there_is_not_is_nothing_to_judge(now: list[int]) -> None:
    board, (slot,) = board_of(WorkerState.SERVING)
    window = CommitWindow(board, 1.0, 60.0)
    slot.state = 99
    now[0] += 10 * SECOND
    assert window.judge().reason == ""
    board.close()


def test_window_on_a_board(now: list[int]) -> None:
    board, slots = board_of(WorkerState.READY, WorkerState.READY)
    window = CommitWindow(board, 1.0, 60.0)
    assert window.judge().waits_for == "the end of COMMIT_WINDOW = 1 s"
    now[0] += SECOND
    for slot in slots:
        slot.state = WorkerState.SERVING
    slots[0].beat_at = now[0]
    assert window.judge().waits_for == "a heartbeat of worker 12"
    slots[1].beat_at = now[0]
    assert window.judge() == CONFIRMED
    slots[1].state = WorkerState.FREE
    board.header.lost_pid, board.header.lost_status, board.header.workers_lost = 12, SEGFAULT, 1
    assert window.judge().reason == "worker 12 ended in the commit window: killed by SIGSEGV"
    board.close()


def test_growth_of_a_canary_is_over_when_its_full_number_serves(now: list[int]) -> None:
    board, slots = board_of(WorkerState.SERVING, WorkerState.BOOTING, WorkerState.BOOTING)
    board.header.workers_wanted = board.header.workers_full = 3
    window = CommitWindow(board, 0.0, 60.0, grows=True)
    for slot in slots[:2]:
        slot.state, slot.beat_at = WorkerState.SERVING, now[0]
        assert window.judge().waits_for == f"3 workers to serve, of which {slots.index(slot) + 1} do"
    slots[2].state, slots[2].beat_at = WorkerState.SERVING, now[0]
    assert window.judge() == CONFIRMED
    board.close()


def test_growth_that_does_not_end_rejects_and_says_so(now: list[int]) -> None:
    board, (slot, _) = board_of(WorkerState.SERVING, WorkerState.BOOTING)
    # Its master has not turned since it was sent `grow`.
    board.header.workers_wanted, board.header.workers_full = 1, 2
    window = CommitWindow(board, 0.0, 60.0, grows=True)
    now[0] += 60 * SECOND
    slot.beat_at = now[0]
    assert window.judge().reason == (
        "the growth to its full size was not over after 60 s: it waits for 2 workers to serve, of which 1 do"
    )
    board.header.lost_pid, board.header.lost_status, board.header.workers_lost = 11, SEGFAULT, 1
    assert window.judge().reason == "worker 11 ended in the growth to its full size: killed by SIGSEGV"
    board.close()


def test_check_that_fails_in_all_workers_rejects(now: list[int]) -> None:
    board, slots = board_of(WorkerState.SERVING, WorkerState.SERVING)
    window = CommitWindow(board, 1.0, 60.0)
    for slot in slots:
        record = slot.check(0)
        record.name, record.kind, record.critical, record.message = "database", Kind.READINESS, 1, "no connection"
        record.result, record.fresh_until, record.failing_since = Result.FAILED, now[0] + 60 * SECOND, now[0] - SECOND
        slot.checks = 1
        reason = window.judge().reason
    assert reason == "check 'database' fails in the commit window: no connection (in 2 of 2 workers)"
    board.close()
