"""The sockets of a port on real sockets: how many listen, in which order they stand, and how they leave."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zdd_web.board import ListenerRecord
from zdd_web.door import Door
from zdd_web.gunicorn.port import Listener, Port
from zdd_web.listeners import arrivals as arrivals_module
from zdd_web.listeners import reuseport
from zdd_web.listeners.arrivals import Arrivals
from zdd_web.listeners.backlog import queue
from zdd_web.listeners.queues import Queues
from zdd_web.listeners.sharing import Neighbour
from zdd_web.record import WORD


class Sock:
    """What is used of gunicorn's object."""

    FAMILY = socket.AF_INET

    def __init__(self, port: int) -> None:
        self.sock: socket.socket | None = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.sock.bind(("127.0.0.1", port))
        self.sock.setblocking(False)

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Master:
    """One on a port, as far as its sockets are concerned."""

    def __init__(self, port: int, size: int) -> None:
        first = Sock(port)
        assert first.sock is not None
        self.number = first.sock.getsockname()[1]
        socks = [first, *(Sock(self.number) for _ in range(size - 1))]
        self.members = [
            Listener("bind", ("127.0.0.1", 0), slot, sock, new_record(), listens=False)
            for slot, sock in enumerate(socks)
        ]
        self.port = Port(self.members, 100)

    def open(self, size: int) -> Master:
        self.port.open(size)
        return self

    def seen_by_others(self, *, stops: bool = False) -> Neighbour:
        return Neighbour({each.record.inode: each.record.since for each in self.members if each.record.inode}, stops)

    def waiting(self) -> int:
        return sum(queue(each.sock.sock)[0] for each in self.members if each.listens and each.is_open)

    def leave(self, neighbours: list[Neighbour], each_time: Callable[[], None]) -> None:
        self.port.leave_to_others(neighbours)
        assert self.port.is_left_to_others

        def close(listener: Listener) -> None:
            each_time()
            listener.sock.close()
            each_time()

        self.port.close(close)

    def close(self) -> None:
        for each in self.members:
            each.sock.close()


def new_record() -> ListenerRecord:
    return ListenerRecord(memoryview(bytearray(ListenerRecord.WORDS * WORD)), 0)


@contextlib.contextmanager
def meeting(number: int, *leaving: Master) -> Iterator[Callable[[], None]]:
    """Give what connects a few times, and demands that nobody who leaves has met any of them."""
    with contextlib.ExitStack() as clients:

        def connect() -> None:
            for _ in range(12):
                clients.enter_context(socket.create_connection(("127.0.0.1", number), 10))
            assert [each.waiting() for each in leaving] == [0] * len(leaving)

        yield connect


@pytest.mark.parametrize("seed", range(6))
def test_nobody_who_leaves_is_met_however_often_the_port_has_changed_hands(seed: int) -> None:
    chance = random.Random(seed)
    sizes = (2, 3, 2, 3, 3, 5, 2, 4) if seed == 0 else tuple(chance.randint(2, 6) for _ in range(8))
    old = Master(0, sizes[0]).open(sizes[0])
    for size in sizes[1:]:
        new = Master(old.number, size).open(size)
        staying, leaving = (old, new) if seed and chance.random() < 0.3 else (new, old)
        with meeting(old.number, leaving) as connect:
            leaving.leave([staying.seen_by_others()], connect)
        # Whoever has connected is somebody's who stays: what waits there is no matter of this test.
        for queue_ in staying.port.in_order():
            with contextlib.suppress(BlockingIOError):
                while queue_.listens:
                    queue_.sock.sock.accept()[0].close()
        old = staying
    old.close()


def test_of_three_masters_the_one_in_the_middle_may_leave() -> None:
    first = Master(0, 2).open(2)
    second, third = Master(first.number, 3).open(3), Master(first.number, 2).open(2)
    with meeting(first.number, second) as connect:
        second.leave([first.seen_by_others(), third.seen_by_others()], connect)
    first.close()
    third.close()


def test_who_is_first_leaves_to_those_who_stay_and_not_to_one_that_stops() -> None:
    first = Master(0, 2).open(2)
    second, third = Master(first.number, 3).open(3), Master(first.number, 2).open(2)
    neighbours = [second.seen_by_others(), third.seen_by_others(stops=True)]
    assert first.port.others_stay(neighbours)
    assert not first.port.others_stay([second.seen_by_others(stops=True), third.seen_by_others(stops=True)])
    for each in (first, second, third):
        each.close()


