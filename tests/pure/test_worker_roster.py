"""Who comes and who goes: the plan as tables and for any workers at all, the books on a real board."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.board import Board, Slot, WorkerState
from zdd_web.board.record import LARGEST_COUNT
from zdd_web.errors import BoardError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.master import worker_roster as module
from zdd_web.gunicorn.master.worker_plan import Member, Plan, plan
from zdd_web.gunicorn.master.worker_roster import Roster
from zdd_web.lifecycle import SPAWNING, Phase
from zdd_web.system import clock

BOOTING, READY, SERVING, LEAVING = (
    WorkerState.BOOTING,
    WorkerState.READY,
    WorkerState.SERVING,
    WorkerState.LEAVING,
)


def old(pid: int, state: WorkerState = SERVING, *, told: bool = False) -> Member:
    """A worker from before a reload; in these tables the pid is the age too."""
    return Member(pid, pid, state, told=told, outdated=True)


def new(pid: int, state: WorkerState = SERVING, *, told: bool = False) -> Member:
    return Member(pid, pid, state, told=told)


# -- the plan, as tables


LINGERS = Member(1, 1, LEAVING, lingers=True)


@pytest.mark.parametrize(
    ("members", "wanted", "expected"),
    [
        pytest.param([], 2, Plan(spawn=2), id="nobody: all"),
        pytest.param([], 0, Plan(), id="nobody wanted"),
        pytest.param([new(1)], 2, Plan(spawn=1), id="one is missing"),
        pytest.param([new(1), new(2)], 2, Plan(), id="all are here"),
        pytest.param([new(1, BOOTING)], 1, Plan(), id="one that boots is on its way"),
        pytest.param([new(1, READY)], 1, Plan(), id="one at the gate is on its way"),
        pytest.param([new(1, LEAVING)], 1, Plan(spawn=1), id="one that leaves counts for nothing"),
        pytest.param(
            [LINGERS], 1, Plan(spawn=1, retire=(1,)), id="one that says it leaves, and stays, gets a deadline"
        ),
        pytest.param([new(1, told=True)], 1, Plan(spawn=1), id="one that was told counts for nothing"),
        pytest.param([new(1), new(2), new(3)], 2, Plan(retire=(1,)), id="one too many: the oldest goes"),
        pytest.param([new(3), new(1), new(2)], 1, Plan(retire=(1, 2)), id="by age, not by order"),
        pytest.param([new(1), new(2), new(3)], 0, Plan(retire=(1, 2, 3)), id="none wanted: all go"),
        pytest.param([new(1), new(2, BOOTING), new(3, BOOTING)], 2, Plan(), id="too many, but too few serve"),
        pytest.param([new(1, told=True), new(2), new(3)], 2, Plan(), id="the one too many was told"),
        pytest.param([old(1), old(2)], 2, Plan(spawn=2), id="reload: as many new ones"),
        pytest.param([old(1), old(2), new(3, BOOTING), new(4, BOOTING)], 2, Plan(), id="reload: nobody goes yet"),
        pytest.param([old(1), old(2), new(3), new(4, BOOTING)], 2, Plan(retire=(1,)), id="reload: one for one"),
        pytest.param([old(1, told=True), old(2), new(3), new(4)], 2, Plan(retire=(2,)), id="reload: the last"),
        pytest.param([new(1), old(2), new(3)], 2, Plan(retire=(2,)), id="the outdated first, whatever its age"),
        pytest.param([old(1, BOOTING), new(2)], 1, Plan(retire=(1,)), id="an outdated one that boots is useless"),
        pytest.param([old(1), old(2, READY)], 1, Plan(spawn=1, retire=(2,)), id="an outdated one at the gate"),
        pytest.param([old(1, LEAVING), old(2)], 1, Plan(spawn=1), id="an outdated one that leaves anyway"),
    ],
)
@pytest.mark.parametrize("phase", sorted(SPAWNING))
def test_plan_while_workers_are_wanted(members: list[Member], wanted: int, expected: Plan, phase: Phase) -> None:
    assert plan(members, wanted, phase) == expected


@pytest.mark.parametrize(
    ("members", "room", "expected"),
    [
        pytest.param([], 1, Plan(spawn=1, without_room=1), id="the others later"),
        pytest.param([old(1), old(2)], 1, Plan(spawn=1, without_room=1), id="reload: one at a time"),
        pytest.param([old(1), old(2)], 0, Plan(without_room=2), id="reload: none can come, none goes"),
        pytest.param([old(1), old(2), new(3)], 0, Plan(retire=(1,), without_room=1), id="reload: one makes room"),
        pytest.param([new(1), new(2)], 0, Plan(), id="all are here"),
    ],
)
def test_no_more_are_spawned_than_there_is_room_for(members: list[Member], room: int, expected: Plan) -> None:
    assert plan(members, 2, Phase.SERVING, room) == expected


@pytest.mark.parametrize(("wanted", "slots"), [(1, 2), (3, 4), (4, 5), (5, 8), (300, 512), (511, 512)])
def test_all_are_replaced_with_the_slots_there_are_and_capacity_never_falls(wanted: int, slots: int) -> None:
    members, pid = [old(pid) for pid in range(1, wanted + 1)], wanted
    while any(member.outdated for member in members):
        decision = plan(members, wanted, Phase.SERVING, slots - len(members))
        assert decision.spawn or decision.retire, "stuck"
        members = [member for member in members if member.pid not in decision.retire]
        for _ in range(decision.spawn):
            pid += 1
            members.append(new(pid))
        assert wanted <= len(members) <= slots
    assert plan(members, wanted, Phase.SERVING, slots - len(members)).spawn == 0


@pytest.mark.parametrize("phase", sorted(set(Phase) - SPAWNING))
def test_plan_on_the_way_out_tells_everybody_once(phase: Phase) -> None:
    members = [new(1), old(2), new(3, BOOTING), new(4, READY), new(5, LEAVING), new(6, told=True)]
    assert plan(members, 2, phase) == Plan(spawn=0, retire=(1, 2, 3, 4, 5))


# -- the plan, whatever there is


@st.composite
def workers(draw: st.DrawFn) -> list[Member]:
    ages = draw(st.lists(st.integers(1, 50), unique=True, max_size=12))
    return [
        Member(
            pid=1000 + age,
            age=age,
            state=draw(st.sampled_from([BOOTING, READY, SERVING, LEAVING])),
            told=draw(st.booleans()),
            outdated=draw(st.booleans()),
        )
        for age in ages
    ]


WANTED = st.integers(0, 8)


def serving(members: list[Member]) -> list[Member]:
    return [member for member in members if member.state is SERVING and not member.told]


@given(members=workers(), wanted=WANTED, phase=st.sampled_from(sorted(SPAWNING)))
def test_capacity_never_falls_below_what_is_wanted_by_our_own_doing(
    members: list[Member], wanted: int, phase: Phase
) -> None:
    retired = plan(members, wanted, phase).retire
    left = [member for member in serving(members) if member.pid not in retired]
    assert len(left) >= min(wanted, len(serving(members)))


@given(members=workers(), wanted=WANTED, phase=st.sampled_from(sorted(set(Phase) - SPAWNING)))
def test_nobody_is_spawned_and_everybody_told_on_the_way_out(members: list[Member], wanted: int, phase: Phase) -> None:
    assert plan(members, wanted, phase) == Plan(0, tuple(member.pid for member in members if not member.told))


@given(members=workers(), wanted=WANTED, phase=st.sampled_from(Phase))
def test_nobody_is_told_twice(members: list[Member], wanted: int, phase: Phase) -> None:
    retired = plan(members, wanted, phase).retire
    assert len(set(retired)) == len(retired)
    assert not {member.pid for member in members if member.told} & set(retired)


@given(members=workers(), wanted=WANTED, phase=st.sampled_from(sorted(SPAWNING)))
def test_outdated_go_before_current_and_old_before_young(members: list[Member], wanted: int, phase: Phase) -> None:
    retired = plan(members, wanted, phase).retire
    stay = [member for member in serving(members) if member.pid not in retired]
    go = [member for member in serving(members) if member.pid in retired]
    for gone in go:
        for kept in stay:
            assert (not gone.outdated, gone.age) < (not kept.outdated, kept.age)


@given(members=workers(), wanted=WANTED)
def test_enough_are_on_their_way_after_the_plan(members: list[Member], wanted: int) -> None:
    decision = plan(members, wanted, Phase.SERVING)
    current = [member for member in members if not (member.outdated or member.told or member.state is LEAVING)]
    staying = [member for member in current if member.pid not in decision.retire]
    assert len(staying) + decision.spawn >= wanted
    assert decision.spawn == 0 or len(current) + decision.spawn == wanted


@given(members=workers(), wanted=WANTED, phase=st.sampled_from(sorted(SPAWNING)), data=st.data())
def test_plans_carried_out_lead_to_the_wanted_number_of_current_workers(
    members: list[Member], wanted: int, phase: Phase, data: st.DataObject
) -> None:
    """Workers boot, leave and end in any order, and the capacity does not fall meanwhile."""
    step = {BOOTING: READY, READY: SERVING}
    age = 5000
    least = min(wanted, len(serving(members)))
    for _ in range(200):
        decision = plan(members, wanted, phase)
        members = [m._replace(told=m.told or m.pid in decision.retire) for m in members]
        assert len(serving(members)) >= least
        for _ in range(decision.spawn):
            age += 1
            members.append(Member(pid=age, age=age, state=BOOTING))
        movers = [m for m in members if m.told or m.state is not SERVING]
        if not movers:
            break
        mover = data.draw(st.sampled_from(movers)) if len(movers) > 1 else movers[0]
        members.remove(mover)
        if not mover.told and mover.state in step:
            members.append(mover._replace(state=step[mover.state]))
        least = max(least, min(wanted, len(serving(members))))
    assert len(members) == len(serving(members)) == wanted
    assert not any(member.outdated for member in members)


# -- the books


class Worker:
    """gunicorn's worker object, as far as the roster looks at it."""

    def __init__(self, age: int) -> None:
        self.age: int = age
        self.pid: int | str = "[booting]"


