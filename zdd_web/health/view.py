"""What a probe is decided upon: a service as it was at an instant, without anything that could block."""

from __future__ import annotations

import enum
from typing import NamedTuple

from zdd_web.lifecycle import Phase


class Kind(enum.IntEnum):
    """Which probe a check has a say in. The numbers are written on the board: append, never renumber."""

    READINESS = 0
    LIVENESS = 1
    #: Asked once: it keeps a new worker from getting ready, and says nothing later.
    STARTUP = 2

    @property
    def label(self) -> str:
        """The kind as `check(kind=...)` spells it."""
        return self.name.lower()


class Result(enum.IntEnum):
    """How a check ended the last time. The numbers are written on the board: append, never renumber."""

    NONE = 0
    PASSED = 1
    FAILED = 2
    #: It did not end within its time limit.
    LATE = 3


class CheckSeen(NamedTuple):
    """A check as one worker has seen it last; `failing_for` is in seconds, 0 when it passed."""

    name: str
    kind: Kind = Kind.READINESS
    critical: bool = True
    result: Result = Result.NONE
    #: Whether the result is from no longer ago than the check's interval and time limit allow.
    fresh: bool = True
    failing_for: float = 0.0
    message: str = ""


class WorkerHealth(NamedTuple):
    """A worker: whether it serves, and its checks."""

    serving: bool = True
    checks: tuple[CheckSeen, ...] = ()


class Health(NamedTuple):
    """A generation at an instant."""

    phase: Phase
    #: While this one retires.
    successor: Phase | None = None
    #: What fails in a successor that serves, joined by "; ": the names of checks, other things as "name: text".
    successor_trouble: str = ""
    #: How many workers there should be; None where there is no gunicorn.
    wanted: int | None = None
    workers: tuple[WorkerHealth, ...] = ()
    #: Seconds since any worker's last heartbeat, and how many there may be; None for no limit.
    silence: float = 0.0
    worker_timeout: float | None = None
    #: Seconds for which the master's main loop has not run, 0 for one that runs.
    master_stalled: float = 0.0
    #: The setting LAME_DUCK_READY.
    lame_duck_ready: bool = False
    #: What the release is called that this generation runs.
    release: str = ""

    @property
    def takes_requests(self) -> bool:
        """Whether readiness, as far as the phase decides it, is 200.

        >>> Health(Phase.LAME_DUCK).takes_requests, Health(Phase.LAME_DUCK, lame_duck_ready=True).takes_requests
        (False, True)
        """
        return self.speaking is Phase.SERVING or (self.lame_duck_ready and self.speaking is Phase.LAME_DUCK)

    @property
    def speaking(self) -> Phase:
        """The phase that a probe is told.

        A connection that a client keeps to a retiring generation still asks about the service, not about this process.
        """
        if self.phase is Phase.RETIRING and self.successor is not None:
            return self.successor
        return self.phase
