"""Tests that leave nothing behind: checks, groups, hooks and settings are as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zdd_web import process


@contextmanager
def kept() -> Iterator[None]:
    """Have checks, apps, groups, hooks and settings at the end as they are now.

    What a module registers when it is imported stays, if it was imported before: it would not be imported again. The
    settings are read anew from the environment when they are first needed. Raises `LifecycleError` in a worker.

    >>> import zdd_web
    >>> from zdd_web.checks import registered
    >>> before = registered()
    >>> with kept():
    ...     _ = zdd_web.check("only_here")(lambda: True)
    >>> registered() == before
    True
    """
    restore = process.remember()
    try:
        yield
    finally:
        restore()
