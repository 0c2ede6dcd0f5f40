"""sd_listen_fds(3): the listening sockets that systemd, or systemd-socket-activate, has opened for this process.

They are the descriptors from 3 on. LISTEN_FDS says how many, LISTEN_PID whose they are, and LISTEN_FDNAMES what the
socket unit calls them (`FileDescriptorName=`, else the unit's own name), separated by colons.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from zdd_web.errors import ListenerError

FIRST = 3

#: The name of a socket that was given none.
UNNAMED = "unknown"

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

_OTHERS = {int(socket.SOCK_DGRAM): "a datagram socket", int(socket.SOCK_SEQPACKET): "a packet socket"}

_HOW = (
    "start the service from a socket unit (ListenStream= in a .socket beside the .service), or try it with "
    "systemd-socket-activate -l 127.0.0.1:8000 gunicorn ..."
)


class Activated(NamedTuple):
    """A socket that was passed: its descriptor, its name, and whether it is the "app"'s or the "probe" port's."""

    fd: int
    name: str
    role: str


def take(environ: MutableMapping[str, str], pid: int, names: Mapping[str, str]) -> tuple[Activated, ...]:
    """Take the sockets that were passed to process `pid`, and their variables out of the environment.

    `names` maps the names of sockets to "app" or "probe"; when it is empty every socket is the app's. No child that is
    not meant to will inherit them. Raises `ListenerError`.
    """
    listen_pid, count_text, names_text, _ = (environ.pop(variable, None) for variable in VARIABLES)
    if count_text is None:
        raise ListenerError(f"LISTENER = 'systemd', and systemd has passed no socket (no LISTEN_FDS): {_HOW}")
    owner = _number("LISTEN_PID", listen_pid)
    if owner != pid:
        raise ListenerError(
            f"LISTEN_PID={owner}: the sockets were passed to that process, and this one is {pid}: have ExecStart= "
            f"start gunicorn itself, or exec it in the script that does (`exec gunicorn ...`)"
        )
    count = _number("LISTEN_FDS", count_text)
    if not count:
        raise ListenerError(f"LISTEN_FDS=0: systemd has passed no socket: {_HOW}")
    called = names_text.split(":") if names_text is not None else [UNNAMED] * count
    if len(called) != count:
        raise ListenerError(
            f"LISTEN_FDNAMES={names_text} names {len(called)} sockets and LISTEN_FDS={count_text} were passed: "
            f"unset both, or leave them as systemd sets them"
        )
    for fd, name in enumerate(called, FIRST):
        _check(fd, name)
    found = tuple(Activated(fd, name, _role(fd, name, names)) for fd, name in enumerate(called, FIRST))
    _check_roles(found, names)
    for each in found:
        os.set_inheritable(each.fd, False)
    return found


def _number(variable: str, text: str | None) -> int:
    # More digits than any pid or descriptor has: int() would take Unicode's digits, underscores and spaces as well.
    if text is None or not (text.isascii() and text.isdecimal() and len(text) <= 9):
        said = " is not set" if text is None else f"={text!r}"
        raise ListenerError(f"{variable}{said}: must be a number, as systemd sets it: {_HOW}")
    return int(text)


def _check(fd: int, name: str) -> None:
    place = f"socket {name!r} (descriptor {fd}) of LISTEN_FDS"
    left_open = f"whatever stands between systemd and gunicorn must leave it open: {_HOW}"
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        raise ListenerError(f"{place} is closed: {left_open}") from None
    if not is_socket:
        raise ListenerError(f"{place} is not a socket: {left_open}")
    borrowed = socket.socket(fileno=fd)
    try:
        kind = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        listens = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    finally:
        borrowed.detach()
    if kind != socket.SOCK_STREAM:
        is_a = _OTHERS.get(kind, "no stream socket")
        raise ListenerError(f"{place} is {is_a}: write ListenStream= in its unit, which makes a stream socket")
    if not listens:
        raise ListenerError(
            f"{place} is a connection and no listener: write Accept=no in its unit, so that one service gets all"
        )


def _role(fd: int, name: str, names: Mapping[str, str]) -> str:
    if not names:
        return "app"
    if name not in names:
        raise ListenerError(
            f"socket {name!r} (descriptor {fd}) is not in SYSTEMD_NAMES = {_spelled(names)}: add {name}=app or "
            f"{name}=probe, or set FileDescriptorName= in its unit to one of these"
        )
    return names[name]


def _check_roles(found: tuple[Activated, ...], names: Mapping[str, str]) -> None:
    there = [each.name for each in found]
    for name, role in names.items():
        if name not in there:
            raise ListenerError(
                f"SYSTEMD_NAMES = {_spelled(names)}: no socket {name!r} ({role}) was passed, only {', '.join(there)}: "
                f"write FileDescriptorName={name} in its unit and Sockets= in the service, or remove the name"
            )
    probes = [each.name for each in found if each.role == "probe"]
    if len(probes) > 1:
        raise ListenerError(
            f"SYSTEMD_NAMES = {_spelled(names)}: {len(probes)} sockets are the probe port's ({', '.join(probes)}): "
            f"leave one of them, with one ListenStream="
        )
    if len(probes) == len(found):
        raise ListenerError(
            f"SYSTEMD_NAMES = {_spelled(names)}: no socket is the app's: add NAME=app for the one that is"
        )


def _spelled(names: Mapping[str, str]) -> str:
    return ",".join(f"{name}={role}" for name, role in names.items())
