"""
Load on a server, and one classified `Sample` for every request.

A verdict is only as good as the classification, which rests on what the kernel tells a client:

- *When a close is noticed* separates a loss from none. A kept-alive connection is looked at in the very step
  that writes the request; found closed there, nothing was sent and any client may retry: STALE. Closed
  after the write, nobody can know whether the request was acted on: KEEPALIVE_RACE.
- *What had arrived* separates a cut reply (TRUNCATED) from none (RESET, CLOSED). Linux delivers queued bytes
  before it reports a reset, so a failed write does not end an exchange: an early answer is still read.
- *How* it was closed, RST or FIN, shows on raw sockets only: asyncio's streams end both alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h11

from zdd_web.cli.rehearse.replies import Body
from zdd_web.cli.rehearse.report import Kind, Outcome, Sample
from zdd_web.settings import REQUEST_HEADER

__all__ = ["Client", "Load", "LoadThread", "Outcome", "Sample", "Target"]

_LOCAL_ERRORS = (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CONNECT_OUTCOMES = {
    **dict.fromkeys(_LOCAL_ERRORS, Outcome.UNSENT),
    errno.ETIMEDOUT: Outcome.TIMEOUT,
    # The handshake may complete and be reset before we look; getpeername() calls that ENOTCONN.
    errno.ECONNRESET: Outcome.RESET,
    errno.ENOTCONN: Outcome.RESET,
}
# Seconds. A dead server refuses thousands of times a second, and one return is noticed soon enough.
_PAUSE_AFTER_LOSS = 0.05
_RECEIVE = 65536
_UNASKED = "a reply that was not asked for"
# A worker that names its generation names the request too, so that the reply to another one is found out.
# Clients number theirs apart from each other.
_NUMBERS_EACH = 10**9
_NUMBER_HEADER = REQUEST_HEADER.lower().encode()


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved address, the value of the Host header, and the timeout of one request in seconds."""

    family: int
    address: Any
    host: str
    timeout: float


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    http: h11.Connection
    opened: float


@dataclass(slots=True)
class _Exchange:
    """What is known of the request in hand, kept apart from the coroutine so that it survives a timeout."""

    fresh: bool
    began: bool = False  # a byte of reply has arrived
    connection_opened: float | None = None
    status: int | None = None
    generation: int | None = None
    detail: str = ""
    body: Body = field(default_factory=Body)
    number: str = ""  # of the request
    answers: str = ""  # the number that the reply names


class Client:
    """One HTTP client: at most one connection and one request in hand, one sample appended per request."""

    def __init__(self, target: Target, number: int, kind: Kind, samples: list[Sample]) -> None:
        self.number, self.kind, self.busy = number, kind, False
        self._target, self._samples = target, samples
        self._connection: _Connection | None = None
        self._numbers = itertools.count(number * _NUMBERS_EACH + 1)

    async def get(self, path: str) -> Outcome:
        """Send one request, on a fresh connection if the kept one turns out stale."""
        self.busy = True
        try:
            while (outcome := await self._get_once(path)) is Outcome.STALE:
                pass
        finally:
            self.busy = False
        return outcome

    def close(self) -> None:
        if self._connection is not None:
            self._connection.sock.close()
            self._connection = None

    async def _get_once(self, path: str) -> Outcome:
        exchange = _Exchange(fresh=self._connection is None, number=str(next(self._numbers)))
        started = time.monotonic()
        try:
            outcome = await asyncio.wait_for(self._attempt(path, exchange), self._target.timeout)
        except asyncio.TimeoutError:
            outcome = Outcome.TIMEOUT
            connected = exchange.connection_opened is not None
            replied = "reply incomplete" if exchange.began else "no reply"
            exchange.detail = replied if connected else "not connected"
        times = exchange.connection_opened, started, time.monotonic()
        if not outcome.answered:
            self.close()
        status, generation, body = exchange.status, exchange.generation, exchange.body
        self._samples.append(
            Sample(
                self.number, self.kind, path, *times, outcome, status, generation, exchange.detail,
                body.length, body.digest if exchange.began else "",
            )
        )  # fmt: skip
        return outcome

    async def _attempt(self, path: str, exchange: _Exchange) -> Outcome:
        connection = self._connection
        if connection is None:
            try:
                connection = self._connection = await _connect(self._target)
            except OSError as exc:
                exchange.detail = _name(exc)
                return _CONNECT_OUTCOMES.get(exc.errno or 0, Outcome.REFUSED)
        exchange.connection_opened = connection.opened
        if not exchange.fresh and (gone := _closed_by_peer(connection.sock)):
            exchange.detail = gone
            return Outcome.INVALID if gone == _UNASKED else Outcome.STALE
        written = connection.http.send(_request(path, self._target.host, self.kind, exchange.number))
        connection.http.send(h11.EndOfMessage())
        assert written is not None  # None is what h11 says to a ConnectionClosed
        # Nothing is awaited between the look above and the first send() inside sock_sendall().
        try:
            await asyncio.get_running_loop().sock_sendall(connection.sock, written)
        except OSError as exc:
            exchange.detail = _name(exc)
            if not exchange.fresh:
                return Outcome.STALE  # a request this small is taken whole or not at all
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
    sock = socket.socket(target.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, target.address)
        if sock.getsockname() == sock.getpeername():
            # Nobody listens, and the kernel picked that very port for our end: TCP connects it to itself.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
    except BaseException:
        sock.close()
        raise
    return _Connection(sock, h11.Connection(h11.CLIENT), time.monotonic())


