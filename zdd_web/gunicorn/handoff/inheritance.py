"""What a successor is given: descriptors, and what they are.

A successor that was forked inherits the listeners, its end of the channel and the boot log by exec; the environment
variable says under which descriptors. gunicorn's own `GUNICORN_PID` and `GUNICORN_FD` are set so that a new release
without zdd_web ends before it binds, instead of serving ungated. One that was started on its own is sent the same.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.settings import HANDOVER

ENV = HANDOVER


#: Descriptors that an inheritance may have, by their names in it.
_OPTIONAL = ("board", "probe", "exchange_give", "exchange_take", "history", "lineage")

#: Those of them that a process which was not forked is sent too: not the lineage, which has environments in it.
_SENT = tuple(name for name in _OPTIONAL if name != "lineage")


class Inheritance(NamedTuple):
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
    #: A process outside the service holds the listeners too, such as systemd: they are never closed for good.
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
    #: The readers' ends of the pipes that processes of this service have as their stderr (system/boot_log.py).
    stderr_pipes: tuple[int, ...] = ()
    #: The descriptors that the first master was started with; None when the predecessor's version does not tell.
    passed_on: tuple[int, ...] | None = None
    #: The ends of the pair by which kept connections travel (sockets/exchange.py): for sending, and for receiving.
    exchange_give: int = -1
    exchange_take: int = -1
    #: The predecessor's history, and which releases there were before (upgrade/deploy_history.py); the latter for a
    #: successor that is forked.
    history: int = -1
    lineage: int = -1
    #: How many workers are to serve while the predecessor watches, a number or a percentage; "" for all.
    canary: str = ""

    def to_environ(self) -> str:
        """Return the value of the environment variable."""
        return json.dumps(self._asdict())

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All descriptors that the exec must leave open."""
        optional = [getattr(self, name) for name in _OPTIONAL if getattr(self, name) >= 0]
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
        return cls(**{name: fields[name] for name in cls._fields if name in fields})

    def to_message(self) -> tuple[dict[str, Any], list[int]]:
        """Return what a process that is not a child is sent: fields, and descriptors in an order that these tell."""
        names = ["boot_log", *(name for name in _SENT if getattr(self, name) >= 0)]
        fields = {**self._asdict(), "descriptors": names}
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
