"""Sockets that systemd passes: what is taken, and what is refused in words that say what to write instead."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from zdd_web.errors import ListenerError
from zdd_web.system import sd_listen_fds
from zdd_web.system.sd_listen_fds import Activated, take

#: Where the descriptors of these tests begin: 3 is somebody else's in this process.
FIRST = 700
PID = 4711

Pass = Callable[..., dict[str, str]]


@pytest.fixture(autouse=True)
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd_listen_fds, "FIRST", FIRST)


@pytest.fixture
def passed() -> Iterator[Pass]:
    """Pass sockets as systemd does, and return the environment; None stands for a descriptor that is closed."""
    open_ones = []

    def pass_on(
        *sockets: socket.socket | int | None, names: str | None = None, **environ: str | None
    ) -> dict[str, str]:
        for fd, each in enumerate(sockets, FIRST):
            if each is not None:
                os.dup2(each if isinstance(each, int) else each.fileno(), fd, inheritable=True)
                open_ones.append(fd)
                if isinstance(each, socket.socket):
                    each.close()
        said = {"LISTEN_PID": str(PID), "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names, **environ}
        return {"PATH": "/bin", **{key: value for key, value in said.items() if value is not None}}

    yield pass_on
    for fd in open_ones:
        with contextlib.suppress(OSError):
            os.close(fd)


def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_every_socket_is_the_apps_where_none_is_named(passed: Pass) -> None:
    environ = passed(listener(), listener(), names="web:shop.socket")
    assert take(environ, PID, {}) == (Activated(FIRST, "web", "app"), Activated(FIRST + 1, "shop.socket", "app"))
    assert environ == {"PATH": "/bin"}
    assert not os.get_inheritable(FIRST)
    assert not os.get_inheritable(FIRST + 1)


def test_names_say_which_is_whose(passed: Pass) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind("")
    unix.listen()
    environ = passed(listener(), unix, listener(), names="health:web:web")
    assert [each.role for each in take(environ, PID, {"web": "app", "health": "probe"})] == ["probe", "app", "app"]


def test_sockets_without_names_are_called_as_systemd_calls_them(passed: Pass) -> None:
    assert take(passed(listener()), PID, {"unknown": "app"}) == (Activated(FIRST, "unknown", "app"),)


def datagram() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def packets() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.bind("")
    made.listen()
    return made


def connection() -> socket.socket:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours


def not_a_socket() -> int:
    return 0


WRONG_DESCRIPTORS = [
    (lambda: None, "socket 'web' (descriptor 700) of LISTEN_FDS is closed: ", "must leave it open"),
    (not_a_socket, "is not a socket: ", "must leave it open"),
    (datagram, "is a datagram socket: ", "write ListenStream="),
    (packets, "is a packet socket: ", "write ListenStream="),
    (connection, "is a connection and no listener: ", "write Accept=no"),
]


@pytest.mark.parametrize(("make", "what", "remedy"), WRONG_DESCRIPTORS)
def test_what_is_no_listener_is_refused(passed: Pass, make: Callable[[], socket.socket | int | None], what: str,
                                        remedy: str) -> None:  # fmt: skip
    environ = passed(make(), names="web")
    with pytest.raises(ListenerError) as caught:
        take(environ, PID, {})
    assert what in str(caught.value)
    assert remedy in str(caught.value)


HOW = "systemd-socket-activate -l 127.0.0.1:8000 gunicorn"

WRONG_VARIABLES = [
    ({"LISTEN_FDS": None}, "LISTENER = 'systemd', and systemd has passed no socket (no LISTEN_FDS): ", HOW),
    ({"LISTEN_FDS": "0"}, "LISTEN_FDS=0: systemd has passed no socket: ", HOW),
    ({"LISTEN_FDS": "two"}, "LISTEN_FDS='two': must be a number, as systemd sets it: ", HOW),
    ({"LISTEN_FDS": "-1"}, "LISTEN_FDS='-1': must be a number", HOW),
    ({"LISTEN_FDS": ""}, "LISTEN_FDS='': must be a number", HOW),
    ({"LISTEN_FDS": "9" * 30}, "must be a number", HOW),
    ({"LISTEN_FDS": "\N{SUPERSCRIPT TWO}"}, "must be a number", HOW),
    ({"LISTEN_PID": None}, "LISTEN_PID is not set: must be a number", HOW),
    ({"LISTEN_PID": "self"}, "LISTEN_PID='self': must be a number", HOW),
    ({"LISTEN_PID": "4710"}, "LISTEN_PID=4710: the sockets were passed to that process, and this one is 4711", "exec"),
    ({"LISTEN_FDNAMES": "a:b"}, "LISTEN_FDNAMES=a:b names 2 sockets and LISTEN_FDS=1 were passed", "unset both"),
]


@pytest.mark.parametrize(("variables", "what", "remedy"), WRONG_VARIABLES)
def test_variables_that_cannot_be_true_are_refused(
    passed: Pass, variables: dict[str, str | None], what: str, remedy: str
) -> None:
    environ = passed(listener(), **variables)
    with pytest.raises(ListenerError) as caught:
        take(environ, PID, {})
    assert what in str(caught.value)
    assert remedy in str(caught.value)
    assert environ == {"PATH": "/bin"}


WRONG_NAMES = [
    ("web", {"www": "app"}, "is not in SYSTEMD_NAMES = www=app: add web=app or web=probe"),
    ("web", {"web": "app", "health": "probe"}, "no socket 'health' (probe) was passed, only web: "
                                               "write FileDescriptorName=health"),
    ("a:b", {"a": "probe", "b": "probe"}, "2 sockets are the probe port's (a, b): leave one"),
    ("a:b:b", {"a": "app", "b": "probe"}, "2 sockets are the probe port's (b, b): leave one"),
    ("a", {"a": "probe"}, "no socket is the app's: add NAME=app"),
]  # fmt: skip


@pytest.mark.parametrize(("called", "names", "said"), WRONG_NAMES)
def test_names_that_do_not_fit_are_refused(passed: Pass, called: str, names: dict[str, str], said: str) -> None:
    environ = passed(*(listener() for _ in called.split(":")), names=called)
    with pytest.raises(ListenerError) as caught:
        take(environ, PID, names)
    assert said in str(caught.value)
