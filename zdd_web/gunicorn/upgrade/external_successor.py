"""A successor that is not a child: it was started on its own and has taken over (takeover.py).

It is judged as any other, by its messages and by its board. What differs is its end. The kernel tells this process
nothing of its exit status, only that it has ended: by the end of the channel, and by its pid and start time. And the
process that has started it is to learn why it ends: so it is sent `given_up` first, and ends by itself. Before `go` it
has accepted no request, and if it does not end it is killed two seconds later, with its workers; after `go` it drains,
and is killed only when it stands still.

In another pid namespace its pids mean nothing here, or another process. Its master can be killed where the
kernel tells a pid of ours for it (a namespace below this one), its workers never; they end with it. Nor are its paths
known to be of our file system.
"""

from __future__ import annotations

import contextlib
import signal
import socket

from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.upgrade.successor_process import Upgrade, Verdict
from zdd_web.system import clock, fd_passing, pauses, proc
from zdd_web.system.boot_log import BootLog

#: How long one that was given up may take to say why and end, before it is killed, seconds.
ENDS_WITHIN = 2.0


class ExternalSuccessor(Upgrade):
    """One successor that was started on its own, from its request to the end of this master."""

    is_child = False

    def __init__(
        self,
        end: socket.socket,
        who: fd_passing.Credentials,
        told: int,
        boot_log: BootLog,
        timeout: float,
        commit_window: float,
    ) -> None:
        super().__init__(who.pid or told, Channel(end), boot_log, timeout, commit_window)
        self._foreign = who.pid != told
        self._killable = bool(who.pid and self.start)
        self._given_up_at = clock.NEVER

    @classmethod
    def send_handoff(
        cls,
        end: socket.socket,
        who: fd_passing.Credentials,
        told: int,
        inheritance: Inheritance,
        boot_log: BootLog,
        timeout: float,
        commit_window: float,
    ) -> ExternalSuccessor:
        """Send what a successor inherits. Raises OSError when it cannot be sent."""
        fields, descriptors = inheritance.to_message()
        fd_passing.send(end, {"kind": "inheritance", **fields}, descriptors)
        boot_log.output.close()
        return cls(end, who, told, boot_log, timeout, commit_window)

    def poll(self) -> Verdict | None:
        """See `Upgrade.poll`."""
        verdict = super().poll()
        if self._foreign:
            self.pid_file, self.added_paths = "", ()
        return verdict

    @property
    def has_own_stderr(self) -> bool:
        """Always: it was not forked here."""
        return True

    @property
    def gone(self) -> bool:
        """Whether the successor has ended."""
        if self._channel.ended:
            return True
        with contextlib.suppress(OSError):  # no descriptor left to look with
            return self._killable and not proc.alive(self.pid, self.start)
        return False

    def reaped(self, status: int) -> None:
        """Ignore the end of a child: its pid in another namespace may be the same as one here."""

    def end(self, *, now: bool, reason: str = "") -> None:
        """Send it that it is given up; `follow_end()` sees to the rest."""
        self._given_up_at = clock.now_ns()
        self._channel.send("given_up", reason=reason)

    def follow_end(self, *, wait: bool = True) -> bool:
        """Tell whether one that was given up has ended; kill it when it does not. To be asked until it has."""
        for message in self._channel.receive_some():
            # A `hello` that was not read yet: its board names the workers that it has forked.
            self._read_board(message.fd)
        if self.gone:
            if not self._foreign:
                self._end_workers(now=not self.has_accepted)
            self.forget()
            return True
        stuck = not self.has_accepted and (not wait or pauses.since(self._given_up_at) > ENDS_WITHIN)
        if stuck or self.is_stalled():
            if not self._killable:
                self.forget()
                return True
            with contextlib.suppress(OSError):
                proc.kill(self.pid, self.start, signal.SIGKILL)
        return False

    def _how_it_ended(self) -> str:
        return "; ".join([f"process {self.pid} is gone", *self._errors()])

    def _how_far(self) -> str:
        if self.board is None:
            return "it has not introduced itself yet (with preload_app, an app that hangs at import?)"
        return super()._how_far()
