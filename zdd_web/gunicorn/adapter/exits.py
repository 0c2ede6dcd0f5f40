"""How gunicorn's processes end: its exceptions and exit statuses."""

from __future__ import annotations

from gunicorn.arbiter import Arbiter
from gunicorn.errors import AppImportError, HaltServer

__all__ = ["APP_LOAD_ERROR", "WORKER_BOOT_ERROR", "AppImportError", "HaltServer"]

#: What a worker exits with when it could not boot, or not load the app.
WORKER_BOOT_ERROR: int = Arbiter.WORKER_BOOT_ERROR
APP_LOAD_ERROR: int = Arbiter.APP_LOAD_ERROR
