"""The pair by which kept connections travel: what gets through, and what does not."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from zdd_web.system import connection_passing
from zdd_web.system.connection_passing import Handed, MessageError, pair, receive, send, waiting_bytes

Pair = tuple[socket.socket, socket.socket]

HANDED = Handed(left=2.5, requests=7, server=("127.0.0.1", 8000))


@pytest.fixture
def ends() -> Iterator[Pair]:
    give, take = pair()
    with give, take:
        yield give, take


@pytest.fixture
def connection() -> Iterator[Pair]:
    server, client = socket.socketpair()
    with server, client:
        yield server, client


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_what_has_arrived_travels_with_a_connection(ends: Pair, connection: Pair) -> None:
    give, take = ends
    server, client = connection
    client.sendall(b"GET / HT")
    assert send(give, server.fileno(), HANDED)
    server.close()
    client.sendall(b"TP/1.1")
    received = receive(take)
    assert received is not None
    with received[0] as there:
        assert (there.recv(100), received[1]) == (b"GET / HTTP/1.1", HANDED)
        there.sendall(b"200")
        assert client.recv(100) == b"200"
        assert not os.get_inheritable(there.fileno())


def test_addresses_of_all_families_travel(ends: Pair, connection: Pair) -> None:
    for server in ("/run/app.sock", "/run/" + "\udcff" * 100, "", b"\0abstract\xff", ("::1", 8000, 0, 0)):
        assert send(ends[0], connection[0].fileno(), HANDED._replace(server=server))
        received = receive(ends[1])
        assert received is not None
        received[0].close()
        assert received[1].server == server


def test_a_full_pair_takes_no_more_and_keeps_what_it_has(ends: Pair, connection: Pair) -> None:
    give, take = ends
    sent = 0
    while send(give, connection[0].fileno(), HANDED):
        sent += 1
    assert sent >= 100
    before = descriptors()
    for _ in range(sent):
        received = receive(take)
        assert received is not None
        received[0].close()
    assert receive(take) is None
    assert descriptors() == before
    assert send(give, connection[0].fileno(), HANDED)


def test_what_a_dead_receiver_has_not_taken_another_takes(ends: Pair, connection: Pair) -> None:
    give, take = ends
    other = take.dup()
    assert send(give, connection[0].fileno(), HANDED)
    take.close()
    received = receive(other)
    assert received is not None
    received[0].close()
    other.close()
    with pytest.raises(BrokenPipeError):
        send(give, connection[0].fileno(), HANDED)


def test_each_connection_reaches_one_of_several_receivers(ends: Pair, connection: Pair) -> None:
    give, take = ends
    with take.dup() as other:
        assert send(give, connection[0].fileno(), HANDED)
        first, second = receive(take), receive(other)
    assert first is not None and second is None
    first[0].close()


def test_without_a_free_descriptor_a_connection_stays_in_the_pair(ends: Pair, connection: Pair) -> None:
    give, take = ends
    assert send(give, connection[0].fileno(), HANDED)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fill = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fill, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            receive(take)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(fill)
    received = receive(take)
    assert received is not None
    received[0].close()


def raw(end: socket.socket, data: bytes, *fds: int) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    end.sendmsg([data], ancillary)


RIGHT = b'{"left": 1, "requests": 0, "server": ""}'


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"[" * 400,
        b"null",
        b"{}",
        b'{"left": -1, "requests": 0, "server": ""}',
        b'{"left": NaN, "requests": 0, "server": ""}',
        b'{"left": true, "requests": 0, "server": ""}',
        b'{"left": 1, "requests": 0.5, "server": ""}',
        b'{"left": 1, "requests": 0, "server": {}}',
        RIGHT[:-1] + b', "abstract": "x"}',
        RIGHT[:-1] + b', "abstract": 7}',
        RIGHT[:-1] + b" " * 2100 + b"}",
    ],
)
def test_a_message_that_no_worker_sends_is_refused_and_its_descriptor_closed(
    ends: Pair, connection: Pair, data: bytes
) -> None:
    before = descriptors()
    raw(ends[0], data, connection[0].fileno())
    with pytest.raises(MessageError, match="not a message about a connection"):
        receive(ends[1])
    assert descriptors() == before


def test_only_one_connection_that_is_one_gets_in(ends: Pair, connection: Pair) -> None:
    give, take = ends
    before = descriptors()
    raw(give, RIGHT)
    with pytest.raises(MessageError, match="has 0 descriptors"):
        receive(take)
    raw(give, RIGHT, connection[0].fileno(), connection[1].fileno())
    with pytest.raises(MessageError, match="has 2 descriptors"):
        receive(take)
    with open(os.devnull) as file, socket.socket() as listener, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        listener.listen()
        for fd in (file.fileno(), listener.fileno(), datagrams.fileno()):
            raw(give, RIGHT, fd)
            with pytest.raises(MessageError, match=r"is not a socket|is not a connection"):
                receive(take)
    assert descriptors() == before


def test_fields_of_a_later_version_are_ignored(ends: Pair, connection: Pair) -> None:
    raw(ends[0], RIGHT[:-1] + b', "later": [1]}', connection[0].fileno())
    received = receive(ends[1])
    assert received is not None
    received[0].close()
    assert received[1] == Handed(1.0, 0, "")


def test_nothing_but_a_pair_without_a_name_is_adopted(ends: Pair, connection: Pair) -> None:
    give, take = connection_passing.adopt(os.dup(ends[0].fileno()), os.dup(ends[1].fileno()))
    with give, take:
        assert not give.getblocking() and not take.getblocking()
    with pytest.raises(ValueError, match="are not a socket pair without a name"):
        connection_passing.adopt(connection[0].fileno(), connection[1].fileno())
    assert connection[0].fileno() >= 0
    named = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with named:
        named.bind(f"\0zdd_web.test.{os.getpid()}")
        with pytest.raises((ValueError, OSError)):
            connection_passing.adopt(named.fileno(), ends[1].fileno())


def test_bytes_that_wait_are_seen_without_being_read(connection: Pair) -> None:
    server, client = connection
    assert waiting_bytes(server) == 0
    client.sendall(b"GET")
    assert (waiting_bytes(server), waiting_bytes(server.fileno())) == (3, 3)
    server.close()
    assert waiting_bytes(server) == 0


GEVENT = """
from gevent import monkey
monkey.patch_all()
import gevent, os, resource, socket
from zdd_web.system.connection_passing import Handed, pair, receive, send

gevent.sleep(0)
give, take = pair()
server, client = socket.socketpair()
assert send(give, server.fileno(), Handed(1.0, 0, ""))
last = os.open("/", os.O_RDONLY)
os.close(last)
gevent.sleep(0.01)
fill = [os.dup(0) for _ in range(3)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill) + 2, max(fill) + 2))
received = receive(take)
os.write(1, str(received is not None).encode())
"""


def test_last_descriptor_is_enough_where_gevent_closes_descriptors_later() -> None:
    pytest.importorskip("gevent")
    done = subprocess.run([sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("True", "")