class Server:
    """gunicorn's arbiter, as far as the roster looks at it: forks nobody, and writes down whom it signals."""

    def __init__(self) -> None:
        self.WORKERS: dict[int, Worker] = {}
        self.worker_age = 0
        self.signals: list[tuple[int, signal.Signals]] = []

    def kill_worker(self, pid: int, sig: signal.Signals) -> None:
        self.signals.append((pid, sig))


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create("unit", slots=4)
    yield board
    board.close()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def roster(server: Server, board: Board) -> Iterator[Roster]:
    roster = Roster(ArbiterFacade(server), board)
    yield roster
    roster._places.clear()  # a slot that is still held keeps the board mapped


def hire(roster: Roster, server: Server, pid: int, state: WorkerState = SERVING) -> Worker:
    """Do what gunicorn does to spawn a worker, with our hooks, and what the worker then says of itself."""
    server.worker_age += 1
    worker = Worker(server.worker_age)
    slot = roster.claim(worker)
    worker.pid = pid
    server.WORKERS[pid] = worker
    roster.note_forks()
    slot.state = state
    return worker


def test_members_are_what_the_workers_say_on_the_board(roster: Roster, server: Server) -> None:
    first = hire(roster, server, 11)
    hire(roster, server, 12, BOOTING)
    roster.slot_of(first).order.retire = 1
    assert roster.members() == [Member(11, 1, SERVING, told=True), Member(12, 2, BOOTING)]
    assert len(roster) == 2


