"""sd_notify(3): tell systemd who the main process is."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send lines such as `MAINPID=4711` to systemd in one datagram; tell whether there was anybody to tell.

    Raises OSError when there is a socket and it does not take the datagram.

    >>> notify("MAINPID=1", environ={})
    False
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto("\n".join(lines).encode(), address)
    return True
