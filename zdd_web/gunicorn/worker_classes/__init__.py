"""What differs from one worker class to the next: one family of classes, one file.

`WorkerSide` (worker.py) asks its family wherever classes part ways: how a worker waits at the gate, how it stops to
accept, how its loop is ended and how it waits meanwhile. Line references are to gunicorn 27.0.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.worker_classes.family import Family

if TYPE_CHECKING:
    from zdd_web.gunicorn.worker import WorkerSide

#: What to write for `worker_class`.
WORKER_CLASSES = ("sync", "gthread", "gevent", "asgi", "uvicorn_worker.UvicornWorker")

#: Package or module, and class: known by name, since looking must not import what is not installed.
_FAMILIES = {
    ("gunicorn.workers.sync", "SyncWorker"): "blocking",
    ("gunicorn.workers.gthread", "ThreadWorker"): "blocking",
    ("gunicorn.workers.ggevent", "GeventWorker"): "gevent",
    ("gunicorn.workers.gasgi", "ASGIWorker"): "asgi",
    ("uvicorn_worker._workers", "UvicornWorker"): "uvicorn",
}

_REMEDIES = {
    ("gunicorn.workers.ggevent", "GeventPyWSGIWorker"): "it serves with gevent's own HTTP, past gunicorn: use gevent",
    ("uvicorn.workers", "UvicornWorker"): "install uvicorn-worker and use uvicorn_worker.UvicornWorker",
}


def family_name(worker_class: type, written: str = "") -> str:
    """Return the name of a worker class's family. Raises `SettingsError` for one that this package does not know."""
    for base in worker_class.__mro__:
        name = (base.__module__, base.__qualname__)
        if name in _REMEDIES:
            raise SettingsError(f"worker_class = {written!r} is not supported: {_REMEDIES[name]}")
        if name in _FAMILIES:
            return _FAMILIES[name]
    raise SettingsError(f"worker_class = {written!r} is not supported: use one of {', '.join(WORKER_CLASSES)}")


def family_of(side: WorkerSide) -> Family:
    """Make the family of a worker, in the worker's process: here its packages may be imported."""
    name = family_name(type(side.worker))
    if name == "gevent":
        from zdd_web.gunicorn.worker_classes.greenlets import Greenlets

        return Greenlets(side)
    if name == "asgi":
        from zdd_web.gunicorn.worker_classes.loops import AsgiLoop

        return AsgiLoop(side)
    if name == "uvicorn":
        from zdd_web.gunicorn.worker_classes.loops import UvicornLoop

        return UvicornLoop(side)
    return Family(side)
