"""What differs from one worker class to the next: a file for each family of them.

`WorkerRuntime` (worker.py) asks its family wherever classes part ways: how a worker waits at the gate, how it stops
accepting, how its loop is ended and what it waits for before.
"""

from __future__ import annotations

from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.base import WorkerAdapter


def adapter_for(runtime: AdaptedWorker) -> WorkerAdapter:
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