# On real sockets: each is some milliseconds.
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_as_many_listen_as_there_are_workers_in_the_order_in_which_they_began(workers: list[int]) -> None:
    master = Master(0, 4).open(2)
    try:
        for wanted in workers:
            for _ in range(10):
                master.port.fit(wanted)
                # A queue at a time, and only when it is settled: there is nobody on his way here.
                if not master.port.is_busy and len(order(master)) == min(4, max(2, wanted)):
                    break
            assert order(master) == list(range(min(4, max(2, wanted))))
            for each in master.members:
                assert each.listens == reuseport.listens(each.sock.sock)
                assert (each.record.door == Door.IDLE) == (not each.listens)
    finally:
        master.close()


def order(master: Master) -> list[int]:
    return [each.slot for each in master.port.in_order() if each.listens]


def test_a_queue_on_its_way_out_that_somebody_waits_in_is_waited_for_and_taken_back() -> None:
    master = Master(0, 3).open(3)
    with contextlib.ExitStack() as clients:
        while not queue(master.members[2].sock.sock)[0]:
            clients.enter_context(socket.create_connection(("127.0.0.1", master.number), 10))
        for _ in range(3):
            master.port.fit(2)
        assert master.port.is_busy
        assert master.members[2].record.door == Door.STEERED
        master.port.fit(3)
        assert not master.port.is_busy
        assert order(master) == [0, 1, 2]
        # No program is left behind: it is chosen again.
        waiting = queue(master.members[2].sock.sock)[0]
        for _ in range(200):
            clients.enter_context(socket.create_connection(("127.0.0.1", master.number), 10))
            if queue(master.members[2].sock.sock)[0] > waiting:
                break
        assert queue(master.members[2].sock.sock)[0] > waiting
    master.close()


# -- what a worker accepts from


def test_whoever_has_waited_longest_is_accepted_first_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_module, "LOOK_EVERY", 0)
    master = Master(0, 4).open(4)
    queues = master.port.for_worker()
    counts = dict.fromkeys((each.sock.fileno() for each in master.members), 0)

    def counter(fd: int) -> Callable[[], None]:
        def count() -> None:
            counts[fd] += 1

        return count

    queues.count({fd: counter(fd) for fd in counts})
    with contextlib.ExitStack() as clients:
        ours = []
        for _ in range(30):
            ours.append(clients.enter_context(socket.create_connection(("127.0.0.1", master.number), 10)))
            look(queues)
        met = []
        with contextlib.suppress(BlockingIOError):
            while True:
                client, peer = queues.accept()
                client.close()
                met.append(peer)
        assert met == [each.getsockname() for each in ours]
    assert sum(counts.values()) == len(met)
    assert all(counts.values())
    queues.close()
    assert queues.fileno() == -1
    master.close()


def look(queues: Queues) -> None:
    """Do what a worker does before it accepts."""
    queues._look([queues._slots[fd] for fd, _ in queues._epoll.poll(0)])


@given(st.lists(st.one_of(st.integers(0, 3), st.none()), max_size=200))
def test_the_order_of_arrival_is_kept_over_all_queues(events: list[int | None]) -> None:
    arrivals, waiting, now = Arrivals(4), [[] for _ in range(4)], itertools.count(1)  # type: ignore[var-annotated]
    for event in events:
        if event is not None and len(waiting[event]) < arrivals_module.MOST:
            waiting[event].append(at := next(now))
            arrivals.note(event, len(waiting[event]), at)
            continue
        ready = [number for number in range(4) if waiting[number]]
        if ready:
            chosen = arrivals.in_order(ready)[0]
            assert waiting[chosen][0] == min(waiting[number][0] for number in ready)
            waiting[chosen].pop(0)
            arrivals.taken(chosen)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 100), st.booleans()), max_size=100))
def test_numbers_that_make_no_sense_are_put_right_by_the_kernels(looks: list[tuple[int, int, bool]]) -> None:
    arrivals = Arrivals(3)
    for now, (number, waiting, taken) in enumerate(looks, 1):
        arrivals.note(number, waiting, now)
        if taken:
            # Also where nobody waited: two have accepted at once.
            arrivals.taken(number)
        assert sorted(arrivals.in_order([0, 1, 2])) == [0, 1, 2]
    # Once nobody waits they are right.
    for number in (0, 1):
        arrivals.note(number, 0, 1000)
    arrivals.note(1, 1, 1001)
    arrivals.note(0, 1, 1002)
    assert arrivals.in_order([0, 1]) == [1, 0]
