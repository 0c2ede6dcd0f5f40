"""One client of the probe port: h11 reads and writes, and what it may cost is bounded."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from typing import Protocol, cast

import h11

from zdd_web.health import Reply
from zdd_web.probe_server.answers import Asked
from zdd_web.probe_server.turns import Rank

#: Bytes of a request's head; a probe's has a hundred.
HEAD_BYTES = 16_384
#: Seconds for a head, from the first byte or, on a new connection, from its beginning.
HEAD_SECONDS = 5.0
#: Seconds for which a connection is kept between two requests; AWS's and Google's balancers keep theirs for 60.
KEEP_SECONDS = 75.0
#: Seconds in which a client must take what was written, or notice that it was refused.
CLOSE_SECONDS = 2.0
#: What a client may leave unread before nothing more is answered.
UNREAD_BYTES = 65_536
#: What is read, and dropped, from a client that was refused: with bytes unread, the close would reset the answer.
DROPPED_BYTES = 4 << 20

_NO_HOST = "Missing mandatory Host"


class Owner(Protocol):
    """What a connection needs of its server."""

    #: Shared by all connections: what was received is handed to h11 before the loop turns again.
    buffer: memoryview

    def is_liveness(self, head: bytes | bytearray) -> bool:
        """Tell whether a request that begins like this asks for liveness."""

    def wait(self, connection: Connection, rank: Rank) -> None:
        """Have `take_turn()` called when it is the connection's turn."""

    def reply(self, asked: Asked) -> Reply:
        """Answer a request."""

    def keeps(self) -> bool:
        """Tell whether connections may be kept after a reply."""

    def made(self, connection: Connection) -> None:
        """Take note of a new connection."""

    def served(self, connection: Connection) -> None:
        """Take note of a reply."""

    def lost(self, connection: Connection) -> None:
        """Take note of a connection's end."""


