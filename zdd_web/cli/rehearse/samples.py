"""What a load and its controller measure: requests, handovers, other events, and the stop.

All times are `time.monotonic()` seconds of one machine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

Kind = Literal["new", "keepalive", "thinking"]

#: What counts as near to a handover, seconds.
NEAR = 1.0


class Outcome(str, enum.Enum):
    """What became of one request."""

    OK = "ok"
    STALE = "stale"  # kept-alive connection found closed before the request was written; retried
    UNSENT = "unsent"  # the generator had no port, descriptor or memory left
    REFUSED = "refused"
    RESET = "reset"  # RST on a fresh connection without a byte of reply
    CLOSED = "closed"  # end of file on a fresh connection without a byte of reply
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server_error"  # a complete reply with a 5xx status
    KEEPALIVE_RACE = "keepalive_race"  # written on a reused connection, then reset or closed without a byte
    INVALID = "invalid"  # the bytes are not HTTP, more than one reply, or the reply to another request

    @property
    def lost(self) -> bool:
        """Tell whether a user would have missed an answer."""
        return self not in (Outcome.OK, Outcome.STALE, Outcome.UNSENT)

    @property
    def answered(self) -> bool:
        """Tell whether a complete reply arrived, whatever its status."""
        return self in (Outcome.OK, Outcome.SERVER_ERROR)


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One request.

    `started` is before connecting, or the instant at which an open-loop load was due to send it; `connection_opened`
    is None if there never was a connection; `generation` is the reply's `X-Zdd-Generation`; `detail` an errno name or
    a few words. `length` and `digest` are those of the reply's body, without digits: see changed_replies.py.
    """

    client: int
    kind: Kind
    path: str
    connection_opened: float | None
    started: float
    ended: float
    outcome: Outcome
    status: int | None = None
    generation: int | None = None
    detail: str = ""
    length: int = 0
    digest: str = ""
    method: str = "GET"


@dataclass(frozen=True)
class Handover:
    """One upgrade as the controller saw it; `ready_at`, None if it failed, is when the gate opened."""

    number: int
    from_generation: int
    to_generation: int
    requested_at: float
    ready_at: float | None
    done_at: float
    ok: bool
    reason: str = ""

    @property
    def at(self) -> float:
        return self.done_at if self.ready_at is None else self.ready_at


@dataclass(frozen=True)
class StopResult:
    """The stop that ended the rehearsal; `in_flight` counts the requests in hand when it was asked for."""

    requested_at: float
    ended_at: float
    exit_status: int | None
    in_flight: int
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class ScenarioResult:
    """One scenario other than an upgrade and the stop, with the requests that ended during it and shortly after.

    `excused` of the lost ones were in the hands of a process that the rehearsal killed, and could not be saved.
    """

    name: str
    begun_at: float
    ended_at: float
    ok: bool
    detail: str = ""
    reason: str = ""
    requests: int = 0
    lost: int = 0
    excused: int = 0


@dataclass(frozen=True)
class PhaseSpan:
    """How long a generation was in one phase, as its board had it."""

    generation: int
    phase: str
    begun_at: float
    ended_at: float
