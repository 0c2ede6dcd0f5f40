"""The memory that workers inherit: the master's objects are kept out of garbage collection, so that pages stay shared.

A collection writes into the header of each object that it visits, and Python collects several times as it ends. Without
this, each worker copies the pages of everything that it has inherited: gunicorn and zdd_web alone cost 0.1 s of CPU at
the end of each worker, in the middle of a deploy; with `preload_app` it is the whole app. Python's documentation of
`gc.freeze` recommends the same.
"""

from __future__ import annotations

import gc


class SharedHeap:
    """The objects that the master had at its last fork of a new app."""

    def __init__(self) -> None:
        self._is_frozen = False

    def freeze(self) -> None:
        """Keep all objects of this process out of garbage collection, once; before a fork.

        Collects first: what is garbage now could not be collected later, with whatever it holds open.

        >>> heap = SharedHeap()
        >>> heap.freeze()
        >>> gc.get_freeze_count() > 0
        True
        >>> heap.thaw()
        >>> gc.get_freeze_count()
        0
        """
        if not self._is_frozen:
            self._is_frozen = True
            gc.collect()
            gc.freeze()

    def thaw(self) -> None:
        """Have them collected again: after a reload the app of before is garbage."""
        if self._is_frozen:
            self._is_frozen = False
            gc.unfreeze()
