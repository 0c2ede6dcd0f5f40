"""What cannot be bound, and why: the errors of bind(2) and listen(2), with the remedy."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import stat

from zdd_web.errors import ListenerError
from zdd_web.listeners.matching import Address, Place, normal
from zdd_web.listeners.reuseport import bpf


def refuse_mixed(places: list[Place]) -> None:
    """Raise `ListenerError` for binds that cannot share a port in `reuseport` mode."""
    ports: dict[int, Address] = {}
    for place in places:
        if not isinstance(place.address, tuple):
            what = "a descriptor" if isinstance(place.address, int) else "a Unix socket"
            raise ListenerError(
                f"bind = {place.bind!r} is {what}, and LISTENER = 'reuseport' shares TCP ports: use LISTENER = 'fd'"
            )
        address = normal(place.address)
        port = place.address[1]
        if port in ports and ports[port] == address:
            raise ListenerError(f"bind = {place.bind!r}: port {port} is there twice: bind it once")
        if port and ports.setdefault(port, address) != address:
            raise ListenerError(
                f"bind = {place.bind!r}: port {port} is bound by another address too, and connections would go to one "
                f"of the two: bind one, '[::]:{port}' for IPv4 and IPv6"
            )


def unlink_stale_socket(path: str) -> None:
    """Remove a stale socket from a path; raises `ListenerError` where a process answers, or it is something else."""
    if path.startswith("\0"):
        return
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ListenerError(f"bind = 'unix:{path}': this is not a socket: choose another path, or remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        # Its queue may be full, and it may be a socket of another kind.
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise ListenerError(f"bind = 'unix:{path}': another process serves there: choose another path, or stop it")
    os.unlink(path)


def describe_bind_error(error: OSError | OverflowError, address: Address, *, shared: bool) -> str:
    """Say why an address cannot be bound, which is to be shared with others or not, and what to do."""
    if isinstance(error, OverflowError):
        return "no such port: choose one from 1 to 65535, or 0 for any that is free"
    said = (error.strerror or str(error)).lower()
    if isinstance(address, str):
        return f"{said}: {_path_remedy(error)}"
    if error.errno == errno.EACCES:
        return f"{said}: a port below 1024 needs CAP_NET_BIND_SERVICE: choose another, or have systemd open it"
    if error.errno != errno.EADDRINUSE or not isinstance(address, tuple):
        return f"{said}: choose another address"
    try:
        there = bpf.entries(address[1], bpf.LISTEN)
    except OSError:
        there = []
    users = sorted({entry.uid for entry in there})
    if not shared or not users:
        return f"{said}: another process has this port (`ss -ltnp` shows which): end it, or choose another port"
    if users != [os.geteuid()]:
        names = ", ".join(_user(uid) for uid in users)
        return (
            f"{said} by user {names}, and the kernel shares a port only among processes of one user: end that, or run "
            f"this as the same user as it (here it is {_user(os.geteuid())})"
        )
    return (
        f"{said} by a socket without SO_REUSEPORT, or by one on an address that covers this one (`ss -ltnp` shows "
        f"which): both must be LISTENER = 'reuseport' and bind the same address"
    )


def _path_remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "make the directory first (systemd: RuntimeDirectory=)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"user {_user(os.geteuid())} may not write to the directory: let it, or choose another path"
    return "choose another path"


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)
