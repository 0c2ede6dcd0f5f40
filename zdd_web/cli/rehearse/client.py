"""
One HTTP client, and one classified `Sample` for every request.

A verdict is only as good as the classification, which rests on what the kernel reports:

- *When a close is noticed* separates a loss from none. A kept-alive connection is looked at in the very step
  that writes the request; found closed there, nothing was sent and any client may retry: STALE. Closed
  after the write, it cannot be known whether the request was acted on: KEEPALIVE_RACE.
- *What had arrived* separates a cut reply (TRUNCATED) from none (RESET, CLOSED). Linux delivers queued bytes
  before it reports a reset, so a failed write does not end an exchange: an early answer is still read.
- *How* it was closed, RST or FIN, shows on raw sockets only: asyncio's streams end both alike
  (see client_connection.py).
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11

from zdd_web.cli.rehearse.changed_replies import Body
from zdd_web.cli.rehearse.client_connection import NotTLS, Wire, connect
from zdd_web.cli.rehearse.request_mix import Request
from zdd_web.cli.rehearse.samples import Kind, Outcome, Sample
from zdd_web.settings import REQUEST_HEADER

_LOCAL_ERRORS = (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CONNECT_OUTCOMES = {
    **dict.fromkeys(_LOCAL_ERRORS, Outcome.UNSENT),
    errno.ETIMEDOUT: Outcome.TIMEOUT,
    # The handshake may complete and be reset before we look; getpeername() calls that ENOTCONN.
    errno.ECONNRESET: Outcome.RESET,
    errno.ENOTCONN: Outcome.RESET,
    # In a TLS handshake: connect(2) itself never fails so.
    errno.EPIPE: Outcome.CLOSED,
}
_UNASKED = "a reply that was not asked for"
# A worker that names its generation names the request too, so that the reply to another one is found out.
# Clients number theirs apart from each other.
_NUMBERS_EACH = 10**9
_NUMBER_HEADER = REQUEST_HEADER.lower().encode()


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved address, the value of the Host header, and the timeout of one request in seconds.

    With `tls`, the server's certificate is checked as that says, and must be for `name`.
    """

    family: int
    address: Any
    host: str
    timeout: float
    tls: ssl.SSLContext | None = None
    name: str = ""


@dataclass(slots=True)
class _Connection:
    wire: Wire
    http: h11.Connection
    opened: float


@dataclass(slots=True)
class _Exchange:
    """What is known of the request in hand, kept apart from the coroutine so that it survives a timeout."""

    fresh: bool
    began: bool = False  # a byte of reply has arrived
    received: int = 0  # bytes of it
    connection_opened: float | None = None
    status: int | None = None
    generation: int | None = None
    detail: str = ""
    body: Body = field(default_factory=Body)
    number: str = ""  # of the request
    answers: str = ""  # the number that the reply names


class Client:
    """One HTTP client: at most one connection and one request in hand, one sample appended per request."""

    def __init__(self, target: Target, number: int, kind: Kind, record: Callable[[Sample], object]) -> None:
        self.number, self.kind, self.busy = number, kind, False
        self._target, self._record = target, record
        self._connection: _Connection | None = None
        self._numbers = itertools.count(number * _NUMBERS_EACH + 1)

    async def get(self, path: str) -> Outcome:
        """Send one GET request, see `send()`."""
        return await self.send(Request(path))

    async def send(self, request: Request, due: float | None = None) -> Outcome:
        """Send one request, on a fresh connection if the kept one turns out stale.

        It counts from `due` on, where it was due before this client was free.
        """
        self.busy = True
        try:
            while (outcome := await self._send_once(request, due)) is Outcome.STALE:
                pass
        finally:
            self.busy = False
        return outcome

    def close(self) -> None:
        if self._connection is not None:
            self._connection.wire.close()
            self._connection = None

    async def _send_once(self, request: Request, due: float | None) -> Outcome:
        exchange = _Exchange(fresh=self._connection is None, number=str(next(self._numbers)))
        started = time.monotonic() if due is None else due
        try:
            outcome = await self._within_time(request, exchange)
        except asyncio.TimeoutError:
            outcome = Outcome.TIMEOUT
            connected = exchange.connection_opened is not None
            replied = "reply incomplete" if exchange.began else "no reply"
            exchange.detail = replied if connected else "not connected"
        times = exchange.connection_opened, started, time.monotonic()
        if not outcome.answered:
            self.close()
        status, generation, body = exchange.status, exchange.generation, exchange.body
        self._record(
            Sample(
                self.number, self.kind, request.path, *times, outcome, status, generation, exchange.detail,
                body.length, body.digest if exchange.began else "", request.method,
            )
        )  # fmt: skip
        return outcome

    async def _within_time(self, request: Request, exchange: _Exchange) -> Outcome:
        timeout = self._target.timeout
        if not request.stream:
            return await asyncio.wait_for(self._attempt(request, exchange), timeout)
        # A stream may take as long as it likes: only its silence is bounded.
        attempt = asyncio.ensure_future(self._attempt(request, exchange))
        try:
            while True:
                received = exchange.received
                done, _ = await asyncio.wait((attempt,), timeout=timeout)
                if done:
                    return attempt.result()
                if exchange.received == received:
                    raise asyncio.TimeoutError
        finally:
            attempt.cancel()

    async def _attempt(self, request: Request, exchange: _Exchange) -> Outcome:
        connection = self._connection
        if connection is None:
            try:
                connection = self._connection = await _connect(self._target)
            except OSError as exc:
                exchange.detail = _name(exc)
                return _CONNECT_OUTCOMES.get(exc.errno or 0, Outcome.REFUSED)
            except NotTLS as exc:
                exchange.detail = str(exc)
                return Outcome.INVALID
        exchange.connection_opened = connection.opened
        if not exchange.fresh and (gone := _closed_by_peer(connection.wire)):
            exchange.detail = gone
            return Outcome.INVALID if gone == _UNASKED else Outcome.STALE
        written = connection.http.send(head(request, self._target.host, self.kind, exchange.number))
        assert written is not None  # h11 returns None for a ConnectionClosed alone
        if request.body:
            written += connection.http.send(h11.Data(data=request.body)) or b""
        connection.http.send(h11.EndOfMessage())
        # Nothing is awaited between the look above and the first send(2).
        try:
            await connection.wire.send(written)
        except OSError as exc:
            exchange.detail = _name(exc)
            if not exchange.fresh and not request.body:
                return Outcome.STALE  # a request this small is taken whole or not at all
        except NotTLS as exc:
            exchange.detail = str(exc)
            return Outcome.INVALID
        outcome = await _read_reply(connection, exchange)
        if outcome.answered:
            exchange.detail = ""
            http = connection.http
            if self.kind != "new" and http.our_state is h11.DONE and http.their_state is h11.DONE:
                http.start_next_cycle()
            else:
                self.close()
        return outcome


