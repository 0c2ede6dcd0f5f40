"""`phase_changed`: sent in each gunicorn worker when the phase of its generation changes.

    @receiver(phase_changed)
    def told(sender, *, phase, previous, generation, **kwargs): ...

`phase` and `previous` are members of `zdd_web.Phase`, which is the sender too; `generation` is its number. Receivers
run on a thread of their own. What they raise is logged and goes no further.
"""

from __future__ import annotations

import logging

from django.db import connections
from django.dispatch import Signal

from zdd_web import log, watch
from zdd_web.lifecycle import Phase

phase_changed = Signal()


def listen() -> None:
    """Have the signal sent in workers from now on; `AppConfig.ready()` calls it, in a preloading master too."""
    watch.listen("django", _send)


def _send(phase: Phase, previous: Phase, generation: int) -> None:
    try:
        sent = phase_changed.send_robust(Phase, phase=phase, previous=previous, generation=generation)
    finally:
        # Django closes connections at the end of a request, which the thread that comes here never has.
        connections.close_all()
    for receiver, answer in sent:
        if isinstance(answer, Exception):
            # Django's own line of it is nowhere to be seen without DEBUG, unless the project says so.
            name = getattr(receiver, "__qualname__", repr(receiver))
            log.emit("internal.error", logging.ERROR, where=f"phase_changed:{name}", exc_info=answer)
