"""What two generations say to each other, and what the younger inherits.

One SOCK_SEQPACKET pair, made by the old master before it forks: messages stay whole, and the end of either process is
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
                   given_up  reason: only to a successor that is no child (takeover.py); a child is killed
    either one  -> reopen  number: log files were rotated (rotation.py); earlier versions ignore it

A successor that was forked inherits the listeners, the other end of the pair and the boot log by exec; the environment
variable says under which descriptors. gunicorn's own `GUNICORN_PID` and `GUNICORN_FD` are set so that a new release
without zdd_web ends before it binds, instead of serving ungated. One that was started on its own is sent the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zdd_web.errors import UpgradeError
from zdd_web.settings import HANDOVER

ENV = HANDOVER

#: A message is a few hundred bytes; a reason may quote a traceback's last line. What is longer arrives cut, as garbage.
MESSAGE_BYTES = 16_384

#: What a process that is no child is sent beside the listeners and the boot log, if there is such a thing.
_SENT = ("board", "probe", "history")

#: How many messages are read at a time: a peer that sends without end must not hold up the other's loop.
MOST_AT_A_TIME = 64
#: More than the kernel's buffer holds of the smallest: all that a peer that has ended can have left.
MOST_QUEUED = 4096


@dataclass(frozen=True)
class Message:
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

    def send(self, kind: str, *, fd: int = -1, **fields: Any) -> None:
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

    def _receive(self) -> tuple[bytes, list[int], int, Any]:
        try:
            return socket.recv_fds(self._end, MESSAGE_BYTES, 1)
        except ConnectionResetError:
            # A peer that ended with something of ours unread: said once, and before what it had told us.
            return socket.recv_fds(self._end, MESSAGE_BYTES, 1)

    def close(self) -> None:
        """Close this end."""
        self.ended = True
        self._end.close()


@dataclass(frozen=True)
class Inheritance:
    """What a successor is given, as descriptors of its own."""

    generation: int
    predecessor: int
    channel: int
    boot_log: int
    stderr: int
    listeners: tuple[int, ...]
    binds: tuple[str, ...]
    #: (pid, start time) of the masters before this one, oldest first: those that still run count as generations.
    ancestors: tuple[tuple[int, int], ...] = ()
    #: Somebody outside the service holds the listeners too, such as systemd: nobody may close them for good.
    kept: bool = False
    #: The predecessor's board: counters go on where it leaves off.
    board: int = -1
    #: The probe port's listener, and the PROBE_BIND that it was bound by.
    probe: int = -1
    probe_bind: str = ""
    #: LISTENER; which of several sockets on its address each listener is, those that listen as they stand in the group.
    mode: str = "fd"
    slots: tuple[int, ...] = ()
    #: By port: whether it is known how ours stand there, and the inodes of other masters' listeners that stand before.
    groups: tuple[tuple[int, bool, tuple[int, ...]], ...] = ()
    #: This process was not forked by the predecessor, but has asked it for all this; when that one started.
    taken: bool = False
    predecessor_start: int = 0
    #: The readers' ends of the pipes that processes of this service have as their stderr (bootlog.py).
    stderr_pipes: tuple[int, ...] = ()
    #: The descriptors that the first master was started with; None when the predecessor's version does not tell.
    passed_on: tuple[int, ...] | None = None
    #: The predecessor's history, and which releases there were before, for one that is forked (upgrade/deploys.py).
    history: int = -1
    lineage: int = -1

    def to_environ(self) -> str:
        """Return the value of the environment variable."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All descriptors that the exec must leave open."""
        optional = [fd for fd in (self.board, self.probe, self.history, self.lineage) if fd >= 0]
        return (self.channel, self.boot_log, self.stderr, *self.listeners, *optional, *self.stderr_pipes)

    @classmethod
    def take(cls, environ: dict[str, str] | os._Environ[str]) -> Inheritance | None:
        """Take the inheritance out of an environment; None when there is none.

        Raises `UpgradeError` when the variable is there and cannot be true.
        """
        text = environ.pop(ENV, None)
        if text is None:
            return None
        environ.pop("GUNICORN_PID", None)
        try:
            found = cls._read(json.loads(text))
            for fd in found.descriptors:
                os.fstat(fd)
                os.set_inheritable(fd, False)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UpgradeError(
                f"{ENV}={text}: not an inheritance of this process ({error}): unset the variable"
            ) from None
        return found

    @classmethod
    def _read(cls, fields: dict[str, Any]) -> Inheritance:
        for name in ("listeners", "binds"):
            fields[name] = tuple(fields[name])
        for name in ("slots", "stderr_pipes"):
            fields[name] = tuple(fields.get(name, ()))
        if fields.get("passed_on") is not None:
            fields["passed_on"] = tuple(fields["passed_on"])
        fields["groups"] = tuple((port, ordered, tuple(earlier)) for port, ordered, earlier in fields.get("groups", ()))
        fields["ancestors"] = tuple((pid, start) for pid, start in fields["ancestors"])
        # A predecessor of a later version may give more.
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields})

    def to_message(self) -> tuple[dict[str, Any], list[int]]:
        """Return what a process that is no child is sent: fields, and descriptors in an order that these tell."""
        names = ["boot_log", *(name for name in _SENT if getattr(self, name) >= 0)]
        fields = {**dataclasses.asdict(self), "descriptors": names}
        return fields, [*(getattr(self, name) for name in names), *self.listeners]

    @classmethod
    def from_message(
        cls, fields: dict[str, Any], descriptors: Sequence[int], channel: int, predecessor: int, start: int
    ) -> Inheritance:
        """Make an inheritance of what such a process was sent, from the predecessor with that pid and start time.

        Raises `UpgradeError` for what no predecessor sends.
        """
        try:
            names = [str(name) for name in fields["descriptors"]]
            named = dict(zip(names, descriptors, strict=False))
            given = {"boot_log": named["boot_log"], **{name: named.get(name, -1) for name in _SENT}}
            own: dict[str, Any] = {"channel": channel, "predecessor": predecessor, "predecessor_start": start}
            # It has a stderr, and was started with descriptors, of its own; the numbers sent are the other process's.
            own |= {"taken": True, "stderr_pipes": (), "passed_on": None, "lineage": -1}
            return cls._read({**fields, **given, **own, "stderr": -1, "listeners": descriptors[len(names) :]})
        except (ValueError, TypeError, KeyError) as error:
            raise UpgradeError(
                f"the running master has sent no inheritance ({type(error).__name__}: {error})"
            ) from None

    def open_channel(self) -> Channel:
        """Return this successor's end of the pair."""
        return Channel(socket.socket(fileno=self.channel))
