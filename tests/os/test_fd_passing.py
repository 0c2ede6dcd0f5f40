"""Descriptors between two processes that are no relatives."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import spawn, status_of
from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.system import fd_passing

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, other


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "takeover")


def soon() -> float:
    return time.monotonic() + 10


def test_more_than_one_message_takes_arrives_whole(pair: Pair) -> None:
    fields = {"kind": "inheritance", "binds": [f"unix:/run/{number}/" + "x" * 90 for number in range(256)]}
    reader, writer = os.pipe()
    try:
        fd_passing.send(pair[0], fields, [reader] * 300)
        found, given = fd_passing.receive(pair[1], soon())
    finally:
        os.close(reader)
        os.close(writer)
    try:
        assert found == fields
        assert len(given) == 300
        assert {os.fstat(fd).st_ino for fd in given} == {os.fstat(given[0]).st_ino}
        assert not any(os.get_inheritable(fd) for fd in given)
    finally:
        for fd in given:
            os.close(fd)


def test_nothing_to_pass_is_a_message_too(pair: Pair) -> None:
    fd_passing.send(pair[0], {"kind": "refused"})
    assert fd_passing.receive(pair[1], soon()) == ({"kind": "refused"}, [])
    pair[1].setblocking(False)
    fd_passing.send(pair[0], {"kind": "takeover"})
    assert fd_passing.receive_now(pair[1]) == {"kind": "takeover"}
    assert fd_passing.receive_now(pair[1]) is None


@pytest.mark.parametrize("said", [b"?{}", b".", b".{", b".[]", b"." + b"[" * 10_000, b"." + b"x" * 20_000, b".\xff"])
def test_what_is_no_message_is_an_error_and_leaves_no_descriptor(pair: Pair, said: bytes) -> None:
    for receive in (lambda: fd_passing.receive(pair[1], soon()), lambda: fd_passing.receive_now(pair[1])):
        before = set(os.listdir("/proc/self/fd"))
        socket.send_fds(pair[0], [said], [0, 1])
        with pytest.raises(ValueError):
            receive()
        assert set(os.listdir("/proc/self/fd")) == before


def test_an_end_is_an_end_also_in_the_middle_of_a_message(pair: Pair) -> None:
    pair[0].send(b"+{")
    pair[0].close()
    with pytest.raises(EOFError):
        fd_passing.receive(pair[1], soon())
    with pytest.raises(EOFError):
        fd_passing.receive_now(pair[1])


def test_the_last_word_of_one_that_did_not_listen_is_heard(pair: Pair) -> None:
    fd_passing.send(pair[0], {"kind": "takeover"})
    fd_passing.send(pair[1], {"kind": "refused"})
    pair[1].close()
    assert fd_passing.receive(pair[0], soon()) == ({"kind": "refused"}, [])
    with pytest.raises(EOFError):
        fd_passing.receive(pair[0], soon())


def test_who_says_nothing_is_not_waited_for(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        fd_passing.receive(pair[1], time.monotonic())


def test_the_kernel_says_who_it_is(pair: Pair) -> None:
    assert fd_passing.credentials(pair[0]) == fd_passing.Credentials(os.getpid(), os.geteuid())


def test_a_name_of_any_length_is_an_address() -> None:
    one, other = (fd_passing.address("x" * 99 + end, "") for end in "yz")
    assert one != other
    for each in (one, fd_passing.address("shop", "")):
        with contextlib.closing(fd_passing.Rendezvous(f"{each}{os.getpid()}"[:108], 1)):
            pass


def test_a_path_is_replaced_when_nobody_listens_and_removed_by_who_made_it(tmp_path: Path) -> None:
    where = str(tmp_path / "takeover")
    first = fd_passing.Rendezvous(where, 1)
    with pytest.raises(OSError) as taken:
        fd_passing.Rendezvous(where, 1)
    assert taken.value.errno == errno.EADDRINUSE
    first.close_inherited_copy()
    # Stale.
    second = fd_passing.Rendezvous(where, 1)
    os.unlink(where)
    third = fd_passing.Rendezvous(where, 1)
    second.close()
    assert os.path.exists(where)
    second = third
    second.close()
    assert not os.path.exists(where)
    assert fd_passing.connect(where, soon()) is None


def test_a_full_queue_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    where = str(tmp_path / "takeover")
    rendezvous = fd_passing.Rendezvous(where, 0)
    ends = [fd_passing.connect(where, time.monotonic())]
    with pytest.raises(TimeoutError):
        while True:
            ends.append(fd_passing.connect(where, time.monotonic()))
    ends.append(rendezvous.accept())
    for end in ends:
        assert end is not None
        end.close()
    rendezvous.close()


def test_an_inheritance_arrives_as_it_was_sent() -> None:
    sent = Inheritance(
        generation=2, predecessor=7, channel=-1, boot_log=10, stderr=-1, listeners=(13, 14), binds=("a", "b"),
        ancestors=((5, 50), (7, 70)), kept=True, board=11, probe=12, probe_bind=":81", mode="reuseport", slots=(0, 1),
        groups=((8000, True, (99,)),),
    )  # fmt: skip
    fields, descriptors = sent.to_message()
    assert descriptors == [10, 11, 12, 13, 14]
    found = Inheritance.from_message({"kind": "inheritance", "later": 1, **fields}, [20, 21, 22, 23, 24], 30, 70, 700)
    assert found == Inheritance(
        generation=2, predecessor=70, channel=30, boot_log=20, stderr=-1, listeners=(23, 24), binds=("a", "b"),
        ancestors=((5, 50), (7, 70)), kept=True, board=21, probe=22, probe_bind=":81", mode="reuseport", slots=(0, 1),
        groups=((8000, True, (99,)),), taken=True, predecessor_start=700,
    )  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"descriptors": []}, {"descriptors": ["boot_log"]}, {"descriptors": 1}])
def test_what_is_no_inheritance_is_an_error(fields: dict[str, object]) -> None:
    with pytest.raises(UpgradeError, match="has sent no inheritance"):
        Inheritance.from_message(dict(fields), [20], 30, 70, 700)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(
    not Path("/proc/1/wchan").exists() or os.geteuid() != 0, reason="the kernel does not tell what processes wait for"
)
def test_place_in_a_full_queue_is_waited_for_in_the_kernel(where: str) -> None:
    rendezvous = fd_passing.Rendezvous(where, 0)
    waiting = [fd_passing.connect(where, soon())]
    while (end := _try(where)) is not None:
        waiting.append(end)
    pid = spawn(lambda: fd_passing.connect(where, soon()))
    until_asleep(pid)
    # One place, and the process that waits in the kernel has it: one that tries again finds none.
    let_in = rendezvous.accept()
    assert status_of(pid) == 0
    assert _try(where) is None
    for each in (*waiting, let_in):
        assert each is not None
        each.close()
    rendezvous.close()


def test_signal_is_not_taken_for_a_connection(where: str) -> None:
    rendezvous = fd_passing.Rendezvous(where, 0)
    waiting = [fd_passing.connect(where, soon())]
    while (end := _try(where)) is not None:
        waiting.append(end)
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda sig, frame: came.append(sig))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(TimeoutError, match="others wait there"):
            fd_passing.connect(where, time.monotonic() + 0.4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came
    for each in waiting:
        assert each is not None
        each.close()
    rendezvous.close()


def _try(where: str) -> socket.socket | None:
    try:
        return fd_passing.connect(where, time.monotonic())
    except TimeoutError:
        return None


def until_asleep(pid: int) -> None:
    """Wait until the kernel has a process wait for a place in a queue."""
    wchan = Path(f"/proc/{pid}/wchan")
    deadline = time.monotonic() + 10
    while "unix" not in (found := wchan.read_text()):
        assert time.monotonic() < deadline, found
        os.sched_yield()
