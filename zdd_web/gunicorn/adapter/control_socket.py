"""gunicorn's control socket (25.1 and later).

Two masters on one path do not go together: the newer takes it over, the older deletes it when it ends. So the active
master alone has it open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zdd_web.gunicorn.adapter.patches import replace, restore

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Arbiter


def suspend(arbiter: Arbiter) -> None:
    """Close it."""
    if getattr(arbiter, "_control_server", None) is not None:
        arbiter._stop_control_server()


def hold(arbiter: Arbiter) -> None:
    """Keep a new generation from opening it before it is active."""
    if hasattr(arbiter, "_start_control_server"):
        replace(arbiter, "_start_control_server", lambda: None)


def resume(arbiter: Arbiter) -> None:
    """Open it, now that this generation is active."""
    restore(arbiter, "_start_control_server")
    if hasattr(arbiter, "_start_control_server") and getattr(arbiter, "_control_server", None) is None:
        arbiter._start_control_server()
