"""Real child processes of a test."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

#: Against a child that hangs, which is a failure; no test waits for it when all is well.
PATIENCE = 60


def spawn(function: Callable[[], object]) -> int:
    """Fork a child that runs `function` and exits with 0, or with 1 when it raised; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(PATIENCE)
        function()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    """Wait for a child; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(function: Callable[[], Any]) -> Any:
    """Run `function` in a forked child and return what it returned there, which JSON must be able to carry."""
    reader, writer = os.pipe()

    def report() -> None:
        os.close(reader)
        try:
            text = json.dumps({"value": function()})
        except BaseException:
            text = json.dumps({"traceback": traceback.format_exc()})
        os.write(writer, text.encode())

    pid = spawn(report)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    assert status_of(pid) == 0, "the child did not live to report"
    answer = json.loads(said)
    assert "traceback" not in answer, answer["traceback"]
    return answer["value"]


def read_to_end(fd: int) -> bytes:
    """Read a pipe until everybody who could write to it is gone; closes it."""
    with open(fd, "rb") as file:
        return file.read()
