"""The sockets of a port on real sockets: how many listen, in which order they stand, and how they leave."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zdd_web.board import Board, ListenerRecord, Slot
from zdd_web.board.admission import Admission
from zdd_web.board.record import WORD
from zdd_web.gunicorn.sockets.listener import Listener, Port
from zdd_web.listeners.accept_queue import is_full, queue
from zdd_web.listeners.reuseport import arrivals as arrivals_module
from zdd_web.listeners.reuseport import bpf, drain
from zdd_web.listeners.reuseport.arrivals import Arrivals
from zdd_web.listeners.reuseport.drain import PeerGeneration
from zdd_web.listeners.reuseport.queues import Queues


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
        self.number = first.getsockname()[1]  # type: ignore[operator]
        socks = [first, *(Sock(self.number) for _ in range(size - 1))]
        self.members = [
            Listener("bind", ("127.0.0.1", 0), slot, sock, new_record(), slot, listens=False)
            for slot, sock in enumerate(socks)
        ]
        self.port = Port(self.members, 100)

    def open(self, size: int) -> Master:
        self.port.open(size)
        return self

    def succeeded(self) -> Master:
        """Go on as the next generation does, with what it is given."""
        self.port.hold()
        _, ordered, earlier = self.port.group
        self.members = self.port.in_order()
        self.port = Port(self.members, 100, earlier, ordered=ordered)
        return self

    def seen_by_others(self, *, stops: bool = False) -> PeerGeneration:
        return PeerGeneration(frozenset(each.record.inode for each in self.members), stops)

    def waiting(self) -> int:
        return sum(queue(each.socket)[0] for each in self.members if each.listens and each.is_open)

    def leave(self, neighbours: list[PeerGeneration], each_time: Callable[[], None]) -> None:
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

    def order(self) -> list[int]:
        """Return the slots that listen, in the order in which it believes that they stand."""
        return [each.slot for each in self.port.in_order() if each.listens]


def kernels_order(*masters: Master) -> list[tuple[int, int]]:
    """Ask the kernel how a group stands: the number of the master and the slot of each member."""
    members = {(number, each.slot): each for number, one in enumerate(masters) for each in one.members if each.listens}
    found = []
    with contextlib.ExitStack() as clients:
        for index in range(len(members)):
            bpf.steer_to_one(next(iter(members.values())).socket, index)
            before = {name: queue(each.socket)[0] for name, each in members.items()}
            clients.enter_context(socket.create_connection(("127.0.0.1", masters[0].number), 10))
            found += [name for name, each in members.items() if queue(each.socket)[0] > before[name]]
    bpf.let_the_kernel_choose(next(iter(members.values())).socket)
    for each in members.values():
        with contextlib.suppress(BlockingIOError):
            while True:
                each.socket.accept()[0].close()
    return found


def stands_as_believed(master: Master) -> bool:
    return [slot for _, slot in kernels_order(master)] == master.order()


def fitted(master: Master, wanted: int) -> None:
    """Have the number of queues follow that of workers; nobody is on his way to them."""
    master.port._looked_at = 0
    for _ in range(10):
        master.port.fit(wanted)
        master.port._looked_at = 0
        if not master.port.is_busy and len(master.order()) == wanted:
            return
    raise AssertionError((wanted, master.order()))


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


def test_nobody_is_left_whom_connections_could_go_to() -> None:
    first = Master(0, 2).open(2)
    second, third = Master(first.number, 3).open(3), Master(first.number, 2).open(2)
    assert first.port.others_stay([second.seen_by_others(), third.seen_by_others(stops=True)])
    assert not first.port.others_stay([second.seen_by_others(stops=True), third.seen_by_others(stops=True)])
    for each in (first, second, third):
        each.close()


# -- how they stand


@pytest.mark.parametrize("upgraded", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (4, 3), (2, 5)])
def test_whoever_stays_knows_how_its_own_stand(sizes: tuple[int, int], upgraded: bool) -> None:
    old = Master(0, sizes[0]).open(sizes[0])
    new = Master(old.number, sizes[1] + 2).open(sizes[1])
    if upgraded:
        new.succeeded()
    old.leave([new.seen_by_others()], lambda: None)
    fitted(new, sizes[1] + 1)
    assert stands_as_believed(new)
    if upgraded:
        new.succeeded()
    while len(new.order()) > 2:
        fitted(new, len(new.order()) - 1)
        assert stands_as_believed(new)
    new.close()


def test_after_an_elder_that_was_killed_no_queue_is_closed() -> None:
    old = Master(0, 2).open(2)
    new = Master(old.number, 4).open(3)
    old.close()
    for _ in range(5):
        new.port._looked_at = 0
        new.port.fit(2)
    assert new.order() == [0, 1, 2]
    new.succeeded()
    for _ in range(5):
        new.port._looked_at = 0
        new.port.fit(2)
    assert len(new.order()) == 3
    # One more harms nobody.
    fitted(new, 4)
    new.close()


def test_a_younger_one_that_has_left_leaves_nothing_behind() -> None:
    old = Master(0, 3).open(2)
    new = Master(old.number, 3).open(3)
    new.leave([old.seen_by_others()], lambda: None)
    fitted(old, 3)
    with contextlib.ExitStack() as clients:
        for _ in range(200):
            clients.enter_context(socket.create_connection(("127.0.0.1", old.number), 10))
        assert all(queue(each.socket)[0] for each in old.members)
    old.close()


@pytest.mark.parametrize("listens", [2, 3])
def test_nothing_changes_while_somebody_else_is_here(listens: int) -> None:
    one = Master(0, 4).open(listens)
    with contextlib.closing(Sock(one.number)) as other:
        other.listen(1)  # type: ignore[operator]
        for wanted in (4, 2):
            one.port._looked_at = 0
            one.port.fit(wanted)
            assert not one.port.is_busy
            assert len(one.order()) == listens
    fitted(one, 4)
    assert stands_as_believed(one)
    one.close()


# On real sockets: each is some milliseconds.
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=6))
def test_as_many_listen_as_there_are_workers_and_stand_as_believed(workers: list[int]) -> None:
    master = Master(0, 5).open(2)
    try:
        for wanted in workers:
            fitted(master, wanted)
            assert master.order() == list(range(wanted))
            assert stands_as_believed(master)
            for each in master.members:
                assert each.listens == bpf.listens(each.socket)
                assert (each.record.door == Admission.BOUND) == (not each.listens)
    finally:
        master.close()


def test_a_queue_on_its_way_out_that_somebody_waits_in_is_waited_for_and_taken_back() -> None:
    master = Master(0, 3).open(3)
    with contextlib.ExitStack() as clients:
        while not queue(master.members[2].socket)[0]:
            clients.enter_context(socket.create_connection(("127.0.0.1", master.number), 10))
        for _ in range(3):
            master.port._looked_at = 0
            master.port.fit(2)
        assert master.port.is_busy
        assert master.members[2].record.door == Admission.STEERED
        master.port.fit(3)
        assert not master.port.is_busy
        assert master.order() == [0, 1, 2]
        # No program is left behind: it is chosen again.
        waiting = queue(master.members[2].socket)[0]
        for _ in range(200):
            clients.enter_context(socket.create_connection(("127.0.0.1", master.number), 10))
            if queue(master.members[2].socket)[0] > waiting:
                break
        assert queue(master.members[2].socket)[0] > waiting
    master.close()


# -- what fails half-way


def test_a_queue_that_cannot_be_watched_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    master = Master(0, 3).open(2)
    with monkeypatch.context() as context:
        context.setattr(master.port, "_epoll", Failing())
        master.port._looked_at = 0
        with pytest.raises(OSError, match="no space"):
            master.port.fit(3)
    assert master.order() == [0, 1]
    assert not bpf.listens(master.members[2].socket)
    fitted(master, 3)
    assert stands_as_believed(master)
    master.close()


class Failing:
    def register(self, *_: object) -> None:
        raise OSError(28, "no space left on device")


def test_what_cannot_be_looked_at_is_not_steered_away_from(monkeypatch: pytest.MonkeyPatch) -> None:
    master = Master(0, 3).open(3)

    def unreadable(port: int) -> frozenset[str]:
        raise PermissionError(13, "no /proc")

    with monkeypatch.context() as context:
        context.setattr(bpf, "handshakes", unreadable)
        master.port._looked_at = 0
        with pytest.raises(PermissionError):
            master.port.fit(2)
    assert not master.port.is_busy
    with contextlib.ExitStack() as clients:
        for _ in range(200):
            clients.enter_context(socket.create_connection(("127.0.0.1", master.number), 10))
        assert all(queue(each.socket)[0] for each in master.members)
    master.close()


def test_whoever_met_a_full_queue_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    master = Master(0, 2).open(2)
    one = master.members[0].socket
    one.listen(0)
    monkeypatch.setattr(drain, "HANDSHAKES_WITHIN", 0.0)
    # One whose last segment the kernel has dropped: it comes again in a while.
    monkeypatch.setattr(bpf, "handshakes", lambda port: frozenset({"somebody"}))
    with contextlib.ExitStack() as clients:
        assert drain.Steering(master.number, [one], 1, 1).is_settled()
        bpf.steer_to_one(one, 0)
        while not is_full(one):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", master.number))
        steering = drain.Steering(master.number, [one], 1, 1)
        assert not steering.is_settled()
        one.accept()[0].close()
        assert not is_full(one)
        assert not steering.is_settled()
        monkeypatch.setattr(bpf, "handshakes", lambda port: frozenset())
        assert steering.is_settled()
    master.close()


# -- what a worker accepts from


def test_whoever_has_waited_longest_is_accepted_first_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_module, "LOOK_EVERY", 0)
    master = Master(0, 4).open(4)
    board = Board.create("test")
    slot = board.claim(1)
    queues = master.port.for_worker(slot)
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
    counts = [slot.words[slot.base + Slot.ACCEPTS_AT + each.index] for each in master.members]
    assert sum(counts) == len(met)
    assert all(counts)
    os.close(board.fd)
    with pytest.raises(BlockingIOError):
        queues.accept()
    queues.close()
    assert queues.fileno() == -1
    master.close()


def look(queues: Queues) -> None:
    """Do what a worker does before it accepts."""
    queues._look([queues._indices[fd] for fd, _ in queues._epoll.poll(0)])


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
