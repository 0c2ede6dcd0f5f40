"""The bytes of one connection, plain or under TLS, and how the kernel reports its end.

client.py decides by that: how a connection was closed, RST or FIN, and whether before or after a request was written.
asyncio's TLS shows neither, so TLS is driven here, over the same raw socket. A `close_notify` counts as the end of file
that follows it. An end of file without one is an end as well: gunicorn itself sends none, and whether a reply was cut
is seen by its length or its last chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from typing import Any

_RECEIVE = 65536
#: Enough to tell a reply from anything else, with its status.
_PEEK = 12


class NotTLS(Exception):
    """What arrived is not TLS, an alert, or a certificate that is not trusted; the text says which."""


class Wire:
    """A TCP connection as it is; its socket does not block."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def send(self, data: bytes) -> None:
        """Send everything. Nothing is awaited before the first send(2). Raises OSError, and `NotTLS`."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> bytes:
        """Return what comes next, b"" at the end of file. Raises OSError, and `NotTLS`."""
        return await asyncio.get_running_loop().sock_recv(self.sock, _RECEIVE)

    def arrived(self) -> bytes | None:
        """Return the first bytes that have arrived unasked; b"" at the end of file, None for nothing.

        Of an idle connection. Raises OSError, and `NotTLS`.
        """
        try:
            return self.sock.recv(_PEEK, socket.MSG_PEEK)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Close it."""
        self.sock.close()


class TLSWire(Wire):
    """A TCP connection under TLS; `handshake()` comes first."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        super().__init__(sock)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)

    async def handshake(self) -> None:
        """Agree on keys, and check the certificate as the context says. Raises OSError, and `NotTLS`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._feed()
            except ssl.SSLEOFError:
                raise BrokenPipeError(errno.EPIPE, "closed in the TLS handshake") from None
            except ssl.SSLError as error:
                await self._flush()  # the alert, for the server's log
                raise NotTLS(describe(error)) from None
            else:
                await self._flush()
                return

    async def send(self, data: bytes) -> None:
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise NotTLS(describe(error)) from None
        await self._flush()

    async def receive(self) -> bytes:
        while (data := self._read(_RECEIVE)) is None:
            await self._flush()  # what TLS itself has to answer, such as a change of keys
            await self._feed()
        return data

    def arrived(self) -> bytes | None:
        # Session tickets arrive unasked too: TLS takes them, and they are not a reply.
        while (data := self._read(_PEEK)) is None:
            try:
                self._take(self.sock.recv(_RECEIVE))
            except BlockingIOError:
                return None
        return data

    def close(self) -> None:
        with contextlib.suppress(ssl.SSLError, OSError, ValueError):
            self._tls.unwrap()  # writes a close_notify, and does not wait for that of the server
        with contextlib.suppress(OSError):
            self.sock.send(self._out.read())
        super().close()

    def _read(self, size: int) -> bytes | None:
        try:
            return self._tls.read(size)
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except ssl.SSLError as error:
            raise NotTLS(describe(error)) from None

    async def _feed(self) -> None:
        self._take(await asyncio.get_running_loop().sock_recv(self.sock, _RECEIVE))

    def _take(self, data: bytes) -> None:
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    async def _flush(self) -> None:
        if self._out.pending:
            await asyncio.get_running_loop().sock_sendall(self.sock, self._out.read())


async def connect(family: int, address: Any, context: ssl.SSLContext | None = None, host: str = "") -> Wire:
    """Connect to a resolved address; with a context under TLS, to a server whose certificate is for `host`.

    Raises OSError, and `NotTLS`.
    """
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        if sock.getsockname() == sock.getpeername():
            # No process listens, and the kernel picked that very port for our end: TCP connects it to itself.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
        if context is None:
            return Wire(sock)
        wire = TLSWire(sock, context, host)
        await wire.handshake()
        return wire
    except BaseException:
        sock.close()
        raise


def describe(error: ssl.SSLError) -> str:
    """Return why TLS failed, without OpenSSL's own source lines.

    >>> describe(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"))
    'TLS: wrong version number'
    """
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message:
        return f"TLS: certificate: {error.verify_message}"
    text = str(error.args[-1] if error.args else error)
    return f"TLS: {text.partition('] ')[2].rpartition(' (_ssl.c:')[0] or text}"
