"""What differs from one worker class to the next: a file for each family of them.

`WorkerRuntime` (worker.py) asks its family wherever classes part ways: how a worker waits at the gate, how it stops
accepting, how its loop is ended and what it waits for before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zdd_web.gunicorn.workers.base import WorkerAdapter

if TYPE_CHECKING:
    from zdd_web.gunicorn.workers.runtime import WorkerRuntime


def adapter_for(runtime: WorkerRuntime) -> WorkerAdapter:
    """Make the family of a worker, in the worker's process: what its class needs is imported there already."""
    name = runtime.worker.family
    if name == "gevent":
        from zdd_web.gunicorn.workers.gevent_adapter import GeventAdapter

        return GeventAdapter(runtime)
    if name == "asgi":
        from zdd_web.gunicorn.workers.asyncio_adapter import AsgiAdapter

        return AsgiAdapter(runtime)
    if name == "uvicorn":
        from zdd_web.gunicorn.workers.asyncio_adapter import UvicornAdapter

        return UvicornAdapter(runtime)
    return WorkerAdapter(runtime)