def test_reload_outdates_those_who_are_here_and_no_later_ones(roster: Roster, server: Server) -> None:
    hire(roster, server, 11)
    roster.outdate()
    hire(roster, server, 12)
    assert [(member.pid, member.outdated) for member in roster.members()] == [(11, True), (12, False)]


def test_reaped_worker_is_reported_and_its_slot_is_free_for_the_next(
    roster: Roster, server: Server, board: Board
) -> None:
    worker = hire(roster, server, 11, BOOTING)
    hire(roster, server, 12)
    slot = roster.slot_of(worker)
    slot.error = "ImportError: shop"
    assert roster.reconcile() == []
    del server.WORKERS[11]
    (gone,) = roster.reconcile()
    assert (gone.pid, gone.state, gone.error, gone.told) == (11, BOOTING, "ImportError: shop", False)
    assert roster.reconcile() == []
    assert board.worker_pids() == [(12, 0)]
    assert roster.slot_of(hire(roster, server, 13)).base == slot.base


def test_reused_pid_does_not_keep_a_dead_worker_on_the_books(roster: Roster, server: Server) -> None:
    hire(roster, server, 11)
    again = hire(roster, server, 11)
    assert [gone.pid for gone in roster.reconcile()] == [11]
    assert [member.age for member in roster.members()] == [again.age]


