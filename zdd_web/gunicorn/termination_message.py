"""Why a start came to nothing, where the platform shows it (`TERMINATION_LOG`).

Kubernetes reads the file when the container has ended, however that was. So what the start is doing stands there from
its beginning: a process that is killed, at a probe's deadline or because memory ran out, can write nothing more. A
reason that is known takes its place, and a service that serves takes it away.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from zdd_web import log
from zdd_web.gunicorn.adapter.exits import HaltServer
from zdd_web.settings import ENV_PREFIX, Settings

#: The exit status of a start that was ended by a signal: 0 would be shown as "Completed".
ENDED_WHILE_BOOTING = 1


class StartMessage:
    """The termination message of one start; an empty path for none, as in an upgrade, which has its own report."""

    def __init__(self, path: str) -> None:
        self._path, self._process = path, os.getpid()
        self._has_failed = False

    def doing(self, what: str) -> None:
        """Leave what the start is doing, in case that it is killed."""
        if not self._has_failed:
            self._write(f"zdd_web: ended before it served, while {what}")

    def failed(self, reason: str) -> None:
        """Leave why the start failed; the first reason stays."""
        if not self._has_failed:
            self._has_failed = True
            self._write(f"zdd_web: the start failed: {reason}")

    def served(self) -> None:
        """Leave nothing: from now on whatever ends the service is another matter."""
        self._write("")
        self._path = ""

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Have what ends the start from within this block stand in the message."""
        try:
            yield
        except StopIteration:
            raise  # gunicorn's way to end its loop without an error
        except HaltServer as halt:
            self.failed(str(halt.reason))
            raise
        except BaseException as error:
            self.failed(f"{type(error).__name__}: {error}")
            raise

    def _write(self, text: str) -> None:
        # A worker leaves its own main function by way of the master's, in which it was forked.
        if self._path and os.getpid() == self._process:
            log.leave_a_message(self._path, text)


def path(installed: Mapping[str, object], environ: Mapping[str, str]) -> str:
    """Return TERMINATION_LOG as `install()` and the environment have it, before they are looked at as a whole.

    >>> path({"termination_log": "/tmp/why"}, {}), path({"termination_log": 3}, {"ZDD_WEB_TERMINATION_LOG": ""})
    ('/tmp/why', '')
    """
    found = environ.get(f"{ENV_PREFIX}TERMINATION_LOG", installed.get("termination_log"))
    return found if isinstance(found, str) else Settings().termination_log
