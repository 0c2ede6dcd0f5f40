"""Load on a server: many clients, in a closed or an open loop, in a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

import h11

from zdd_web.cli.rehearse.client import Client, Target, head
from zdd_web.cli.rehearse.generator_health import GeneratorHealth, Watch
from zdd_web.cli.rehearse.request_mix import Request, in_turn
from zdd_web.cli.rehearse.samples import Kind, Outcome, Sample

__all__ = ["Client", "Load", "LoadThread", "Outcome", "Sample", "Target"]

# Seconds. A dead server refuses thousands of times a second, and one return is noticed soon enough.
_PAUSE_AFTER_LOSS = 0.05


class Load:
    """
    Many clients that send requests until they are stopped.

    Args:
        host, port: Where the server listens; of a name the first address is used.
        paths: Percent-encoded paths with their query, or requests; each client sends them in turn, by weight.
        clients: Number of clients.
        keepalive_share: Share of the clients that keep their connection, 0 to 1; half of these think.
        think: Seconds between two requests of a thinking client.
        timeout: Seconds until a request without a complete reply is given up, connecting included.
        pace: Seconds between two requests of any other client, which leaves the server some CPU.
        rate: Requests a second that are sent whether or not earlier ones are answered (an open loop), as long as a
            client is free; without it each client sends its next request after the reply (a closed loop). A request
            counts from when it was due, so that a stall of the server shows as latency. `think` and `pace` do not
            apply.
        tls: What checks the server's certificate, which must be for `host`; None for a server without TLS.
        sink: Takes each sample, instead of `samples`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        paths: Sequence[str | Request],
        clients: int = 32,
        keepalive_share: float = 0.5,
        think: float = 0.05,
        timeout: float = 10.0,
        *,
        pace: float = 0.01,
        rate: float | None = None,
        tls: ssl.SSLContext | None = None,
        sink: Callable[[Sample], object] | None = None,
    ) -> None:
        if clients < 1 or not 0 <= keepalive_share <= 1:
            raise ValueError(f"{clients=}, {keepalive_share=}: need at least 1, and between 0 and 1")
        if timeout <= 0 or think < 0 or pace < 0:
            raise ValueError(f"{timeout=}, {think=}, {pace=}: need a positive timeout, and no negative pause")
        if rate is not None and rate <= 0:
            raise ValueError(f"{rate=}: need a positive number of requests a second")
        self._host_header = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not paths:
            raise ValueError("paths is empty: name at least one, such as /")
        requests = [Request(each) if isinstance(each, str) else each for each in paths]
        for request in requests:
            try:
                head(request, self._host_header, "new")
            except (h11.LocalProtocolError, UnicodeEncodeError) as exc:
                raise ValueError(f"path {request.path!r} is not a request target: percent-encode it") from exc
        self.samples: list[Sample] = []
        self._record = sink or self.samples.append
        self._host, self._port, self._tls = host, port, tls
        self._requests = in_turn(requests)
        self._rate = rate
        self._sent = self._waited = self._in_hand = 0
        self._watch = Watch()
        self._began = self._dismissed = 0.0
        self._think, self._timeout, self._pace = think, timeout, pace
        keeping = round(clients * keepalive_share)
        shares: list[tuple[Kind, int]] = [("thinking", keeping // 2), ("keepalive", keeping - keeping // 2)]
        shares.append(("new", clients - keeping))
        self._kinds = [kind for kind, count in shares for _ in range(count)]
        self._clients: list[Client] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._looking: asyncio.Task[None] | None = None
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
        target = Target(family, address, self._host_header, self._timeout, self._tls, self._host)
        self._stopping = stopping = loop.create_future()
        self._clients = [Client(target, n, kind, self._record) for n, kind in enumerate(self._kinds)]
        self._began = time.monotonic()
        self._looking = loop.create_task(self._watch.run())
        if self._rate is None:
            self._tasks = [loop.create_task(self._drive(client, stopping)) for client in self._clients]
        else:
            queue: asyncio.Queue[tuple[Request, float]] = asyncio.Queue()
            self._tasks = [loop.create_task(self._serve(client, queue, stopping)) for client in self._mixed()]
            self._tasks.append(loop.create_task(self._keep_rate(self._rate, queue, stopping)))

    async def dismiss(self) -> None:
        """Have no client begin another request; what is in hand goes on."""
        if self._stopping is not None and not self._stopping.done():
            self._dismissed = time.monotonic()
            self._stopping.set_result(None)

    async def stop(self, *, at_once: bool = False) -> None:
        """Let every client finish the request in hand, at most `timeout` seconds, and end; or drop it uncounted."""
        await self.dismiss()
        if self._looking is not None:
            self._looking.cancel()
        if at_once:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            return
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
                outcome = await client.send(self._requests[next(turns) % len(self._requests)])
                self._sent += 1
                wait = pause if outcome.answered else max(pause, _PAUSE_AFTER_LOSS)
                await asyncio.wait((stopping,), timeout=wait)

    def _mixed(self) -> list[Client]:
        # Those that wait for the next request are served in this order: every kind gets its share.
        return sorted(self._clients, key=lambda client: (client.number * 7919) % (len(self._clients) or 1))

    async def _keep_rate(
        self, rate: float, queue: asyncio.Queue[tuple[Request, float]], stopping: asyncio.Future[None]
    ) -> None:
        """Put each request into the queue when it is due; a late turn of the loop puts all that are due by then."""
        begin = time.monotonic()
        for number in itertools.count():
            due = begin + number / rate
            if (wait := due - time.monotonic()) > 0:
                await asyncio.wait((stopping,), timeout=wait)
            if stopping.done():
                return
            self._waited += queue.qsize() >= len(self._clients) - self._in_hand
            queue.put_nowait((self._requests[number % len(self._requests)], due))

    async def _serve(
        self, client: Client, queue: asyncio.Queue[tuple[Request, float]], stopping: asyncio.Future[None]
    ) -> None:
        with contextlib.closing(client):
            while not stopping.done():
                getting = asyncio.ensure_future(queue.get())
                try:
                    await asyncio.wait((stopping, getting), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    getting.cancel()
                if not stopping.done():
                    request, due = getting.result()
                    self._sent += 1
                    self._in_hand += 1
                    try:
                        await client.send(request, due)
                    finally:
                        self._in_hand -= 1

    def health(self) -> GeneratorHealth:
        """Tell how the generator itself fared, after the load was stopped."""
        seconds = (self._dismissed or time.monotonic()) - self._began
        sent = None if self._rate is None else self._sent / max(seconds, 1e-9)
        return self._watch.health(self._rate, sent, self._waited, len(self._clients))


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

    def health(self) -> GeneratorHealth:
        """Tell how the generator itself fared, after `stop()`."""
        return self._load.health()

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

    def stop(self, *, at_once: bool = False) -> None:
        """Wait until every client has finished the request in hand; do nothing if that was done before.

        At once: what is in hand is dropped and not counted.
        """
        if self._loop is not None:
            try:
                asyncio.run_coroutine_threadsafe(self._load.stop(at_once=at_once), self._loop).result()
            finally:
                self._end()

    def _end(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
