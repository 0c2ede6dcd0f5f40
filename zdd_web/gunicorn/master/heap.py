"""The memory that workers inherit: the master's objects are kept out of garbage collection, so that pages stay shared.

A collection writes into the header of each object that it visits, and Python collects several times as it ends. Without
this, each worker copies the pages of everything that it has inherited: gunicorn and zdd_web alone cost 0.1 s of CPU at
the end of each worker, in the middle of a deploy; with `preload_app` it is the whole app. Python's documentation of
`gc.freeze` recommends the same.
"""

from __future__ import annotations

import gc


def freeze() -> None:
    """Keep all objects of this process out of garbage collection: once, before the first fork.

    Collects first: what is garbage now could not be collected later, with whatever it holds open. For good, since a
    master never loads its app again: SIGHUP is refused with `preload_app`.

    >>> freeze()
    >>> gc.get_freeze_count() > 0
    True
    >>> gc.unfreeze()
    """
    gc.collect()
    gc.freeze()
