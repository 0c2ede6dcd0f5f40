"""Which descriptors the next program inherits.

Python opens everything with close-on-exec; C libraries and a preloaded app may not. An exec in the same process tree
that keeps what happens to be open has one more of each after every generation.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Collection

#: Where there is no list of the open ones: no further than this.
MOST = 65_536


def inheritable() -> tuple[int, ...]:
    """Return the descriptors that an exec would leave open, standard input, output and error aside."""
    return tuple(fd for fd in _open() if _is_inheritable(fd))


def inherit_only(given: Collection[int], passed_on: Collection[int]) -> None:
    """Have an exec leave open what is `given`, what of `passed_on` it would leave open anyway, and nothing else.

    Standard input, output and error stay. Raises OSError for one of `given` that is not open.
    """
    for fd in _open():
        if fd not in passed_on:
            with contextlib.suppress(OSError):  # the one by which the others were found
                os.set_inheritable(fd, False)
    for fd in given:
        os.set_inheritable(fd, True)


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def _open() -> list[int]:
    try:
        found = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no /proc, or no descriptor left to read it with
        found = list(range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MOST)))
    return sorted(fd for fd in found if fd > 2)
