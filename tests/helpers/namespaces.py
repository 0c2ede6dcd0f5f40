"""Namespaces of a test's own: a /proc mounted in another way, and pids that can be had again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forks import in_child

CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _mount_proc(options: str) -> None:
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"proc", b"/proc", b"proc", 0, options.encode() or None)


def with_hidepid(level: int, function: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> Any:
    """Return what `function` returns in a child whose /proc hides other users' processes.

    `before` is called there as root and with the ordinary /proc. Skips the test where that is not possible.
    """

    def child() -> Any:
        before()
        try:
            _call("unshare", CLONE_NEWNS)
            _mount_proc(f"hidepid={level}")
        except OSError as error:
            return {"skip": str(error)}
        return {"value": function()}

    return _value(in_child(child))


def in_pid_namespace(function: Callable[[], Any]) -> Any:
    """Return what `function` returns as PID 1 of a pid namespace. Skips the test where that is not possible."""

    def child() -> Any:
        try:
            _call("unshare", CLONE_NEWNS | CLONE_NEWPID)
        except OSError as error:
            return {"skip": str(error)}

        def first() -> Any:
            try:
                _mount_proc("")
                Path("/proc/sys/kernel/ns_last_pid").write_text(f"{os.getpid()}")
            except OSError as error:
                return {"skip": str(error)}
            return {"value": function()}

        return in_child(first)

    return _value(in_child(child))


def next_pid(pid: int) -> None:
    """Have the next process of this pid namespace get that pid."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(f"{pid - 1}")


def become_dumpable(uid: int) -> None:
    """Give up root, and be visible to processes of that user all the same, as after an exec."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


def _value(found: dict[str, Any]) -> Any:
    if "skip" in found:
        pytest.skip(f"no namespaces here: {found['skip']}")
    return found["value"]
