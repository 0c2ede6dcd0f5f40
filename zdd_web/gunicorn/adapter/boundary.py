"""The boundary around everything of ours that runs in gunicorn's loop.

An exception there ends the service (test_any_other_exception_in_the_loop_ends_the_service). So whatever raises in ours
is logged and refused here; only what gunicorn uses to end its own loop goes through.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from zdd_web import log

P = ParamSpec("P")
R = TypeVar("R")

_last: dict[str, float] = {}


def guarded(where: str, function: Callable[P, R]) -> Callable[P, R | None]:
    """Return `function` behind the boundary: what it raises is logged as `internal.error` with `where`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return function(*args, **kwargs)
        except StopIteration:
            # So gunicorn ends its loop: test_sigterm_ends_the_loop_by_stop_iteration. HaltServer is not an Exception.
            raise
        except Exception:
            now = time.monotonic()
            # A tick comes up to fifty times a second while something is under way.
            if now - _last.get(where, -1.0) >= 1.0:
                _last[where] = now
                log.emit("internal.error", logging.ERROR, where=where, exc_info=True)
            return None

    return call
