"""The worker classes that are supported, and the adapter of each.

Whatever differs between worker classes is in their adapters: how a worker waits at the gate, how it stops accepting,
how its loop is ended, and what it waits for before that.
"""

from __future__ import annotations

from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.worker_adapter import WorkerAdapter


def adapter_for(runtime: AdaptedWorker) -> WorkerAdapter:
    """Make the adapter of a worker, in the worker's process, which has imported what its class needs."""
    name = runtime.worker.family
    if name == "gevent":
        from zdd_web.gunicorn.workers.gevent_adapter import GeventAdapter

        return GeventAdapter(runtime)
    if name == "asgi":
        from zdd_web.gunicorn.workers.asgi_adapter import AsgiAdapter

        return AsgiAdapter(runtime)
    if name == "uvicorn":
        from zdd_web.gunicorn.workers.uvicorn_adapter import UvicornAdapter

        return UvicornAdapter(runtime)
    return WorkerAdapter(runtime)