async def _read_reply(connection: _Connection, exchange: _Exchange) -> Outcome:
    loop = asyncio.get_running_loop()
    http = connection.http
    while True:
        try:
            data = await loop.sock_recv(connection.sock, _RECEIVE)
        except OSError as exc:
            exchange.detail = _name(exc)
            data = None
        if not data and not exchange.began:
            return _no_reply(exchange)
        if data is None:
            return Outcome.TRUNCATED
        exchange.began = True
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


def _closed_by_peer(sock: socket.socket) -> str:
    """Say how an idle connection was ended by its peer; empty if it is usable."""
    try:
        data = sock.recv(12, socket.MSG_PEEK)
    except BlockingIOError:
        return ""
    except OSError as exc:
        return _name(exc)
    # A reply that comes a second time. Some servers say 408 to an idle connection before they close it.
    if data[:7] == b"HTTP/1." and data[9:12].isdigit() and data[9:12] != b"408":
        return _UNASKED
    return "unsolicited bytes" if data else "end of file"


def _request(path: str, host: str, kind: Kind, number: str = "0") -> h11.Request:
    headers = [("Host", host), ("User-Agent", "zdd-web-rehearse"), ("Accept", "*/*"), (REQUEST_HEADER, number)]
    if kind == "new":
        headers.append(("Connection", "close"))
    return h11.Request(method="GET", target=path, headers=headers)


def _name(exc: OSError) -> str:
    return errno.errorcode.get(exc.errno or 0, type(exc).__name__)


class Load:
    """
    Many clients that send GET requests until they are told to stop.

    Args:
        host, port: Where the server listens; of a name the first address is used.
        paths: Percent-encoded paths with their query; each client sends them round robin.
        clients: Number of clients.
        keepalive_share: Share of the clients that keep their connection, 0 to 1; half of these think.
        think: Seconds between two requests of a thinking client.
        timeout: Seconds until a request without a complete reply is given up, connecting included.
        pace: Seconds between two requests of any other client, which leaves the server some CPU.
    """

    def __init__(
        self,
        host: str,
        port: int,
        paths: Sequence[str],
        clients: int = 32,
        keepalive_share: float = 0.5,
        think: float = 0.05,
        timeout: float = 10.0,
        *,
        pace: float = 0.01,
    ) -> None:
        if clients < 1 or not 0 <= keepalive_share <= 1:
            raise ValueError(f"{clients=}, {keepalive_share=}: need at least 1, and between 0 and 1")
        if timeout <= 0 or think < 0 or pace < 0:
            raise ValueError(f"{timeout=}, {think=}, {pace=}: need a positive timeout, and no negative pause")
        self._host_header = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not paths:
            raise ValueError("paths is empty: name at least one, such as /")
        for path in paths:
            try:
                _request(path, self._host_header, "new")
            except (h11.LocalProtocolError, UnicodeEncodeError) as exc:
                raise ValueError(f"path {path!r} is no request target: percent-encode it") from exc
        self.samples: list[Sample] = []
        self._host, self._port = host, port
        self._paths = list(paths)
        self._think, self._timeout, self._pace = think, timeout, pace
        keeping = round(clients * keepalive_share)
        shares: list[tuple[Kind, int]] = [("thinking", keeping // 2), ("keepalive", keeping - keeping // 2)]
        shares.append(("new", clients - keeping))
        self._kinds = [kind for kind, count in shares for _ in range(count)]
        self._clients: list[Client] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Future[None] | None = None

    @property
    def in_flight(self) -> int:
        """Count the requests in hand; safe to read from another thread."""
        return sum(client.busy for client in self._clients)

    async def start(self) -> None:
        """Resolve the host and start the clients."""
        if self._stopping is not None:
            raise RuntimeError("this load was started before: make a new one")
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        target = Target(family, address, self._host_header, self._timeout)
        self._stopping = stopping = loop.create_future()
        self._clients = [Client(target, n, kind, self.samples) for n, kind in enumerate(self._kinds)]
        self._tasks = [loop.create_task(self._drive(client, stopping)) for client in self._clients]

    async def dismiss(self) -> None:
        """Have no client begin another request; what is in hand goes on."""
        if self._stopping is not None and not self._stopping.done():
            self._stopping.set_result(None)

    async def stop(self) -> None:
        """Let every client finish the request in hand, at most `timeout` seconds, and end."""
        await self.dismiss()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _drive(self, client: Client, stopping: asyncio.Future[None]) -> None:
        # Each client begins elsewhere, in the list of paths and in time, so that they do not march in step.
        turns = itertools.count(client.number)
        pause = self._think if client.kind == "thinking" else self._pace
        with contextlib.closing(client):
            await asyncio.wait((stopping,), timeout=pause * client.number / len(self._kinds))
            while not stopping.done():
                outcome = await client.get(self._paths[next(turns) % len(self._paths)])
                wait = pause if outcome.answered else max(pause, _PAUSE_AFTER_LOSS)
                await asyncio.wait((stopping,), timeout=wait)


class LoadThread:
    """Run a `Load` in a thread, for a controller that knows no asyncio; also a context manager."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LoadThread:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def samples(self) -> list[Sample]:
        """Copy what has been recorded so far."""
        return list(self._load.samples)

    @property
    def in_flight(self) -> int:
        """Count the requests in hand."""
        return self._load.in_flight

    def start(self) -> None:
        """Start the clients and return once they run."""
        self._loop = loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="zdd-web-load", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._load.start(), loop).result()
        except BaseException:
            self._end()
            raise

    def dismiss(self) -> None:
        """Have no client begin another request from now on, and return at once."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._load.dismiss(), self._loop).result()

    def stop(self) -> None:
        """Wait until every client has finished the request in hand; do nothing if that was done before."""
        if self._loop is not None:
            try:
                asyncio.run_coroutine_threadsafe(self._load.stop(), self._loop).result()
            finally:
                self._end()

    def _end(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
