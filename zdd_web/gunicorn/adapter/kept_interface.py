"""What the kept connections of a worker class may ask of the worker that keeps them (workers/kept_connections.py)."""

from __future__ import annotations

from typing import Protocol

from gunicorn import http

from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.versions import check_worker_class


def can_travel(cfg: Config, *, after_proxy: bool = False) -> bool:
    """Tell whether connections of a worker with this configuration can be served by another process.

    The state of TLS is in a worker's memory; uWSGI's is a protocol of its own. A PROXY line is read once, and its
    content is lost to another process, unless the class can serve a connection without it (`after_proxy`).
    """
    plain = not cfg.is_ssl and getattr(cfg, "protocol", "http") == "http"
    return bool(plain and cfg.keepalive and (after_proxy or cfg.proxy_protocol in ("off", False)))


def are_taken(cfg: Config) -> bool:
    """Tell whether workers with this configuration take connections that others hand over.

    A class that keeps none, such as sync, takes none.
    """
    family = check_worker_class(cfg)
    if family == "blocking":
        # Of gthread 24 and later alone; where so few are allowed all of them are closed after their reply.
        keeps = hasattr(cfg.worker_class, "wait_for_and_dispatch_events") and cfg.worker_connections > cfg.threads
        return keeps and can_travel(cfg, after_proxy=True)
    return can_travel(cfg) and (family != "gevent" or hasattr(http, "get_parser"))


class Keeper(Protocol):
    """`KeptConnections`, as a store of connections sees it."""

    @property
    def take_fd(self) -> int:
        """The descriptor to watch."""

    def turn(self) -> None:
        """Look whether the exchange is to be watched, and close what is idle in a lame duck; often, or once a turn."""

    @property
    def limits_wait(self) -> bool:
        """Whether `pause()` may limit the wait: looked at in each turn of a loop, and cheaper."""

    def pause(self) -> float | None:
        """Return for how long the loop may wait at most, seconds; None for as long as it likes."""

    def hands_over(self) -> bool:
        """Tell whether another worker is to serve the connections of this one, which leaves."""

    def take_some(self) -> int:
        """Take connections from the exchange; return how many."""

    def count_closed(self) -> None:
        """Count a connection that is closed idle."""
