"""The handover channel: the messages between two generations.

A SOCK_SEQPACKET pair, made by the old master before it forks: messages stay whole, and the end of either process is
the end of the file at the other. Every message is a JSON object with a "kind":

    successor   -> hello   pid, pid_file, the listeners that it does not want (dropped), the paths that it has made
                           (added_paths); its board as SCM_RIGHTS, before its first fork, so that the predecessor
                           knows every worker pid there will ever be
                   speaks  it has its own stderr again; what it said before is in the boot log
                   ready   workers: all stand at the gate
                   failed  reason
                   release it ends because it was told to, or because its own successor serves: do not come back
    predecessor -> go      open the gate. Asked for rather than assumed: the deadline and the answer meet at one
                           place, so a generation that was given up can never open its gate a moment later
                   office  the commit window is over: the pid file and the control socket are yours
                   given_up  reason: only to a successor that is not a child (takeover.py); a child is killed
    either one  -> reopen  number: log files were rotated (log_rotation.py); earlier versions ignore it
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

#: A message is a few hundred bytes; a reason may quote a traceback's last line. What is longer arrives cut, as garbage.
MESSAGE_BYTES = 16_384

#: How many messages are read at a time: a peer that sends without end must not hold up the other's loop.
MOST_AT_A_TIME = 64
#: More than the kernel's buffer holds of the smallest: all that a peer that has ended can have left.
MOST_QUEUED = 4096


class Message(NamedTuple):
    """One message; `fd` is the descriptor that came with it, or -1."""

    kind: str
    fields: dict[str, Any]
    fd: int = -1

    def number(self, name: str) -> int:
        """Return a field that is a whole number; 0 when there is none."""
        value = self.fields.get(name)
        return value if isinstance(value, int) else 0


class Channel:
    """One end of the pair, never blocking."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self.ended = False

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return the predecessor's and the successor's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._end.fileno()

    def send(self, kind: str, *, fd: int = -1, **fields: object) -> None:
        """Send a message; to an ended peer it is lost, which `receive()` will tell."""
        data = json.dumps({"kind": kind, **fields}).encode()
        try:
            if fd >= 0:
                socket.send_fds(self._end, [data], [fd])
            else:
                self._end.send(data)
        except OSError:
            # Not `ended` yet: what the peer said before it died is still to be read.
            pass

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none; sets `ended` when there will be no more."""
        if self.ended:
            return None
        try:
            data, fds, _, _ = self._receive()
        except BlockingIOError:
            return None
        except OSError:
            data, fds = b"", []
        if not data:
            self.ended = True
            return None
        try:
            fields = json.loads(data)
            kind = fields.pop("kind")
            if kind == "hello" and fds:
                return Message(kind, fields, fds.pop())
            return Message(kind, fields)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return Message("garbage", {})
        finally:
            # Nothing else comes with a descriptor, and one that stayed open would be lost to this process.
            for fd in fds:
                os.close(fd)

    def receive_some(self, most: int = MOST_AT_A_TIME) -> Iterator[Message]:
        """Return the messages that are there, `most` of them at most."""
        for _ in range(most):
            message = self.receive()
            if message is None:
                return
            yield message

    def _receive(self) -> tuple[bytes, list[int], int, object]:
        try:
            return socket.recv_fds(self._end, MESSAGE_BYTES, 1)
        except ConnectionResetError:
            # A peer that ended with something of ours unread: said once, and before what it had told us.
            return socket.recv_fds(self._end, MESSAGE_BYTES, 1)

    def close(self) -> None:
        """Close this end."""
        self.ended = True
        self._end.close()
