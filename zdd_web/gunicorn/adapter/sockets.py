"""gunicorn's socket objects: made of an address or a descriptor."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from gunicorn import sock

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.patches import write

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
    from zdd_web.gunicorn.adapter.protocols import Listener, SocketName


def check_certificates(cfg: Config) -> None:
    """Raise `SettingsError` for TLS files that are not there: found out by the first client otherwise.

    gunicorn looks in `create_sockets()`, which upgrades and the other listener modes do without; see tests/contract:
    test_create_sockets_looks_for_certificates.
    """
    for name in ("certfile", "keyfile"):
        path = getattr(cfg, name)
        if path and not os.path.exists(path):
            raise SettingsError(f"{name} = {path!r}: this file does not exist: restore it, or set {name} to another")


def create_listener(server: ArbiterFacade, address: SocketName) -> Listener:
    """Bind an address and listen, with gunicorn's own tries and errors: it ends the process when it cannot."""

    class Alone:
        address: list[SocketName]

        def __getattr__(self, name: str) -> Any:
            return getattr(server.cfg, name)

    conf = Alone()
    conf.address = [address]
    listener: Listener
    (listener,) = sock.create_sockets(conf, server.log)
    write(listener, "conf", server.cfg)
    return listener


def adopt_listener(server: ArbiterFacade, fd: int, *, shared: bool = False) -> Listener:
    """Wrap a descriptor in gunicorn's socket object, which takes it over.

    Not by its own `create_sockets()`: that takes the number in `fd://` for a descriptor once more (tests/contract:
    test_create_sockets_adopts_the_number_of_a_bind_too). One of several that share a port may be only bound, and stays
    so. Raises OSError.
    """
    with socket.socket(fileno=os.dup(fd)) as look:
        name = look.getsockname()
        is_bound_only = shared and not look.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    # An abstract Unix socket's is bytes.
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    kind = sock._sock_type(name)
    if is_bound_only:
        listener = _unmade(kind, server, name)
        bound = socket.socket(fileno=fd)
        bound.setblocking(False)
        write(listener, "sock", bound)
        return listener
    adopted: Listener = kind(name, server.cfg, server.log, fd=fd)
    # gunicorn makes it inheritable, by whatever the app starts too; a successor is given it by number.
    adopted.sock.set_inheritable(False)
    return adopted


def bind_listener(server: ArbiterFacade, address: SocketName, *, shared: bool = False) -> Listener:
    """Bind an address, which others may share, and do not listen yet. Raises OSError."""
    kind = sock._sock_type(address)
    listener = _unmade(kind, server, address)
    made = socket.socket(kind.FAMILY, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind.FAMILY != socket.AF_UNIX:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if isinstance(address, str) and address.startswith("\0"):
            # gunicorn before 27 would change the owner of a file that there is not.
            made.bind(address)
        else:
            listener.bind(made)
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    write(listener, "sock", made)
    return listener


def take_stock_inheritance() -> list[int]:
    """Take the descriptors that a gunicorn without zdd_web hands to its successor."""
    text = os.environ.pop("GUNICORN_FD", "")
    return [int(fd) for fd in text.split(",") if fd]


def _unmade(kind: Any, server: ArbiterFacade, address: SocketName) -> Listener:
    # gunicorn's constructor listens at once: what is done here is the rest of it.
    listener: Listener = kind.__new__(kind)
    write(listener, "log", server.log)
    write(listener, "conf", server.cfg)
    write(listener, "cfg_addr", address)
    return listener