def test_worker_that_died_before_it_took_its_slot_is_reported_by_its_pid(roster: Roster, server: Server) -> None:
    hire(roster, server, 11, BOOTING)
    del server.WORKERS[11]
    assert [(gone.pid, gone.state) for gone in roster.reconcile()] == [(11, BOOTING)]


def test_worker_that_gave_work_up_has_that_reported(roster: Roster, server: Server) -> None:
    worker = hire(roster, server, 11, LEAVING)
    roster.slot_of(worker).abandoned = 3
    roster.retire([11], clock.NEVER)
    del server.WORKERS[11]
    assert [(gone.abandoned, gone.told) for gone in roster.reconcile()] == [(3, True)]
    assert roster.slot_of(hire(roster, server, 12)).abandoned == 0


@pytest.mark.parametrize(
    ("state", "status", "lost"),
    [
        pytest.param(SERVING, 0, True, id="it ended by itself"),
        pytest.param(SERVING, signal.SIGKILL, True, id="killed"),
        pytest.param(SERVING, None, True, id="its end was not seen"),
        pytest.param(LEAVING, 1 << 8, True, id="timeout"),
        pytest.param(LEAVING, signal.SIGKILL, True, id="killed after a timeout"),
        pytest.param(LEAVING, 0, False, id="SIGTERM from a person"),
        pytest.param(BOOTING, 1 << 8, False, id="it had not served"),
    ],
)
def test_worker_is_lost_that_served_and_ended_without_an_order(
    roster: Roster, server: Server, state: WorkerState, status: int | None, lost: bool
) -> None:
    for pid in (11, 12):
        hire(roster, server, pid, state)
        if status is not None:
            roster.reaped(pid, status)
    roster.retire([12], clock.NEVER)
    server.WORKERS.clear()
    assert [gone.lost for gone in roster.reconcile()] == [lost, False]


def test_full_board_refuses_a_worker_and_keeps_the_books(roster: Roster, server: Server) -> None:
    for pid in range(4):
        hire(roster, server, 11 + pid)
    with pytest.raises(BoardError):
        roster.claim(Worker(5))
    assert len(roster) == 4


