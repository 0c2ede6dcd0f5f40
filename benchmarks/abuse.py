"""Clients that abuse a port: some pipeline requests without end, many are silent.

`python -m benchmarks.abuse PORT` prints `ready` once all are connected, and goes on until its standard input is closed.
It is a process of its own, since in the prober's it would hold the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import click

#: Bytes that are written at once.
WRITE = 16_000


def connect(port: int) -> socket.socket:
    """Return a connection that does not block."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setblocking(False)
    return connection


class Pipeliner:
    """A connection on which requests are written as fast as the server takes them."""

    def __init__(self, port: int, path: str) -> None:
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        self._port, self._requests = port, request * (WRITE // len(request))
        self._begin()

    def _begin(self) -> None:
        self._connection, self._rest = connect(self._port), memoryview(self._requests)

    def fileno(self) -> int:
        """Return the descriptor, for `select`."""
        return self._connection.fileno()

    def turn(self) -> None:
        """Drop what was answered and write more; begin again where the server has closed."""
        try:
            with contextlib.suppress(BlockingIOError):
                while True:
                    if not self._connection.recv(1 << 20):
                        raise ConnectionResetError
            with contextlib.suppress(BlockingIOError):
                self._rest = self._rest[self._connection.send(self._rest) :] or memoryview(self._requests)
        except ConnectionError:
            self._connection.close()
            self._begin()


@contextlib.contextmanager
def abuse(port: int, pipelining: int, idle: int) -> Iterator[None]:
    """Run the clients beside the block."""
    command = [sys.executable, "-m", "benchmarks.abuse", str(port), f"--pipelining={pipelining}", f"--idle={idle}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise click.ClickException("the clients could not connect; see above")
        yield
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@click.command()
@click.argument("port", type=int)
@click.option("--path", default="/metrics", show_default=True)
@click.option("--pipelining", default=8, show_default=True, help="Connections that pipeline requests for PATH.")
@click.option("--idle", default=10_000, show_default=True, help="Connections that send nothing.")
def main(port: int, path: str, pipelining: int, idle: int) -> None:
    """Connect, and pipeline until the standard input ends."""
    needed, hard = pipelining + idle + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise click.ClickException(f"{needed} descriptors are needed, and the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    silent = [connect(port) for _ in range(idle)]
    clients = [Pipeliner(port, path) for _ in range(pipelining)]
    click.echo("ready")
    while True:
        # Anew, since a client may have another descriptor by now. Not select(), which ends at descriptor 1,024.
        poller = select.poll()
        poller.register(sys.stdin, select.POLLIN)
        for client in clients:
            poller.register(client, select.POLLIN | select.POLLOUT)
        found = {fd for fd, _ in poller.poll()}
        if sys.stdin.fileno() in found:
            break
        for client in clients:
            if client.fileno() in found:
                client.turn()
    for connection in silent:
        connection.close()


if __name__ == "__main__":
    main()
