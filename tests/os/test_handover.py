"""What two generations say to each other arrives whole, in order, and to the last word."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator

import pytest

from tests.helpers.forks import in_child, spawn, status_of
from tests.helpers.in_process import descriptors
from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff.channel import MESSAGE_BYTES, MOST_AT_A_TIME, MOST_QUEUED, Channel, Message
from zdd_web.gunicorn.handoff.inheritance import ENV, Inheritance

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def raw(channel: Channel) -> socket.socket:
    """The same end, for bytes that a Channel would not send."""
    return socket.socket(fileno=os.dup(channel.fileno()))


def raw_send(channel: Channel, data: bytes) -> None:
    with raw(channel) as end:
        end.send(data)


# -- messages


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send("hello", pid=4711, pid_file="/run/shöp.pid")
    theirs.send("ready", workers=4)
    assert ours.receive() == Message("hello", {"pid": 4711, "pid_file": "/run/shöp.pid"})
    assert ours.receive() == Message("ready", {"workers": 4})
    assert (ours.receive(), ours.ended) == (None, False)


def test_peer_that_sends_without_end_is_read_a_few_messages_at_a_time(pair: Pair) -> None:
    ours, theirs = pair
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            raw_send(theirs, b'{"kind": "speaks"}')
            sent += 1
    assert MOST_AT_A_TIME < sent < MOST_QUEUED
    assert len(list(ours.receive_some())) == MOST_AT_A_TIME
    assert len(list(ours.receive_some(MOST_QUEUED))) == sent - MOST_AT_A_TIME
    assert list(ours.receive_some()) == []


def test_descriptor_that_comes_with_anything_but_hello_is_closed(pair: Pair) -> None:
    ours, theirs = pair
    fd = os.memfd_create("board")
    before = descriptors()
    for kind in ("speaks", "ready", "release"):
        theirs.send(kind, fd=fd)
        assert ours.receive() == Message(kind, {})
    assert descriptors() == before
    os.close(fd)


def test_message_that_no_parser_survives_is_garbage(pair: Pair) -> None:
    ours, theirs = pair
    raw_send(theirs, b"[" * (MESSAGE_BYTES - 1))
    assert ours.receive() == Message("garbage", {})


def test_both_ends_speak(pair: Pair) -> None:
    ours, theirs = pair
    ours.send("go")
    theirs.send("release")
    assert theirs.receive() == Message("go", {})
    assert ours.receive() == Message("release", {})


def test_descriptor_travels_with_its_message_and_no_other(pair: Pair) -> None:
    ours, theirs = pair
    fd = os.memfd_create("board")
    os.write(fd, b"on the board")
    theirs.send("hello", fd=fd, pid=1)
    theirs.send("ready")
    os.close(fd)
    hello, ready = ours.receive(), ours.receive()
    assert hello is not None
    assert ready == Message("ready", {}, -1)
    assert os.pread(hello.fd, 100, 0) == b"on the board"
    os.close(hello.fd)


def test_child_sends_a_descriptor_to_its_parent(pair: Pair) -> None:
    ours, theirs = pair

    def child() -> None:
        fd = os.memfd_create("of the child")
        os.write(fd, str(os.getpid()).encode())
        theirs.send("hello", fd=fd)

    pid = spawn(child)
    assert status_of(pid) == 0
    hello = ours.receive()
    assert hello is not None
    assert os.pread(hello.fd, 100, 0) == str(pid).encode()
    os.close(hello.fd)


def test_channel_is_not_inherited_unless_it_is_meant_to(pair: Pair) -> None:
    assert [os.get_inheritable(end.fileno()) for end in pair] == [False, False]


# -- the end


def test_end_of_the_peer_ends_the_channel(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    assert (ours.receive(), ours.ended) == (None, True)
    assert ours.receive() is None
    ours.send("go")


def test_end_is_seen_when_the_peer_is_killed(pair: Pair) -> None:
    ours, theirs = pair
    pid = spawn(lambda: os.kill(os.getpid(), 9))
    theirs.close()
    assert status_of(pid) == -9
    assert (ours.receive(), ours.ended) == (None, True)


def test_what_a_peer_said_before_its_end_is_still_heard(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send("hello", pid=1)
    theirs.send("failed", reason="ImportError: shop")
    theirs.close()
    ours.send("go")
    assert ours.receive() == Message("hello", {"pid": 1})
    assert ours.receive() == Message("failed", {"reason": "ImportError: shop"})
    assert (ours.receive(), ours.ended) == (None, True)


def test_what_a_peer_said_before_its_end_is_heard_though_it_did_not_listen(pair: Pair) -> None:
    ours, theirs = pair
    ours.send("go")
    theirs.send("failed", reason="ImportError: shop")
    theirs.close()
    assert ours.receive() == Message("failed", {"reason": "ImportError: shop"})
    assert (ours.receive(), ours.ended) == (None, True)


def test_closed_channel_says_and_hears_nothing(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send("hello")
    ours.close()
    assert (ours.receive(), ours.ended, ours.fileno()) == (None, True, -1)
    ours.send("go")
    ours.close()


# -- garbage


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"\xff\xfe",
        b"hello",
        b"5",
        b"null",
        b'"hello"',
        b"[]",
        b'["kind"]',
        b"{}",
        b'{"workers": 3}',
        b'{"kind": "ready"',
        pytest.param(json.dumps({"kind": "failed", "reason": "x" * MESSAGE_BYTES}).encode(), id="too long"),
    ],
)
def test_garbage_is_called_garbage_and_ends_nothing(pair: Pair, data: bytes) -> None:
    ours, theirs = pair
    with raw(theirs) as end:
        end.send(data)
    theirs.send("ready", workers=1)
    assert ours.receive() == Message("garbage", {})
    assert ours.receive() == Message("ready", {"workers": 1})


def test_descriptor_that_comes_with_garbage_is_closed(pair: Pair) -> None:
    ours, theirs = pair
    reader, writer = os.pipe()
    with raw(theirs) as end:
        socket.send_fds(end, [b"garbage"], [writer])
    os.close(writer)
    assert ours.receive() == Message("garbage", {})
    assert os.read(reader, 1) == b""
    os.close(reader)


# -- the inheritance


@pytest.fixture
def inherited() -> Iterator[Inheritance]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener = socket.create_server(("127.0.0.1", 0))
    boot_log, stderr = os.memfd_create("boot-log"), os.dup(2)
    for fd in (theirs.fileno(), listener.fileno(), boot_log, stderr):
        os.set_inheritable(fd, True)
    yield Inheritance(
        generation=2,
        predecessor=os.getpid(),
        channel=theirs.fileno(),
        boot_log=boot_log,
        stderr=stderr,
        listeners=(listener.fileno(),),
        binds=("127.0.0.1:0", "unix:/run/shöp.sock"),
    )
    for fd in (boot_log, stderr):
        os.close(fd)
    for end in (ours, theirs, listener):
        end.close()


def test_inheritance_comes_out_of_the_environment_as_it_went_in_and_once(inherited: Inheritance) -> None:
    environ = {ENV: inherited.to_environ(), "PATH": "/bin"}
    assert Inheritance.take(environ) == inherited
    assert environ == {"PATH": "/bin"}
    assert Inheritance.take(environ) is None


def test_inherited_descriptors_are_inherited_by_nobody_else(inherited: Inheritance) -> None:
    assert len(inherited.descriptors) == 4
    assert all(os.get_inheritable(fd) for fd in inherited.descriptors)
    Inheritance.take({ENV: inherited.to_environ()})
    assert not any(os.get_inheritable(fd) for fd in inherited.descriptors)


def test_child_takes_its_inheritance_from_its_own_environment(inherited: Inheritance) -> None:
    def child() -> object:
        os.environ[ENV] = inherited.to_environ()
        found = Inheritance.take(os.environ)
        assert found is not None
        with socket.socket(fileno=found.listeners[0]) as listener:
            return [ENV in os.environ, listener.getsockname()[1]]

    with socket.socket(fileno=os.dup(inherited.listeners[0])) as listener:
        assert in_child(child) == [False, listener.getsockname()[1]]


def test_inherited_channel_leads_to_the_predecessor() -> None:
    ours, theirs = Channel.pair()
    inherited = Inheritance(2, 1, os.dup(theirs.fileno()), -1, -1, (), ())
    channel = inherited.open_channel()
    channel.send("hello", pid=7)
    assert ours.receive() == Message("hello", {"pid": 7})
    for end in (ours, theirs, channel):
        end.close()


def changed(inherited: Inheritance, **fields: object) -> str:
    return json.dumps({**json.loads(inherited.to_environ()), **fields})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("1", id="a number"),
        pytest.param("null", id="null"),
        pytest.param("[]", id="a list"),
        pytest.param("{}", id="nothing in it"),
        pytest.param("{not json", id="no json"),
    ],
)
def test_variable_that_is_no_inheritance_is_refused_by_name(text: str) -> None:
    environ = {ENV: text}
    with pytest.raises(UpgradeError) as caught:
        Inheritance.take(environ)
    assert str(caught.value).startswith(f"{ENV}={text}: not an inheritance of this process (")
    assert str(caught.value).endswith("): unset the variable")
    assert environ == {}


def test_what_a_later_version_gives_besides_is_left(inherited: Inheritance) -> None:
    assert Inheritance.take({ENV: changed(inherited, colour="red")}) == inherited


@pytest.mark.parametrize(
    "fields",
    [
        {"channel": 9999},
        {"boot_log": -1},
        {"listeners": [9999]},
        {"listeners": ["a"]},
        {"listeners": 3},
        {"stderr": None},
    ],
    ids=str,
)
def test_variable_with_one_false_field_is_refused_by_name(inherited: Inheritance, fields: dict[str, object]) -> None:
    with pytest.raises(UpgradeError, match=f"^{ENV}=.*unset the variable$"):
        Inheritance.take({ENV: changed(inherited, **fields)})


def test_inheritance_of_a_predecessor_that_is_gone_names_the_closed_descriptor() -> None:
    reader, writer = os.pipe()
    inherited = Inheritance(2, 1, reader, reader, reader, (writer,), ("127.0.0.1:0",))
    os.close(reader)
    os.close(writer)
    with pytest.raises(UpgradeError, match="Bad file descriptor"):
        Inheritance.take({ENV: inherited.to_environ()})