class Connection(asyncio.BufferedProtocol):
    """One connection; see the module's text."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._http = self._new()
        #: What has come of the request that is not answered yet; see `_again_with_a_host`.
        self._head = bytearray()
        self._paused = False
        #: Waits for its turn; and does not read meanwhile, if more has come than the beginning.
        self._waits = False
        self._holds = False
        self._refused = False
        self._dropped = 0
        #: The client sends nothing more.
        self._eof = False
        #: Between two requests.
        self.idle = False
        #: Has been answered once.
        self.known = False
        self.made_at = time.monotonic()
        self.deadline = time.monotonic() + HEAD_SECONDS

    @staticmethod
    def _new() -> h11.Connection:
        return h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)

    # -- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=UNREAD_BYTES)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        self._owner.made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the loop is to put what it receives."""
        return self._owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Keep what was received until it is this connection's turn."""
        if self._refused:
            self._dropped += nbytes
            if self._dropped > DROPPED_BYTES:
                self._transport.abort()
            return
        if self.idle:
            self.idle = False
            self.deadline = time.monotonic() + HEAD_SECONDS
        data = bytes(self._owner.buffer[:nbytes])
        self._head += data
        self._http.receive_data(data)
        if self._waits:
            # No more than one buffer beside the first, however much the client sends.
            self._holds = True
            self._transport.pause_reading()
        else:
            self._wait(Rank.LIVENESS if self._owner.is_liveness(self._head) else Rank.OTHER)

    def eof_received(self) -> bool:
        """Close, after what was asked is answered and written: nothing more will be asked."""
        self._eof = True
        self.deadline = time.monotonic() + CLOSE_SECONDS
        return self._waits

    def pause_writing(self) -> None:
        """Answer nothing more, and read nothing more, until the client has taken what it has asked for."""
        self._paused = True
        self._transport.pause_reading()
        self.deadline = time.monotonic() + CLOSE_SECONDS

    def resume_writing(self) -> None:
        """Go on."""
        self._paused = False
        if not self.closing:
            if not self._holds:
                self._transport.resume_reading()
            self.deadline = time.monotonic() + HEAD_SECONDS
            if not self._refused:
                self._wait(Rank.PIPELINED)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._owner.lost(self)

    # -- what the server calls

    @property
    def closing(self) -> bool:
        """Whether it is on its way to its end."""
        return self._transport.is_closing()

    def close(self) -> None:
        """End it: what was written is still sent, if the client takes it in time. The second time, end it at once."""
        if self._paused or self._refused or self.closing:
            self.abort()
        else:
            self.deadline = time.monotonic() + CLOSE_SECONDS
            self._transport.close()

    def abort(self) -> None:
        """End it now."""
        self._transport.abort()

    # -- HTTP

    def _wait(self, rank: Rank) -> None:
        self._waits = True
        self._owner.wait(self, rank)

    def take_turn(self) -> None:
        """Answer one request, if one has come; the server's call."""
        self._waits = False
        self._work()
        if self._eof and not (self._waits or self._paused or self.closing):
            self._transport.close()

    def _work(self) -> None:
        while not self._paused and not self._refused and not self.closing:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                if str(error).startswith(_NO_HOST):
                    self._again_with_a_host()
                    continue
                self._refuse(error.error_status_hint)
                return
            if isinstance(event, h11.Request):
                self._answer(event)
            elif isinstance(event, h11.EndOfMessage):
                self._next()
                if self._head:
                    self._wait(Rank.PIPELINED)
                    return
            elif not isinstance(event, h11.Data):
                self._read_on()  # NEED_DATA, PAUSED or the end
                return

    def _read_on(self) -> None:
        if self._holds:
            self._holds = False
            self._transport.resume_reading()

    def _again_with_a_host(self) -> None:
        # h11 refuses a request of HTTP/1.1 without a Host header, as the standard has it. Probes written by hand have
        # none, gunicorn answers them, and nothing here depends on it.
        first, end, rest = bytes(self._head).partition(b"\n")
        self._http = self._new()
        self._http.receive_data(first + end + b"Host: -\r\n" + rest)

    def _answer(self, request: h11.Request) -> None:
        headers = dict(request.headers)
        asked = Asked.read(request.method, request.target, headers.get(b"accept", b""), self._peer)
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        self._write(self._owner.reply(asked), close=has_body or not self._owner.keeps())
        self._owner.served(self)
        if has_body:
            self._drop_the_rest()

    def _write(self, reply: Reply, *, close: bool) -> None:
        headers = [*reply.headers, ("Date", formatdate(usegmt=True))]
        if close:
            headers.append(("Connection", "close"))
        written = [
            self._http.send(h11.Response(status_code=reply.status, reason=reply.reason.encode(), headers=headers)),
            self._http.send(h11.Data(data=reply.body)),
            self._http.send(h11.EndOfMessage()),
        ]
        self._transport.write(b"".join(part or b"" for part in written))

    def _next(self) -> None:
        if self._http.our_state is not h11.DONE:
            self.close()  # the reply said so, or the client
            return
        self._http.start_next_cycle()
        self._head = bytearray(self._http.trailing_data[0])
        self.idle = not self._head
        if not self._paused:
            self.deadline = time.monotonic() + (KEEP_SECONDS if self.idle else HEAD_SECONDS)

    def _refuse(self, status: int) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = b"no request of HTTP/1.1\n"
            headers = (("Content-Type", "text/plain"), ("Content-Length", str(len(body))))
            self._write(Reply(status, "", headers, body), close=True)
        self._drop_the_rest()

    def _drop_the_rest(self) -> None:
        """Say that nothing follows, and read on for a moment: the client may still be sending."""
        self._refused = True
        self._head.clear()
        self._http = self._new()
        self._read_on()
        self.deadline = time.monotonic() + CLOSE_SECONDS
        if self._transport.can_write_eof():
            self._transport.write_eof()