def test_a_worker_among_many_costs_no_more_than_one_among_few(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: Counter[str] = Counter()
    order = Board.order

    def counted(board: Board, index: int) -> object:
        looks["orders"] += 1
        return order(board, index)

    monkeypatch.setattr(Board, "order", counted)
    monkeypatch.setattr("zdd_web.system.proc.start_time", lambda pid: looks.update(["processes"]) or 1)
    board = Board.create("unit", slots=128)
    roster = Roster(ArbiterFacade(server), board)
    for pid in range(1, 129):
        hire(roster, server, pid)
    assert looks == {"orders": 128, "processes": 128}
    # The last slot that was freed is found as fast.
    del server.WORKERS[1], server.WORKERS[128]
    assert sorted(gone.pid for gone in roster.reconcile()) == [1, 128]
    looks.clear()
    bases = [roster.slot_of(hire(roster, server, pid)).base for pid in (129, 130)]
    assert bases == [board.slot(0).base, board.slot(127).base]
    assert looks["orders"] <= 128 + 2
    roster._places.clear()
    board.close()


def test_order_stands_on_the_board_before_the_signal_is_sent(
    roster: Roster, server: Server, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_signal: list[tuple[int, signal.Signals, int, int]] = []

    def look(pid: int, sig: signal.Signals) -> None:
        slot = board.slot(0)
        at_signal.append((pid, sig, slot.retire, slot.retire_deadline))

    monkeypatch.setattr(server, "kill_worker", look)
    hire(roster, server, 11)
    hire(roster, server, 12)
    roster.retire([11], 12345)
    assert at_signal == [(11, signal.SIGTERM, 1, 12345)]
    assert [member.told for member in roster.members()] == [True, False]


def test_those_who_were_told_are_told_again_and_nobody_else(
    roster: Roster, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hire(roster, server, 11)
    hire(roster, server, 12)
    roster.retire([11], clock.NEVER)
    monkeypatch.setattr(module, "REPEAT_TERM", 3600.0)
    roster.repeat()
    assert server.signals == [(11, signal.SIGTERM)]
    monkeypatch.setattr(module, "REPEAT_TERM", 0.0)
    roster.repeat()
    assert server.signals == [(11, signal.SIGTERM)] * 2


def test_kill_spares_nobody_and_counts(roster: Roster, server: Server) -> None:
    hire(roster, server, 11)
    hire(roster, server, 12, BOOTING)
    assert roster.kill() == 2
    assert server.signals == [(11, signal.SIGKILL), (12, signal.SIGKILL)]


# -- back-off


def test_nothing_holds_the_first_spawn(roster: Roster) -> None:
    assert roster.may_spawn() is True


def test_failed_boots_wait_longer_each_time_up_to_a_limit(roster: Roster) -> None:
    waits = [roster.boot_failed() for _ in range(15)]
    assert waits[:4] == [0.5, 0.75, 1.125, 1.6875]
    assert waits == sorted(waits)
    assert waits[-1] == 30.0
    assert roster.may_spawn() is False


def test_boot_that_succeeds_starts_the_back_off_anew(roster: Roster) -> None:
    roster.boot_failed()
    roster.boot_failed()
    roster.booted()
    assert roster.may_spawn() is True
    assert roster.boot_failed() == 0.5


def test_spawning_goes_on_after_the_wait(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_FIRST", 0.0)
    roster.boot_failed()
    assert roster.may_spawn() is True


def test_back_off_lasts_as_long_as_the_failures_do(roster: Roster) -> None:
    # At one every 30 s this is a weekend of broken code on disk.
    assert {roster.boot_failed() for _ in range(8_000)} <= {0.5 * 1.5**n for n in range(11)} | {30.0}
    assert roster.may_spawn() is False


# -- what a worker claims


def test_a_worker_that_has_served_cannot_take_that_back(roster: Roster, server: Server) -> None:
    worker = hire(roster, server, 11)
    assert [member.state for member in roster.members()] == [SERVING]
    roster.slot_of(worker).state = BOOTING
    assert [member.state for member in roster.members()] == [SERVING]
    del server.WORKERS[11]
    assert [gone.lost for gone in roster.reconcile()] == [True]


def test_a_pid_in_a_slot_is_not_a_worker(roster: Roster, server: Server, board: Board) -> None:
    worker = hire(roster, server, 11)
    slot = roster.slot_of(worker)
    slot.pid, slot.start = 1, 1
    assert board.worker_pids() == [(11, 0)]
    assert roster.kill() == 1
    assert server.signals == [(11, signal.SIGKILL)]


def test_claims_that_cannot_be_true_are_counted_within_bounds(roster: Roster, server: Server, board: Board) -> None:
    worker = hire(roster, server, 11)
    slot = roster.slot_of(worker)
    for at in range(slot.base, slot.base + Slot.WORDS):
        slot.words[at] = 2**64 - 1
    assert [member.state for member in roster.members()] == [LEAVING]
    assert 0 < roster.unfinished() <= LARGEST_COUNT
    del server.WORKERS[11]
    (gone,) = roster.reconcile()
    assert gone.pid == 11
    assert max(gone.requests, gone.late, gone.in_flight, gone.abandoned, gone.server_errors) <= LARGEST_COUNT
    for _ in range(2):
        board.header.requests_gone += 2**64 - 1
    assert board.header.requests_gone == 2**64 - 1


def test_a_worker_that_outlives_its_deadline_is_killed_once(roster: Roster, server: Server) -> None:
    hire(roster, server, 11)
    hire(roster, server, 12)
    roster.retire([11], clock.after_ns(-10))
    assert roster.kill_overdue(3600) == []
    assert roster.kill_overdue(5) == [11]
    assert roster.kill_overdue(5) == []
    assert server.signals == [(11, signal.SIGTERM), (11, signal.SIGKILL)]
