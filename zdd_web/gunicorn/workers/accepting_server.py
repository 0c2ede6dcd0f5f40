"""A server like asyncio's, for a listener or for `Queues` (listeners/reuseport/queues.py).

From `Queues` `loop.create_server()` cannot accept: uvloop accepts in C, from a real socket. And a server of asyncio's
own loops drops connections when it is closed: what it has accepted in the same turn of the loop is to be attached to it
a turn later, which fails silently, and the client is reset; shown in tests/os. Here nothing is attached.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from zdd_web.listeners.reuseport.queues import Queues

#: Connections in one turn of the loop: the other workers are to have their share of a burst. The loop comes back at
#: once for the rest.
AT_ONCE = 4

#: As in asyncio (selector_events.py): how long no more are accepted when there are no descriptors left, seconds.
RETRY_DELAY = 1.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class AcceptingServer:
    """Accepts connections and makes the protocol of each with `factory`; `options` are those of TLS."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: Callable[[], asyncio.BaseProtocol],
        source: Queues | socket.socket,
        **options: Any,
    ):
        """Accept from now on."""
        self.sockets = (source,)
        self._loop, self._factory, self._source = loop, factory, source
        self._options = {name: value for name, value in options.items() if name.startswith("ssl") and value is not None}
        self._reader = source.fileno()
        self._connecting: set[asyncio.Task[None]] = set()
        loop.add_reader(self._reader, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                client, _ = self._source.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                logging.getLogger("asyncio").error("no connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self._reader)
                self._loop.call_later(RETRY_DELAY, self._accept_again)
                return
            client.setblocking(False)
            task = self._loop.create_task(self._connect(client))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _accept_again(self) -> None:
        if self.is_serving():
            self._loop.add_reader(self._reader, self._accept)

    async def _connect(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, client, **self._options)
        except (OSError, ssl.SSLError, asyncio.TimeoutError):
            # A client that is gone, or that failed in its TLS handshake.
            client.close()

    def is_serving(self) -> bool:
        """See `asyncio.Server`."""
        return self._reader >= 0

    def close(self) -> None:
        """Accept no more, and close this process's copies."""
        if self._reader >= 0:
            self._loop.remove_reader(self._reader)
            self._reader = -1
            self._source.close()

    async def wait_closed(self) -> None:
        """See `asyncio.Server`. Does not wait for connections."""