async def _connect(target: Target) -> _Connection:
    wire = await connect(target.family, target.address, target.tls, target.name)
    return _Connection(wire, h11.Connection(h11.CLIENT), time.monotonic())


async def _read_reply(connection: _Connection, exchange: _Exchange) -> Outcome:
    http = connection.http
    while True:
        try:
            data = await connection.wire.receive()
        except OSError as exc:
            exchange.detail = _name(exc)
            data = None
        except NotTLS as exc:
            exchange.detail = str(exc)
            return Outcome.INVALID
        if not data and not exchange.began:
            return _no_reply(exchange)
        if data is None:
            return Outcome.TRUNCATED
        exchange.began = True
        exchange.received += len(data)
        try:
            complete = _feed(http, data, exchange)
        except h11.RemoteProtocolError as exc:
            # h11 also complains about a reply that ends too early.
            exchange.detail = str(exc) if data else "end of file"
            return Outcome.INVALID if data else Outcome.TRUNCATED
        if complete:
            if http.trailing_data[0]:
                exchange.detail = "bytes after the reply"
                return Outcome.INVALID
            if exchange.answers not in ("", exchange.number):
                exchange.detail = f"the reply to request {exchange.answers}, not to {exchange.number}"
                return Outcome.INVALID
            failed = exchange.status is not None and exchange.status >= 500
            return Outcome.SERVER_ERROR if failed else Outcome.OK


def _feed(http: h11.Connection, data: bytes, exchange: _Exchange) -> bool:
    """Hand bytes to h11 and tell whether the reply is complete; no bytes mean end of file."""
    http.receive_data(data)
    while (event := http.next_event()) is not h11.NEED_DATA:
        if isinstance(event, h11.Response):
            exchange.status = event.status_code
            marks = [value for name, value in event.headers if name == b"x-zdd-generation"]
            exchange.generation = int(marks[0]) if marks and marks[0].isdigit() else None
            numbers = [value for name, value in event.headers if name == _NUMBER_HEADER]
            exchange.answers = numbers[0].decode("latin-1") if numbers else ""
        elif isinstance(event, h11.Data):
            exchange.body.add(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return True
    return False


def _no_reply(exchange: _Exchange) -> Outcome:
    """Classify a connection that ended without a byte of reply."""
    if not exchange.fresh:
        exchange.detail = exchange.detail or "end of file"
        return Outcome.KEEPALIVE_RACE
    # A write fails with EPIPE after the peer's FIN, with ECONNRESET after an RST that nothing preceded.
    known = {"": Outcome.CLOSED, "EPIPE": Outcome.CLOSED, "ETIMEDOUT": Outcome.TIMEOUT}
    return known.get(exchange.detail, Outcome.RESET)


def _closed_by_peer(wire: Wire) -> str:
    """Say how an idle connection was ended by its peer; empty if it is usable."""
    try:
        data = wire.arrived()
    except OSError as exc:
        return _name(exc)
    except NotTLS as exc:
        return str(exc)
    if data is None:
        return ""
    # A reply that comes a second time. Some servers send 408 on an idle connection before they close it.
    if data[:7] == b"HTTP/1." and data[9:12].isdigit() and data[9:12] != b"408":
        return _UNASKED
    return "unsolicited bytes" if data else "end of file"


def head(request: Request, host: str, kind: Kind, number: str = "0") -> h11.Request:
    """Return what comes before the body. Raises `h11.LocalProtocolError` and UnicodeEncodeError for a bad path."""
    headers = [("Host", host), ("User-Agent", "zdd-web-rehearse"), ("Accept", "*/*"), (REQUEST_HEADER, number)]
    if request.method != "GET":
        headers += [("Content-Type", "application/octet-stream"), ("Content-Length", str(len(request.body)))]
    if kind == "new":
        headers.append(("Connection", "close"))
    return h11.Request(method=request.method, target=request.path, headers=headers)


def _name(exc: OSError) -> str:
    return errno.errorcode.get(exc.errno or 0, type(exc).__name__)
