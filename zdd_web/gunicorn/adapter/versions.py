"""The only place that knows which gunicorn this is, and which worker classes it has.

What a release lacks is asked of the object, not of the version number, wherever the object can tell.
"""

from __future__ import annotations

import re

import gunicorn

from zdd_web.errors import SettingsError
from zdd_web.gunicorn.adapter.config import Config

INSTALLED: str = gunicorn.__version__

#: The oldest gunicorn that is supported, and the first that is not known yet.
OLDEST, BEYOND = (23,), (28,)

#: What to write for `worker_class`.
WORKER_CLASSES = ("sync", "gthread", "gevent", "asgi", "uvicorn_worker.UvicornWorker")

#: Module and class, and the family it belongs to: by name, since a look must not import what is not installed.
FAMILIES = {
    ("gunicorn.workers.sync", "SyncWorker"): "blocking",
    ("gunicorn.workers.gthread", "ThreadWorker"): "blocking",
    ("gunicorn.workers.ggevent", "GeventWorker"): "gevent",
    ("gunicorn.workers.gasgi", "ASGIWorker"): "asgi",
    ("uvicorn_worker._workers", "UvicornWorker"): "uvicorn",
}

#: What a family replaces something in, beside the module of its class; most have nothing there.
MODULES: dict[str, tuple[str, ...]] = {"asgi": ("gunicorn.asgi.protocol",)}

INSTEAD = {
    ("gunicorn.workers.ggevent", "GeventPyWSGIWorker"): "it answers past gunicorn; use gevent",
    ("uvicorn.workers", "UvicornWorker"): "install uvicorn-worker and use uvicorn_worker.UvicornWorker",
}


def numbers(version: str) -> tuple[int, ...]:
    """Return major and minor number of a version.

    >>> numbers("27.0.1"), numbers("28.1.0.dev0") < (28, 2)
    ((27, 0), True)
    """
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def check_version(version: str = INSTALLED) -> None:
    """Raise `SettingsError` for a gunicorn whose insides this package was not measured against."""
    if not OLDEST <= numbers(version) < BEYOND:
        raise SettingsError(
            f"gunicorn {version} is not supported: install gunicorn>={OLDEST[0]},<{BEYOND[0]}, "
            f"or remove install() from the configuration file to run without zdd_web"
        )


def check_worker_class(cfg: Config) -> str:
    """Return the family; raise `SettingsError` for a worker class whose drain and gate this package does not know."""
    return family(cfg.worker_class, cfg.worker_class_str)


def family(worker_class: type, written: str = "") -> str:
    """Return the family of a worker class, its own or that of a class it is made from. Raises `SettingsError`."""
    remedy = f"use one of {', '.join(WORKER_CLASSES)}"
    for base in worker_class.__mro__:
        name = base.__module__, base.__qualname__
        if name in FAMILIES:
            return FAMILIES[name]
        if name in INSTEAD:
            remedy = INSTEAD[name]
            break
    raise SettingsError(f"worker_class = {written!r} is not supported: {remedy}")
