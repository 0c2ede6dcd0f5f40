"""The phases of a generation and what may follow what.

Everything that decides which phase comes next lives in this file, as data. The master (the only writer of the phase)
asks `after()`; a pair that the table does not know raises `LifecycleError` and changes nothing.

A stop of a generation that serves always passes through `LAME_DUCK`, also when its length is zero, so that there is
one way to a stop and not two.
"""

from __future__ import annotations

import enum

from zdd_web.errors import LifecycleError


class Phase(enum.IntEnum):
    """Where a generation stands. The numbers are written on the board: append, never renumber."""

    BOOTING = 1
    SERVING = 2
    LAME_DUCK = 3
    DRAINING = 4
    RETIRING = 5
    STOPPED = 6

    @property
    def label(self) -> str:
        """The phase's name as log lines, `status` and the docs spell it.

        >>> Phase.LAME_DUCK.label
        'lame_duck'
        """
        return self.name.lower()

    def __str__(self) -> str:
        return self.label

    def __format__(self, spec: str) -> str:
        return format(self.label, spec)


class Event(enum.Enum):
    """What may happen to a generation."""

    READY = "all workers stand at the gate"
    STOP = "SIGTERM"
    LAME_DUCK_OVER = "the lame duck has lasted DRAIN_DELAY"
    SUCCEEDED = "the successor serves and has lived through the commit window"
    SUCCESSOR_LOST = "the successor died while this generation retired"
    FINISHED = "no worker is left"


TRANSITIONS: dict[Phase, dict[Event, Phase]] = {
    Phase.BOOTING: {Event.READY: Phase.SERVING, Event.STOP: Phase.DRAINING, Event.FINISHED: Phase.STOPPED},
    Phase.SERVING: {Event.STOP: Phase.LAME_DUCK, Event.SUCCEEDED: Phase.RETIRING},
    # A second SIGTERM skips what is left of the lame duck.
    Phase.LAME_DUCK: {Event.STOP: Phase.DRAINING, Event.LAME_DUCK_OVER: Phase.DRAINING},
    Phase.DRAINING: {Event.STOP: Phase.DRAINING, Event.FINISHED: Phase.STOPPED},
    # SIGTERM while retiring gives the retirement a deadline; where it leads stays the same.
    Phase.RETIRING: {
        Event.STOP: Phase.RETIRING,
        Event.SUCCESSOR_LOST: Phase.SERVING,
        Event.FINISHED: Phase.STOPPED,
    },
    Phase.STOPPED: {},
}

#: What a master does when it enters a phase, in this order: names of actions that the master defines, so that no loop
#: has to find out whether they were done.
ON_ENTRY: dict[Phase, tuple[str, ...]] = {
    Phase.SERVING: ("open_gate",),
    Phase.DRAINING: ("block_new_connections", "retire_workers"),
    Phase.RETIRING: ("drain_unwanted_listeners", "retire_workers"),
}

#: A generation spawns workers in these: it is to serve, or serves.
SPAWNING = frozenset({Phase.BOOTING, Phase.SERVING, Phase.LAME_DUCK})

#: Work begun in these phases is the last of this generation: replies close their connection, `draining()` is true.
LEAVING = frozenset({Phase.LAME_DUCK, Phase.DRAINING, Phase.RETIRING, Phase.STOPPED})

#: The whole service stops: a request that arrives now was routed by a balancer that has not noticed yet.
STOPPING = frozenset({Phase.LAME_DUCK, Phase.DRAINING})

#: A worker obeys SIGTERM at once in these; in the others only when its slot says `retire`.
WORKERS_LEAVE = frozenset({Phase.DRAINING, Phase.RETIRING, Phase.STOPPED})

#: The main loop of a master runs at least once a second in these; before, it may be loading a preloaded app.
LOOPING = frozenset({Phase.SERVING, Phase.LAME_DUCK, Phase.DRAINING, Phase.RETIRING})

#: A main loop that has not run for so long, in seconds, is stopped or stuck: the workers may serve on, but no signal is
#: obeyed and no worker is replaced.
STALLED_AFTER = 5.0


def stalled_for(phase: Phase, tick_at: int, now: int) -> float:
    """Return for how many seconds a master's main loop has not run; 0 for one that runs.

    `tick_at` and `now` are monotonic nanoseconds.

    >>> stalled_for(Phase.SERVING, tick_at=1_000_000_000, now=9_000_000_000)
    8.0
    >>> stalled_for(Phase.SERVING, tick_at=8_000_000_000, now=9_000_000_000)
    0.0
    """
    silent = (now - tick_at) / 1e9
    return silent if tick_at and phase in LOOPING and silent > STALLED_AFTER else 0.0


def after(phase: Phase, event: Event) -> Phase:
    """Return the phase that follows `phase` upon `event`.

    Raises `LifecycleError` for a pair that the table does not know.

    >>> after(Phase.SERVING, Event.STOP).label
    'lame_duck'
    """
    try:
        return TRANSITIONS[phase][event]
    except KeyError:
        raise LifecycleError(
            f"phase {phase.label} does not know the event {event.name.lower()} ({event.value})"
        ) from None
