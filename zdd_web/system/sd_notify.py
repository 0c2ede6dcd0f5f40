"""sd_notify(3): tell systemd how the service is, and which its main process is."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

#: One datagram; systemd reads no more of it.
MOST_BYTES = 4096


def datagram(*lines: str) -> bytes:
    r"""Return one message of these lines; a line break or a control character within one becomes a space.

    >>> datagram("READY=1", "STATUS=it said:\nMAINPID=1")
    b'READY=1\nSTATUS=it said: MAINPID=1'
    """
    text = "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", line) for line in lines)
    # Cut by characters: half of one would have systemd drop the whole line. The last line is the longest, a status.
    return text.encode("utf-8", "backslashreplace")[:MOST_BYTES].decode(errors="ignore").encode()


def notify(*lines: str, environ: Mapping[str, str] = os.environ, patience: float = 0.0) -> bool:
    """Send lines such as `MAINPID=4711` to systemd in one datagram; tell whether there was anybody to tell.

    `patience` is how long to wait, in seconds, while systemd reads slower than it is told. Raises OSError when there is
    a socket and it does not take the datagram: BlockingIOError or TimeoutError when it is full.

    >>> notify("MAINPID=1", environ={})
    False
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(patience)
        # Connected, since only then the kernel can tell when a full queue has room again.
        sender.connect(address)
        sender.send(datagram(*lines))
    return True
