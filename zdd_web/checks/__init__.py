"""Checks: what must be there before a worker may say that it is ready, and while it serves.

    @zdd_web.check("database", timeout=2)
    def database():
        connection.ensure_connection()

A new worker runs every check when its app is loaded and warm, again each second, until all critical ones pass; only
then it stands at the gate. So a release that cannot reach its database does not take over: the upgrade fails when
`UPGRADE_TIMEOUT` is over, and says which check has failed. From then on each runs at its interval, and what it finds
stands on the board, where probes read it.
"""

from zdd_web.checks.registry import Check, Registry, check, count, kinds, registered
from zdd_web.checks.runner import Runner, State, failing, pass_all

from zdd_web.checks.named import load  # isort: skip

__all__ = [
    "Check",
    "Registry",
    "Runner",
    "State",
    "check",
    "count",
    "failing",
    "kinds",
    "load",
    "pass_all",
    "registered",
]
