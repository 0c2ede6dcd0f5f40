"""gunicorn.workers.ggevent: what is replaced in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import ggevent

from zdd_web.gunicorn.adapter.patches import replace

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Method


def serve_by(server: type) -> None:
    """Have workers accept by this class, which is made from gevent's `StreamServer`."""
    replace(ggevent, "StreamServer", server)


def note_data(note: Callable[[bytes], None]) -> None:
    """Have `note(data)` called for whatever is read from a connection, in its greenlet."""
    read: Method = SocketUnreader.chunk

    def read_and_note(unreader: object, *arguments: object) -> bytes:
        data: bytes = read(unreader, *arguments)
        note(data)
        return data

    replace(SocketUnreader, "chunk", read_and_note)
