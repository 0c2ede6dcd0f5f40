"""The exchange of kept connections: the master's pair, and when a worker gives, takes, and closes."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.board import Board
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.sockets.exchange import Exchange
from zdd_web.gunicorn.workers import kept_connections
from zdd_web.gunicorn.workers.kept_connections import (
    GIVEN_AT_ONCE,
    LEFT_AT_LEAST,
    REST,
    TAKEN_AT_ONCE,
    KeptConnections,
)
from zdd_web.lifecycle import Phase
from zdd_web.system import clock, connection_passing
from zdd_web.system.connection_passing import Handed

# -- the master's side


def inheritance(**fields: Any) -> Inheritance:
    return Inheritance(2, 1, -1, -1, -1, (), (), **fields)


def test_first_master_makes_a_pair_and_its_successor_adopts_it() -> None:
    first = Exchange()
    given = {name: os.dup(fd) for name, fd in first.inheritance().items()}
    successor = Exchange(inheritance(**given))
    assert (first.was_inherited, successor.was_inherited) == (False, True)
    assert first.give is not None and successor.take is not None
    server, client = socket.socketpair()
    assert connection_passing.send(first.give, server.fileno(), Handed(1.0, 0, ""))
    received = connection_passing.receive(successor.take)
    assert received is not None
    for each in (first, successor, server, client, received[0]):
        each.close()
    assert not first.is_on


def test_successor_of_a_version_without_a_pair_makes_one() -> None:
    made = Exchange(inheritance())
    assert (made.is_on, made.was_inherited) == (True, False)
    assert not any(map(os.get_inheritable, made.descriptors()))
    made.close()


def test_where_it_is_off_there_is_no_pair_and_an_inherited_one_is_closed() -> None:
    assert Exchange(is_on=False).inheritance() == {}
    first = Exchange()
    fds = [os.dup(fd) for fd in first.descriptors()]
    off = Exchange(inheritance(exchange_give=fds[0], exchange_take=fds[1]), is_on=False)
    assert (off.is_on, off.descriptors()) == (False, [])
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    first.close()


def test_descriptors_that_are_not_a_pair_are_closed_and_a_pair_is_made(caplog: pytest.LogCaptureFixture) -> None:
    fds = [os.open(os.devnull, os.O_RDWR) for _ in range(2)]
    made = Exchange(inheritance(exchange_give=fds[0], exchange_take=fds[1]))
    assert (made.is_on, made.was_inherited) == (True, False)
    made.close()


def test_pair_is_among_what_an_exec_and_a_takeover_hand_on() -> None:
    given = inheritance(exchange_give=7, exchange_take=8, board=5)
    assert {7, 8} <= set(given.descriptors)
    fields, descriptors = given.to_message()
    assert fields["descriptors"] == ["boot_log", "board", "exchange_give", "exchange_take"]
    taken = Inheritance.from_message(fields, [11, 15, 17, 18], channel=3, predecessor=1, start=2)
    assert (taken.exchange_give, taken.exchange_take, taken.board) == (17, 18, 15)
    assert len(descriptors) == 4


def test_handoff_of_a_version_without_a_pair_is_read() -> None:
    given = inheritance()._asdict()
    del given["exchange_give"], given["exchange_take"]
    assert Inheritance._read(given).exchange_give == -1


# -- the worker's side

#: A pid that no process has.
GONE = 1 << 22


class Store:
    """Connections of a worker that has no loop."""

    can_travel = True

    def __init__(self) -> None:
        self.kept: list[tuple[socket.socket, Handed]] = []
        self.clients: list[socket.socket] = []
        self.closed = 0
        self.limit = 1000
        self.asked = 0
        self.watches = False
        self.http2 = False

    def connect(self, count: int) -> None:
        for _ in range(count):
            server, client = socket.socketpair()
            self.kept.append((server, Handed(5.0, 1, "")))
            self.clients.append(client)

    def in_loop(self, function: Callable[[], Any]) -> Any:
        return function()

    def idle(self) -> list[Any]:
        return list(self.kept)

    def closable(self) -> list[Any]:
        return self.idle()

    def describe(self, connection: Any) -> tuple[int, Handed]:
        return connection[0].fileno(), connection[1]

    def forget(self, connection: Any) -> None:
        self.kept.remove(connection)
        connection[0].close()

    def close_idle(self, connection: Any) -> bool:
        self.forget(connection)
        self.closed += 1
        return True

    def keep(self, connection: socket.socket, handed: Handed) -> None:
        self.kept.append((connection, handed))

    def room(self) -> int:
        self.asked += 1
        return self.limit - len(self.kept)

    def in_hand(self) -> int:
        return len(self.kept)

    def must_end(self) -> bool:
        return self.http2

    def watch(self, *, is_on: bool) -> None:
        self.watches = is_on

    def close(self) -> None:
        for each in (*(connection for connection, _ in self.kept), *self.clients):
            each.close()


@dataclasses.dataclass
class Worker:
    """A worker as far as the exchange goes; several share a pair."""

    pair: Exchange
    board: Board = dataclasses.field(default_factory=Board.private)
    going: bool = False
    ppid: int = dataclasses.field(default_factory=os.getppid)

    def __post_init__(self) -> None:
        self.store, self.slot = Store(), self.board.slot(0)
        self.process = SimpleNamespace(going=False, deadline_ns=clock.NEVER, is_leaving=self.is_leaving)
        self.runtime = SimpleNamespace(
            board=self.board, slot=self.slot, process=self.process, pid=os.getpid(),
            worker=SimpleNamespace(ppid=self.ppid), settings=SimpleNamespace(drain_delay=10.0),
        )  # fmt: skip
        self.kept = KeptConnections(self.runtime, self.pair)  # type: ignore[arg-type]
        self.kept.store = self.store

    def is_leaving(self) -> bool:
        return self.process.going or bool(self.slot.retire) or self.board.header.phase != Phase.SERVING

    def leave(self) -> None:
        self.slot.order.retire = 1
        self.process.going = True


@pytest.fixture
def pair() -> Iterator[Exchange]:
    made = Exchange()
    yield made
    made.close()


@pytest.fixture
def make(pair: Exchange) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def worker(**fields: Any) -> Worker:
        made.append(Worker(pair, **fields))
        return made[-1]

    yield worker
    for each in made:
        each.store.close()


def test_what_one_worker_gives_another_takes_bit_by_bit(make: Callable[..., Worker]) -> None:
    leaving, serving = make(), make()
    leaving.store.connect(GIVEN_AT_ONCE + 10)
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, None)
    assert hand_over is not None
    assert not hand_over.over() and len(leaving.store.kept) == 10
    asked = serving.store.asked
    assert serving.kept.take_some() == TAKEN_AT_ONCE
    assert serving.store.asked == asked + 1, "asyncio's workers would walk thousands for each"
    assert not hand_over.over() and leaving.store.kept == []
    while serving.kept.take_some():
        pass
    assert hand_over.over()
    assert len(serving.store.kept) == leaving.slot.handed_over == serving.slot.received == GIVEN_AT_ONCE + 10
    assert serving.store.kept[0][1] == Handed(5.0, 1, "")


def test_a_full_exchange_leaves_a_connection_where_it_is(make: Callable[..., Worker], pair: Exchange) -> None:
    leaving, serving = make(), make()
    server, client = socket.socketpair()
    assert pair.give is not None
    while connection_passing.send(pair.give, server.fileno(), Handed(1.0, 0, "")):
        pass
    leaving.store.connect(3)
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, None)
    assert hand_over is not None and not hand_over.over()
    assert len(leaving.store.kept) == 3
    assert leaving.kept.limits_wait and leaving.kept.pause() == kept_connections.TURN
    serving.store.limit = 1 << 20
    while serving.kept.take_some():
        pass
    assert not hand_over.over()
    while serving.kept.take_some():
        pass
    assert hand_over.over() and leaving.store.kept == []
    server.close()
    client.close()


def test_few_connections_lie_in_the_exchange_at_a_time(make: Callable[..., Worker], pair: Exchange) -> None:
    leaving, serving = make(), make()
    leaving.store.connect(500)
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, None)
    assert hand_over is not None and pair.take is not None
    for _ in range(20):
        assert not hand_over.over()
    lies = connection_passing.waiting_bytes(pair.take)
    assert kept_connections.MOST_WAITING <= lies < kept_connections.MOST_WAITING + connection_passing.MOST_BYTES
    assert len(leaving.store.kept) > 350, "where a request on them is answered at once"
    while not hand_over.over():
        while serving.kept.take_some():
            pass
    assert len(serving.store.kept) == 500


def test_a_full_exchange_that_no_worker_takes_from_is_given_up(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(kept_connections.time, "monotonic", lambda: now[0])
    leaving = make()
    leaving.store.connect(500)
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, SimpleNamespace(over=lambda: True))
    assert hand_over is not None
    while connection_passing.waiting_bytes(leaving.kept.take_fd) < kept_connections.MOST_WAITING:
        assert not hand_over.over()
    now[0] += kept_connections.PATIENCE - 0.1
    assert not hand_over.over()
    assert not leaving.kept.are_to_close()
    now[0] += 0.2
    assert hand_over.over()
    assert leaving.kept.are_to_close() and len(leaving.store.kept) == 500


def test_an_exchange_that_was_empty_in_between_is_not_given_up(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(kept_connections.time, "monotonic", lambda: now[0])
    leaving, other, serving = make(), make(), make()
    for each in (leaving, other):
        each.leave()
    for _ in range(2):
        # The same number of bytes each time.
        other.store.connect(2)
        other.kept.give_some()
        assert not leaving.kept.is_taken() and not leaving.kept.are_to_close()
        assert serving.kept.take_some() == 2
        assert leaving.kept.is_taken()
        now[0] += kept_connections.PATIENCE + 0.1


def test_what_no_worker_takes_is_taken_back_and_closed_as_ever(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(kept_connections.time, "monotonic", lambda: now[0])
    leaving = make()
    leaving.store.connect(5)
    leaving.leave()
    without = SimpleNamespace(over=lambda: True)
    hand_over = leaving.kept.leaving(lambda: None, without)
    assert hand_over is not None and not hand_over.over() and leaving.store.kept == []
    now[0] += kept_connections.PATIENCE - 0.1
    assert not hand_over.over() and leaving.store.kept == []
    assert not leaving.kept.are_to_close()
    now[0] += 0.2
    assert hand_over.over() and len(leaving.store.kept) == 5
    assert leaving.kept.are_to_close()


@pytest.mark.parametrize(
    ("phase", "retire", "successor_takes", "stops", "gives", "takes"),
    [
        (Phase.SERVING, 0, 0, 0, False, True),
        (Phase.SERVING, 1, 0, 0, True, False),
        (Phase.RETIRING, 1, 1, 0, True, False),
        (Phase.RETIRING, 0, 1, 0, True, False),
        (Phase.RETIRING, 1, 0, 0, False, False),
        (Phase.RETIRING, 1, 1, 1, False, False),
        (Phase.LAME_DUCK, 0, 0, 1, False, True),
        (Phase.DRAINING, 1, 0, 1, False, True),
        (Phase.STOPPED, 1, 0, 1, False, False),
        (Phase.BOOTING, 0, 0, 0, False, False),
    ],
)
def test_which_workers_give_and_which_take(
    make: Callable[..., Worker], phase: Phase, retire: int, successor_takes: int, stops: int, gives: bool, takes: bool
) -> None:
    worker = make()
    header = worker.board.header
    header.phase, header.successor_takes, header.stop_since = phase, successor_takes, stops and clock.now_ns()
    worker.slot.order.retire = retire
    assert worker.kept.hands_over() is gives
    worker.kept.turn()
    assert worker.store.watches is takes


def test_a_connection_whose_time_was_nearly_over_is_kept_for_a_request_that_is_on_its_way(
    make: Callable[..., Worker],
) -> None:
    leaving, serving = make(), make()
    leaving.store.connect(2)
    leaving.store.kept[0] = (leaving.store.kept[0][0], Handed(0.01, 1, ""))
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, None)
    assert hand_over is not None
    hand_over.over()
    assert serving.kept.take_some() == 2
    assert [handed.left for _, handed in serving.store.kept] == [LEFT_AT_LEAST, 5.0]


@pytest.mark.parametrize(
    ("successor", "gives"),
    [
        (Phase.SERVING, True),
        (Phase.RETIRING, True),
        (Phase.LAME_DUCK, False),
        (Phase.DRAINING, False),
        (Phase.STOPPED, False),
    ],
)
def test_nothing_is_given_to_a_successor_that_stops(make: Callable[..., Worker], successor: Phase, gives: bool) -> None:
    worker = make()
    header = worker.board.header
    header.phase, header.successor_takes, header.successor_phase = Phase.RETIRING, 1, successor
    assert worker.kept.hands_over() is gives


def test_nothing_is_given_to_workers_that_keep_no_connections(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.leave()
    assert worker.kept.hands_over()
    worker.board.header.keeps_none = True
    assert not worker.kept.hands_over()


def test_a_worker_that_goes_takes_nothing(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.kept.turn()
    assert worker.store.watches
    worker.process.going = True
    assert worker.kept.take_some() == 0
    assert not worker.store.watches


def test_a_worker_with_no_room_takes_nothing_until_it_has(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.store.limit = 0
    worker.kept.turn()
    assert not worker.store.watches and worker.kept.is_exchange_empty()
    worker.store.limit = 5
    worker.kept._looks_at = 0.0
    worker.kept.turn()
    assert worker.store.watches


def test_a_worker_without_a_descriptor_rests_before_it_looks_again(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, serving = make(), make()
    leaving.store.connect(3)
    leaving.leave()
    serving.kept.turn()
    assert leaving.kept.give_some() and serving.store.watches
    fill = os.open(os.devnull, os.O_RDONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fill, hard))
    try:
        assert serving.kept.take_some() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(fill)
    assert not serving.store.watches, "what lies there would wake its loop without end"
    now = time.monotonic() + REST
    monkeypatch.setattr(kept_connections.time, "monotonic", lambda: now)
    serving.kept.turn()
    assert serving.store.watches and serving.kept.take_some() == 3


@pytest.mark.parametrize("successor", [Phase.BOOTING, Phase.SERVING, Phase.DRAINING])
def test_worker_whose_master_was_killed_gives_to_the_successor_that_has_begun_to_serve(
    make: Callable[..., Worker], successor: Phase
) -> None:
    orphan = make(ppid=GONE)
    orphan.process.going = True
    header = orphan.board.header
    header.successor_phase = successor
    assert not orphan.kept.hands_over(), "it has not been let go yet"
    header.successor_takes = os.getpid()
    assert orphan.kept.hands_over() is (successor is not Phase.DRAINING)
    # The board of a master that is gone tells for ever what it told last.
    header.successor_takes = GONE
    assert not orphan.kept.hands_over()


def test_worker_whose_master_and_successor_are_gone_takes_back_what_it_has_given(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    orphan = make(ppid=GONE)
    orphan.store.connect(3)
    orphan.process.going = True
    orphan.board.header.successor_takes = os.getpid()
    leaving = orphan.kept.leaving(lambda: None, None)
    assert leaving is not None and not leaving.over()
    assert orphan.store.kept == []
    orphan.board.header.successor_takes = GONE
    assert leaving.over(), "there is nobody to wait for"
    assert len(orphan.store.kept) == 3
    assert "event=connections.taken_back" in caplog.text


def test_more_connections_in_the_exchange_do_not_prolong_the_wait_for_a_worker_that_takes_them(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = make()
    leaving.leave()
    now = time.monotonic()
    monkeypatch.setattr(kept_connections.time, "monotonic", lambda: now)
    for _ in range(4):
        leaving.store.connect(1)
        assert leaving.kept.give_some() and not leaving.kept.is_taken()
        now += kept_connections.PATIENCE / 4
    leaving.kept.is_taken()
    assert len(leaving.store.kept) == 4 and not leaving.kept.hands_over()


def test_an_exchange_that_is_as_full_after_each_turn_as_before_is_not_given_up_while_it_is_taken_from(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, serving = make(), make()
    leaving.leave()
    now = time.monotonic()
    monkeypatch.setattr(kept_connections.time, "monotonic", lambda: now)
    # Messages of one length: what was taken is filled up to the same byte.
    leaving.store.connect(3)
    for _ in range(12):
        assert leaving.kept.give_some() and not leaving.kept.is_taken()
        assert serving.kept.take_some(1) == 1
        leaving.store.connect(1)
        now += kept_connections.PATIENCE / 4
    assert leaving.kept.hands_over()


def test_worker_without_a_master_gives_to_the_generation_before_it_while_that_lives(
    make: Callable[..., Worker],
) -> None:
    orphan = make(ppid=GONE)
    orphan.process.going = True
    header = orphan.board.header
    header.ready_at = clock.now_ns()
    assert not orphan.kept.hands_over()
    header.predecessor_pid = os.getpid()
    assert orphan.kept.hands_over()
    header.predecessor_pid = GONE
    assert not orphan.kept.hands_over()


def test_a_process_that_the_app_forks_gives_and_takes_nothing(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.leave()
    worker.runtime.pid = -1
    assert not worker.kept.hands_over()
    worker.kept.turn()
    assert not worker.store.watches


def test_http2_ends_by_the_end_of_the_loop_once_what_is_idle_is_given(make: Callable[..., Worker]) -> None:
    leaving = make()
    leaving.store.http2 = True
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, None)
    assert hand_over is not None and hand_over.over()


def test_deadline_ends_a_worker_that_waits_for_a_request(make: Callable[..., Worker]) -> None:
    leaving = make()
    leaving.leave()
    hand_over = leaving.kept.leaving(lambda: None, None)
    leaving.store.in_hand = lambda: 1  # type: ignore[method-assign]
    assert hand_over is not None and not hand_over.over()
    assert leaving.kept.pause() is None, "it waits for a request, and not for the exchange"
    leaving.process.deadline_ns = clock.now_ns()
    assert hand_over.over()


def test_idle_connections_leave_over_the_lame_duck(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.store.connect(10)
    header = worker.board.header
    header.phase, header.stop_since = Phase.LAME_DUCK, clock.now_ns()
    assert not worker.kept.limits_wait
    worker.kept.turn()
    assert worker.kept.limits_wait and worker.kept.pause() == kept_connections.LAME_DUCK_TURN
    assert worker.store.closed <= 1
    header.stop_since = clock.now_ns() - int(5.5e9)
    worker.kept._looks_at = 0.0
    worker.kept.turn()
    assert worker.store.closed == 5
    header.stop_since = clock.now_ns() - int(11e9)
    worker.kept._looks_at = 0.0
    worker.kept.turn()
    assert worker.store.closed == 10


def test_only_what_ends_with_the_worker_counts_as_closed_idle(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.kept.count_closed()
    assert worker.slot.closed_idle == 0
    worker.process.going = True
    worker.kept.count_closed()
    assert worker.slot.closed_idle == 1


def test_a_hostile_message_is_refused_and_what_is_behind_it_taken(make: Callable[..., Worker], pair: Exchange) -> None:
    leaving, serving = make(), make()
    assert pair.give is not None
    pair.give.send(b"not a message")
    leaving.store.connect(1)
    leaving.leave()
    leaving.kept.give_some()
    assert serving.kept.take_some() == 1


def test_hostile_messages_do_not_hold_up_the_loop(make: Callable[..., Worker], pair: Exchange) -> None:
    assert pair.give is not None and pair.take is not None
    for _ in range(3 * TAKEN_AT_ONCE):
        pair.give.send(b"not a message")
    worker = make()
    assert worker.kept.take_some() == 0
    assert connection_passing.waiting_bytes(pair.take)


def test_an_error_while_connections_are_given_ends_the_handing_over_and_nothing_else(
    make: Callable[..., Worker],
) -> None:
    leaving = make()
    leaving.store.connect(2)
    leaving.leave()
    leaving.store.describe = lambda connection: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    hand_over = leaving.kept.leaving(lambda: None, None)
    assert hand_over is not None and hand_over.over()
    assert leaving.kept.are_to_close() and len(leaving.store.kept) == 2


def test_an_error_with_one_connection_does_not_keep_the_others_from_being_taken(make: Callable[..., Worker]) -> None:
    leaving, serving = make(), make()
    leaving.store.connect(2)
    leaving.leave()
    leaving.kept.give_some()
    keep, left = serving.store.keep, [1]

    def fail_once(connection: socket.socket, handed: Handed) -> None:
        if left.pop(0) if left else 0:
            connection.close()
            raise RuntimeError
        keep(connection, handed)

    serving.store.keep = fail_once  # type: ignore[method-assign]
    assert serving.kept.take_some() == 2
    assert len(serving.store.kept) == 1
