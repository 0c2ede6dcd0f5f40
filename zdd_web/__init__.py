"""zdd_web: deploys, restarts and stops of Django and Flask on gunicorn that lose nothing.

The public names are imported when they are first used: `import zdd_web` imports no framework and no gunicorn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zdd_web.checks import check
    from zdd_web.errors import (
        BoardError,
        GroupClosed,
        LifecycleError,
        ListenerError,
        ServiceNotFound,
        SettingsError,
        UpgradeError,
        ZddError,
    )
    from zdd_web.lifecycle import Phase
    from zdd_web.process import deadline, drain_event, draining, generation, phase, successor_serves
    from zdd_web.waitgroup import WaitGroup, background, on_drained, on_stop

__version__ = "0.1.0"

__all__ = [
    "BoardError",
    "GroupClosed",
    "LifecycleError",
    "ListenerError",
    "Phase",
    "ServiceNotFound",
    "SettingsError",
    "UpgradeError",
    "WaitGroup",
    "ZddError",
    "background",
    "check",
    "deadline",
    "drain_event",
    "draining",
    "generation",
    "on_drained",
    "on_stop",
    "phase",
    "successor_serves",
]

# No public name may be the name of a module of ours: its first import would replace the attribute by the module.
_HOME = {
    **dict.fromkeys(
        ("BoardError", "GroupClosed", "LifecycleError", "ListenerError", "ServiceNotFound", "SettingsError",
         "UpgradeError", "ZddError"),
        "zdd_web.errors",
    ),
    "Phase": "zdd_web.lifecycle",
    "check": "zdd_web.checks",
    **dict.fromkeys(
        ("deadline", "drain_event", "draining", "generation", "phase", "successor_serves"), "zdd_web.process"
    ),
    **dict.fromkeys(("WaitGroup", "background", "on_drained", "on_stop"), "zdd_web.waitgroup"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
