"""SIGTERM at every line that a worker of gunicorn runs: a handler runs between any two, and none may cost a request."""

from __future__ import annotations

import time
from http.client import HTTPException

import pytest

from tests.processes.harness import Service

#: Each worker is told to leave `step` lines of gunicorn's later than the one before it.
TERM_AT_A_LINE = """
import os, pathlib, signal, sys
turn = pathlib.Path("turn")

from gunicorn import sock, util
from gunicorn.http import wsgi
from gunicorn.workers import base, gthread, sync
files = {module.__file__ for module in (sock, util, wsgi, base, gthread, sync)}

def post_worker_init(worker):
    from zdd_web.gunicorn import hooks
    left = int(turn.read_text()) if turn.exists() else {first}
    turn.with_suffix(".new").write_text(str(left + {step}))
    turn.with_suffix(".new").replace(turn)

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            sys.settrace(None)
            # As the master would write it; a worker cannot.
            type(hooks.state.worker.slot).retire = 1
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        return trace

    sys.settrace(trace)
"""


def told_to_leave_at_each_line(service: Service, lines: int, *, first: int = 1, step: int = 1) -> None:
    """Have a worker leave at each of so many lines of its loop, or each `step`th from `first`; nothing may be lost."""
    service.configure(TERM_AT_A_LINE.replace("{step}", str(step)).replace("{first}", str(first))).start()
    turn, until = service.directory / "turn", time.monotonic() + max(300, lines)
    lost = []
    while int(turn.read_text()) <= lines:
        assert time.monotonic() < until
        line = int(turn.read_text())
        try:
            status = service.get().status
        except (OSError, HTTPException) as error:
            status = repr(error)
        if status != 200:
            lost.append((line, status))
    assert lost == []
    assert not service.matches("Traceback")
    service.stop()


#: The first lines of the loop begin and end a request: each second one here. tests/processes/long has 2,000 of each.
@pytest.mark.parametrize(("worker_class", "lines", "first"), [("sync", 260, 1), ("gthread", 160, 2)])
@pytest.mark.begins_first
def test_a_worker_that_is_told_to_leave_at_any_line_loses_nothing(
    make_service, worker_class: str, lines: int, first: int
):
    told_to_leave_at_each_line(make_service(worker_class, workers=1), lines, first=first, step=2)
