"""gunicorn's own asgi worker: what is replaced in it and in its protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from zdd_web.gunicorn.adapter import request_heads
from zdd_web.gunicorn.adapter.patches import replace, write

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Method
    from zdd_web.gunicorn.adapter.worker import WorkerFacade

Coroutine = Callable[[], Awaitable[None]]


def adapt_protocol(leaving: Callable[[], bool]) -> bool:
    """Have connections note heads that have begun, and close after a reply if `leaving()`.

    Returns whether the protocol closes them: 25 and 26 have no place where it is decided, and a header of the reply
    has to have the client close.
    """
    from gunicorn.asgi.protocol import ASGIProtocol

    request_heads.note_heads(ASGIProtocol)
    request_heads.answer_late_requests(ASGIProtocol)
    if not hasattr(ASGIProtocol, "_will_close"):
        return False
    will_close: Method = ASGIProtocol._will_close
    replace(ASGIProtocol, "_will_close", lambda self, *arguments: leaving() or will_close(self, *arguments))
    return True


def replace_loop(
    worker: WorkerFacade,
    serve: Callable[[Coroutine], Coroutine],
    shutdown: Callable[[Coroutine], Coroutine],
) -> None:
    """Put `serve(gunicorn's)` and `shutdown(gunicorn's)` in the place of its loop and of its end."""
    worker.wrap("_serve", serve)
    worker.wrap("_shutdown", shutdown)


def forget_connections(worker: WorkerFacade) -> None:
    """Have gunicorn wait for no connection at the end: 25 does not count out those that it has closed itself."""
    write(worker.raw, "nr_conns", 0)
