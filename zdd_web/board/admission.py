"""How far a listener lets new connections in: what its master says of it on the board."""

from __future__ import annotations

import enum


class Admission(enum.IntEnum):
    """How far a listener lets new connections in. Append, never renumber."""

    OPEN = 0
    #: One may wait at a time; the others' kernels try again.
    LIMITED = 1
    BLOCKED = 2
    #: Not ours to close: another process serves on it, or will.
    HANDED_OFF = 3
    #: New connections go to others on the same port (listeners/reuseport/drain.py).
    STEERED = 4
    #: Bound, and it does not listen: for workers that SIGTTIN may bring.
    BOUND = 5


#: No new connection comes in; some may still wait.
SHUT = (Admission.LIMITED, Admission.BLOCKED, Admission.STEERED)
