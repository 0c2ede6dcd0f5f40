"""Connections on which a part of a request's head has arrived: their request is in hand, although no app knows it yet.

gunicorn's `asgi` worker and uvicorn call the app when the head is complete. Until then nothing but the parser tells
such a connection from an idle one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zdd_web.gunicorn.adapter.patches import replace
from zdd_web.system.connection_passing import waiting_bytes

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import AsgiProtocol, Method, UvicornProtocol

#: When a connection on which bytes wait is looked at again, seconds.
LOOK_AGAIN = 0.02


def note_heads(protocol: type[Any]) -> None:
    """Have connections of gunicorn's `ASGIProtocol` note whether a head was begun; its C parser cannot be asked."""
    # What is pipelined is fed again by 26 and later, and not received again:
    # test_asgi_protocol_parses_where_data_arrives.
    feed = "_feed_callback_parser" if hasattr(protocol, "_feed_callback_parser") else "data_received"
    feed_parser: Method = getattr(protocol, feed)
    headers_complete, message_complete = protocol._on_headers_complete, protocol._on_message_complete

    def feed_and_note(connection: AsgiProtocol, data: bytes) -> object:
        # Some clients send an empty line after a body.
        if not data.isspace():
            connection.head_begun = True
        return feed_parser(connection, data)

    def headers_are_complete(connection: AsgiProtocol) -> object:
        connection.head_begun = False
        return headers_complete(connection)

    def message_is_complete(connection: AsgiProtocol) -> object:
        # The last bytes of a body were noted too.
        connection.head_begun = False
        return message_complete(connection)

    protocol.head_begun = False
    replace(protocol, feed, feed_and_note)
    replace(protocol, "_on_headers_complete", headers_are_complete)
    replace(protocol, "_on_message_complete", message_is_complete)


def answer_late_requests(protocol: type[Any]) -> None:
    """Have connections of `ASGIProtocol` survive the end of their keepalive when a request has arrived before it.

    A loop that had no CPU for a moment meets both in one turn, the bytes first and then the timer, which only the
    request's task would cancel, a turn later (test_asgi_closes_an_idle_connection_by_a_timer).
    """
    timeout: Method = protocol._keepalive_timeout

    def timeout_if_idle(connection: AsgiProtocol) -> None:
        ready, transport = connection._request_ready, connection.transport
        # None in HTTP/2.
        if ready is None or transport is None or transport.is_closing():
            timeout(connection)
        elif not ready.is_set():
            if waiting_bytes(transport.get_extra_info("socket")):
                later = asyncio.get_running_loop().call_later
                connection._keepalive_handle = later(LOOK_AGAIN, connection._keepalive_timeout)
            else:
                timeout(connection)

    replace(protocol, "_keepalive_timeout", timeout_if_idle)


def gunicorn_reads_a_head(connection: AsgiProtocol) -> bool:
    """Tell whether a connection of `ASGIProtocol` has a part of a head, and keep it past gunicorn's `keepalive`.

    gunicorn's timer for an idle connection runs on while a head arrives:
    test_asgi_closes_an_idle_connection_by_a_timer.
    """
    ready = connection._request_ready
    # None in HTTP/2, and set from the end of a head to the end of its reply.
    if ready is None or ready.is_set() or connection.reader or not connection.head_begun:
        return False
    connection._cancel_keepalive_timer()
    return connection.transport is not None and not connection.transport.is_closing()


def uvicorn_reads_a_head(connection: UvicornProtocol) -> bool:
    """Tell whether a connection of either of uvicorn's HTTP protocols has a part of a head, and keep it as above."""
    if connection.transport is None or connection.transport.is_closing():
        return False
    h11 = getattr(connection, "conn", None)
    if h11 is not None:
        begun = h11.their_state.__name__ == "IDLE" and bool(h11.trailing_data[0].strip())
    else:
        # httptools: a scope is made at a request's first byte, and has a method when the head is complete.
        scope = getattr(connection, "scope", None)
        begun = scope is not None and "method" not in scope
    if begun:
        connection._unset_keepalive_if_required()
    return begun
