"""Which listeners stay, and in which order those of a SO_REUSEPORT group are closed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.listeners.accept_queue import Admission, allow_new_connections, block_new_connections, is_empty
from zdd_web.listeners.matching import Address, Place, match, normal
from zdd_web.listeners.reuseport import bpf

BINDS: list[tuple[str, Address]] = [
    ("127.0.0.1:8000", ("127.0.0.1", 8000)),
    ("127.0.0.1:8001", ("127.0.0.1", 8001)),
    ("[::1]:8000", ("::1", 8000)),
    ("unix:/run/a", "/run/a"),
    ("unix:\0a", "\0a"),
    ("127.0.0.1:0", ("127.0.0.1", 0)),
    ("fd://3", 3),
]
places = st.lists(st.builds(lambda bind, slot: Place(*bind, slot), st.sampled_from(BINDS), st.integers(0, 2)))


@given(places, places)
def test_everything_is_kept_added_or_dropped_once(wanted: list[Place], given_: list[Place]) -> None:
    found = match(wanted, given_)
    assert sorted([at for at, _ in found.kept] + list(found.added)) == list(range(len(wanted)))
    assert sorted([index for _, index in found.kept] + list(found.dropped)) == list(range(len(given_)))
    for at, index in found.kept:
        assert wanted[at] == given_[index]
    # What both have is not made anew: nobody could bind it twice.
    left = [wanted[at] for at in found.added]
    assert not any(given_[index] in left for index in found.dropped)


@given(places, st.randoms())
def test_the_order_does_not_matter(wanted: list[Place], random: object) -> None:
    given_ = list(wanted)
    random.shuffle(given_)  # type: ignore[attr-defined]
    found = match(wanted, given_)
    assert (found.added, found.dropped) == ((), ())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("127.0.0.1", 80), ("127.0.0.1", 80), True),
        (("", 80), ("0.0.0.0", 80), True),
        (("::1", 80), ("0:0:0:0:0:0:0:1", 80), True),
        (("SHOP.example", 80), ("shop.example", 80), True),
        (("::", 80), ("0.0.0.0", 80), False),
        (("127.0.0.1", 80), ("127.0.0.1", 81), False),
        (("127.0.0.1", 0), ("127.0.0.1", 0), False),
        ("/run/a", "/run/./a", True),
        ("\0a", "a", False),
        (3, 3, False),
    ],
)
def test_addresses_that_are_the_same(one: Address, other: Address, same: bool) -> None:
    found = match([Place("one", one)], [Place("other", other)])
    assert bool(found.kept) == same


def close_all(leaving: int, staying: int, indices: list[int]) -> list[list[str]]:
    """Play the kernel's array: return all that a connection could have met, at each moment."""
    group = [f"A{n}" for n in range(leaving)] + [f"B{n}" for n in range(staying)]
    met = []
    for closed, index in zip(range(leaving - 1, -1, -1), indices, strict=True):
        for _ in ("before", "after"):
            met.append([group[index]] if index < len(group) else list(group))
            if f"A{closed}" in group:
                at, last = group.index(f"A{closed}"), group.pop()
                if at < len(group):
                    group[at] = last
    # Nobody has a preference for ever.
    assert indices[-1] >= len(group)
    return met


@given(st.integers(1, 40), st.integers(2, 40))
def test_no_connection_meets_a_socket_that_is_being_closed(leaving: int, staying: int) -> None:
    for met in close_all(leaving, staying, bpf.closing_indices(leaving, staying)):
        assert all(name.startswith("B") for name in met)


def test_one_for_one_is_as_safe() -> None:
    assert [met for met in close_all(1, 1, bpf.closing_indices(1, 1)) if "A0" in met] == []


@pytest.fixture
def group() -> Iterator[list[socket.socket]]:
    """Four listening sockets on one port."""
    members: list[socket.socket] = []
    for _ in range(4):
        member = socket.socket()
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind(members[0].getsockname() if members else ("127.0.0.1", 0))
        member.listen()
        member.setblocking(False)
        members.append(member)
    yield members
    for member in members:
        member.close()


def connect(group: list[socket.socket], times: int = 40) -> list[int]:
    """Return how many connections each member gets."""
    got = [0] * len(group)
    for _ in range(times):
        with socket.create_connection(group[0].getsockname()):
            for index, member in enumerate(group):
                try:
                    member.accept()[0].close()
                    got[index] += 1
                except BlockingIOError:
                    continue
    assert sum(got) == times
    return got


def test_the_real_kernel_goes_by_the_order_of_listen(group: list[socket.socket]) -> None:
    bpf.steer_to_range(group[3], 1, 2)
    got = connect(group)
    assert (got[0], got[3]) == (0, 0)
    assert got[1] and got[2]
    bpf.steer_to_one(group[0], 2)
    assert connect(group, 10) == [0, 0, 10, 0]
    bpf.steer_to_one(group[0], 4)
    assert sum(map(bool, connect(group, 100))) == 4
    bpf.steer_to_one(group[0], 0)
    bpf.let_the_kernel_choose(group[1])
    bpf.let_the_kernel_choose(group[1])
    assert sum(map(bool, connect(group, 100))) == 4


def test_the_kernel_tells_who_listens(group: list[socket.socket]) -> None:
    port = group[0].getsockname()[1]
    entries = bpf.entries(port, bpf.LISTEN)
    assert {entry.inode for entry in entries} == {bpf.inode(member) for member in group}
    assert {entry.local for entry in entries} == {bpf.local_address(group[0])}
    assert {entry.uid for entry in entries} == {os.geteuid()}
    assert bpf.handshakes(port) == frozenset()


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("0100007F:1F90", "0100007F:1F90", False),
        ("00000000:1F90", "0100007F:1F90", True),
        ("0100007F:1F90", "00000000:1F90", True),
        ("0200007F:1F90", "0100007F:1F90", False),
        ("0" * 32 + ":1F90", "00000000:1F90", True),
        ("0" * 32 + ":1F90", "0100007F:1F90", True),
        ("00000000:1F90", "0" * 24 + "01000000:1F90", False),
        ("0" * 32 + ":1F90", "0" * 24 + "01000000:1F90", True),
    ],
)
def test_addresses_that_cover_each_other(one: str, other: str, overlap: bool) -> None:
    assert bpf.overlap(one, other) is overlap


def test_a_door_that_was_closed_opens_again() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        assert block_new_connections(listener) in (Admission.BLOCKED, Admission.LIMITED)
        allow_new_connections(listener, 8)
        with socket.create_connection(listener.getsockname(), 5):
            assert not is_empty([listener])
            assert not is_empty([listener.fileno()])
            listener.accept()[0].close()
        assert is_empty([listener])


def test_normal_spellings() -> None:
    assert normal(("127.0.0.1", 0)) == ""
    assert normal("\0name") == "\0name"
