"""When each generation was in which phase, read from the boards, which outlive their masters."""

from __future__ import annotations

import threading
import time

from zdd_web.cli.rehearse.samples import PhaseSpan
from zdd_web.lifecycle import Phase
from zdd_web.service import Generation

#: A phase that is shorter may be missed, seconds; a board has the instant at which each one began.
LOOK = 0.02

#: Of more generations than this the phases are not kept: a chart cannot show them.
MOST = 2000


class PhaseWatch:
    """Reads the boards of the generations that it is given, in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._spans: list[PhaseSpan] = []
        #: Generations that have not ended, with their phase and when it began.
        self._open: list[tuple[Generation, Phase, float]] = []
        self._thread = threading.Thread(target=self._run, name="zdd-web-phases", daemon=True)

    def __enter__(self) -> PhaseWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def add(self, generation: Generation) -> None:
        """Watch a generation that serves."""
        header = generation.board.header
        with self._lock:
            if len(self._spans) < MOST:
                began, ready = header.started_at / 1e9, header.ready_at / 1e9
                self._spans.append(PhaseSpan(header.generation, Phase.BOOTING.label, began, ready))
                self._open.append((generation, Phase.SERVING, ready))

    def spans(self) -> tuple[PhaseSpan, ...]:
        """Return the phases so far, those that go on as if they ended now."""
        with self._lock:
            self._look()
            now = time.monotonic()
            going_on = [PhaseSpan(g.header.generation, phase.label, at, now) for g, phase, at in self._open]
            return tuple(sorted([*self._spans, *going_on], key=lambda span: (span.begun_at, span.generation)))

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            with self._lock:
                self._look()

    def _look(self) -> None:
        still: list[tuple[Generation, Phase, float]] = []
        for generation, phase, began in self._open:
            header = generation.board.header
            now = Phase(header.phase)
            if now is not phase:
                since = header.phase_since / 1e9
                self._spans.append(PhaseSpan(header.generation, phase.label, began, since))
                phase, began = now, since
            if phase is not Phase.STOPPED:
                still.append((generation, phase, began))
        self._open = still
