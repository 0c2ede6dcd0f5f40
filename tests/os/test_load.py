"""Every way a server can fail a request, acted out on a real socket, and the outcome a client records."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from zdd_web.cli.rehearse.load import Client, Load, LoadThread, Outcome, Sample, Target
from zdd_web.cli.rehearse.report import Kind

PATIENCE = 20.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Zdd-Generation: 7\r\n\r\nok"

Script = Callable[[socket.socket, int], None]


class Server:
    """Run `script(connection, number)` in a thread for each connection accepted, numbered from 0."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.failures: list[BaseException] = []
        self.threads: list[threading.Thread] = []
        self.connections: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        self.acceptor = threading.Thread(target=self.accept)

    def __enter__(self) -> Server:
        self.acceptor.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.acceptor.join(PATIENCE)
        self.listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)
        if exc_info[0] is None and self.failures:
            raise self.failures[0]

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            thread = threading.Thread(target=self.serve, args=(connection, len(self.threads)))
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket, number: int) -> None:
        with connection:
            try:
                self.script(connection, number)
            except OSError:
                pass
            except BaseException as exc:
                self.failures.append(exc)


def read_request(connection: socket.socket) -> bytes:
    """Read one request; empty at end of file."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        chunk = connection.recv(4096)
        if not chunk:
            return b""
        data += chunk
    return data


def keep_answering(reply: bytes = OK) -> Script:
    def script(connection: socket.socket, number: int) -> None:
        while read_request(connection):
            connection.sendall(reply)

    return script


def answer_once(reply: bytes) -> Script:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(reply)

    return script


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def get(port: int, times: int = 1, kind: Kind = "keepalive", timeout: float = PATIENCE) -> list[Sample]:
    """Let one client send some requests, one after the other."""

    async def run() -> list[Sample]:
        samples: list[Sample] = []
        target = Target(socket.AF_INET, ("127.0.0.1", port), f"127.0.0.1:{port}", timeout)
        with contextlib.closing(Client(target, 0, kind, samples.append)) as client:
            for _ in range(times):
                await client.get("/")
        return samples

    return asyncio.run(run())


def outcomes(samples: list[Sample]) -> list[Outcome]:
    return [sample.outcome for sample in samples]


def test_keepalive_client_reuses_its_connection() -> None:
    with Server(keep_answering()) as server:
        samples = get(server.port, times=3)
    assert outcomes(samples) == [Outcome.OK] * 3
    assert len(server.connections) == 1
    assert len({sample.connection_opened for sample in samples}) == 1
    assert {(sample.status, sample.generation, sample.detail) for sample in samples} == {(200, 7, "")}
    assert all(sample.started <= sample.ended for sample in samples)


def test_new_client_opens_a_connection_per_request_and_says_so() -> None:
    requests = []

    def script(connection: socket.socket, number: int) -> None:
        requests.append(read_request(connection).lower())
        connection.sendall(OK)

    with Server(script) as server:
        samples = get(server.port, times=3, kind="new")
    assert outcomes(samples) == [Outcome.OK] * 3
    assert len(server.connections) == 3
    assert all(b"\r\nconnection: close\r\n" in request for request in requests)
    assert all(b"\r\nuser-agent: zdd-web-rehearse\r\n" in request for request in requests)
    assert all(f"\r\nhost: 127.0.0.1:{server.port}\r\n".encode() in request for request in requests)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nended by the end of file",
    ],
    ids=["connection-close", "http-1.0", "until-eof"],
)
def test_announced_close_is_not_stale(reply: bytes) -> None:
    with Server(answer_once(reply)) as server:
        samples = get(server.port, times=2)
    assert outcomes(samples) == [Outcome.OK] * 2
    assert len(server.connections) == 2


@pytest.mark.parametrize(
    ("reply", "expected", "status"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Outcome.OK, 404),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK, Outcome.OK, 200),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", Outcome.SERVER_ERROR, 500),
        (b"HTTP/1.1 503 Later\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Outcome.SERVER_ERROR, 503),
        (b"HTTP/1.1 503 Later\r\nContent-Length: 9\r\n\r\nLa", Outcome.TRUNCATED, 503),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", Outcome.TRUNCATED, 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n", Outcome.TRUNCATED, 200),
        (b"HTTP/1.1 200 OK\r\nContent-Le", Outcome.TRUNCATED, None),
        (b"H", Outcome.TRUNCATED, None),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", Outcome.TRUNCATED, None),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", Outcome.INVALID, None),
        (OK + b"surplus", Outcome.INVALID, 200),
        (b"", Outcome.CLOSED, None),
    ],
)
def test_reply_then_end_of_file(reply: bytes, expected: Outcome, status: int | None) -> None:
    with Server(answer_once(reply)) as server:
        [sample] = get(server.port)
    assert (expected, status) == (sample.outcome, sample.status)


def test_reset_after_accept() -> None:
    with Server(lambda connection, number: reset(connection)) as server:
        [sample] = get(server.port)
    assert sample.outcome is Outcome.RESET


def test_reset_after_the_request_was_read() -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        reset(connection)

    with Server(script) as server:
        [sample] = get(server.port)
    assert (sample.outcome, sample.detail) == (Outcome.RESET, "ECONNRESET")


def test_reset_amid_the_reply_is_a_truncation() -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK[:-1])
        reset(connection)

    with Server(script) as server:
        [sample] = get(server.port)
    assert (sample.outcome, sample.detail, sample.status) == (Outcome.TRUNCATED, "ECONNRESET", 200)


def test_answer_given_before_the_request_was_read_counts() -> None:
    def script(connection: socket.socket, number: int) -> None:
        connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        # Closing with the request unread makes the kernel reset the connection behind the answer.
        connection.recv(1, socket.MSG_PEEK)

    with Server(script) as server:
        [sample] = get(server.port)
    assert (sample.outcome, sample.status) == (Outcome.SERVER_ERROR, 503)


def test_refused_port() -> None:
    with socket.socket() as bound:  # bound but not listening: refuses, and nobody else can take the port
        bound.bind(("127.0.0.1", 0))
        samples = get(bound.getsockname()[1], times=2)
    assert outcomes(samples) == [Outcome.REFUSED] * 2
    assert {(sample.detail, sample.connection_opened) for sample in samples} == {("ECONNREFUSED", None)}


@pytest.mark.parametrize(
    ("reply", "detail"), [(b"", "no reply"), (OK[:-1], "reply incomplete")], ids=["silent", "unfinished"]
)
def test_timeout(reply: bytes, detail: str) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(reply)
        connection.recv(1)

    with Server(script) as server:
        [sample] = get(server.port, timeout=0.3)
    assert (Outcome.TIMEOUT, detail) == (sample.outcome, sample.detail)


def test_connection_closed_while_idle_is_stale_and_the_request_is_repeated() -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        # Corked, the reply and the end of file travel in one segment: no client sees one without the other.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        connection.sendall(OK)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)

    with Server(script) as server:
        samples = get(server.port, times=2)
    assert outcomes(samples) == [Outcome.OK, Outcome.STALE, Outcome.OK]
    assert samples[1].detail == "end of file"
    assert samples[1].connection_opened == samples[0].connection_opened != samples[2].connection_opened
    assert not samples[1].outcome.lost


@pytest.mark.parametrize(
    ("bytes_first", "detail"), [(b"", "ECONNRESET"), (b"HTTP/1.1 408 Timeout\r\n\r\n", "unsolicited bytes")]
)
def test_connection_reset_or_talked_on_while_idle_is_stale(bytes_first: bytes, detail: str) -> None:
    answered = threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK)
        if number == 0:
            assert answered.wait(PATIENCE)
            connection.sendall(bytes_first)
            reset(connection)

    async def run(port: int) -> list[Sample]:
        samples: list[Sample] = []
        target = Target(socket.AF_INET, ("127.0.0.1", port), "host", PATIENCE)
        with contextlib.closing(Client(target, 0, "thinking", samples.append)) as client:
            await client.get("/")
            answered.set()
            assert client._connection is not None
            readable, _, _ = select.select([client._connection.wire.sock], [], [], PATIENCE)
            assert readable
            await client.get("/")
        return samples

    with Server(script) as server:
        samples = asyncio.run(run(server.port))
    assert outcomes(samples) == [Outcome.OK, Outcome.STALE, Outcome.OK]
    assert samples[1].detail == detail


def number_of(request: bytes) -> int:
    [line] = [line for line in request.split(b"\r\n") if line.startswith(b"X-Zdd-Request: ")]
    return int(line.partition(b": ")[2])


def numbered(number: int) -> bytes:
    return OK.replace(b"X-Zdd-Generation", b"X-Zdd-Request: %d\r\nX-Zdd-Generation" % number)


def test_the_reply_to_another_request_is_invalid() -> None:
    def script(connection: socket.socket, number: int) -> None:
        late = 0
        while request := read_request(connection):
            # Each reply after the first comes one request too late.
            connection.sendall(numbered(late or number_of(request)))
            late = number_of(request)

    with Server(script) as server:
        samples = get(server.port, times=3)
    assert outcomes(samples) == [Outcome.OK, Outcome.INVALID, Outcome.OK]
    assert samples[1].detail.startswith("the reply to request ")
    assert samples[1].outcome.lost


def test_numbers_of_requests_differ_and_their_own_replies_are_fine() -> None:
    numbers: list[int] = []

    def script(connection: socket.socket, number: int) -> None:
        while request := read_request(connection):
            numbers.append(number_of(request))
            connection.sendall(numbered(numbers[-1]))

    with Server(script) as server:
        samples = [*get(server.port, times=3), *get(server.port, times=2, kind="new")]
    assert set(outcomes(samples)) == {Outcome.OK}
    assert len(set(numbers[:3])) == 3 and len(set(numbers[3:])) == 2


def test_a_reply_that_comes_a_second_time_is_invalid() -> None:
    answered = threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK)
        assert answered.wait(PATIENCE)
        connection.sendall(OK)
        read_request(connection)

    async def run(port: int) -> list[Sample]:
        samples: list[Sample] = []
        target = Target(socket.AF_INET, ("127.0.0.1", port), "host", PATIENCE)
        with contextlib.closing(Client(target, 0, "thinking", samples.append)) as client:
            await client.get("/")
            answered.set()
            assert client._connection is not None
            readable, _, _ = select.select([client._connection.wire.sock], [], [], PATIENCE)
            assert readable
            await client.get("/")
        return samples

    with Server(script) as server:
        samples = asyncio.run(run(server.port))
    assert outcomes(samples) == [Outcome.OK, Outcome.INVALID]
    assert samples[1].detail == "a reply that was not asked for"


def test_a_body_is_kept_as_length_and_digest_without_digits() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\no1\r\n2\r\n2k\r\n0\r\n\r\n"
    with Server(keep_answering(chunked)) as first, Server(keep_answering()) as second:
        (one,), (other,) = get(first.port), get(second.port)
    assert (one.length, one.digest) == (other.length, other.digest)
    assert one.length == 2 and one.digest


@pytest.mark.parametrize(
    ("end", "detail"), [(socket.socket.close, "end of file"), (reset, "ECONNRESET")], ids=["fin", "rst"]
)
def test_close_after_a_request_on_a_reused_connection_is_a_race(
    end: Callable[[socket.socket], None], detail: str
) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK)
        assert read_request(connection)
        end(connection)

    with Server(script) as server:
        samples = get(server.port, times=2)
    assert outcomes(samples) == [Outcome.OK, Outcome.KEEPALIVE_RACE]
    assert samples[1].detail == detail
    assert samples[1].outcome.lost


@pytest.mark.parametrize("detail", ["5", "x", "-1", ""])
def test_generation_is_a_number_or_unknown(detail: str) -> None:
    reply = f"HTTP/1.1 200 OK\r\nX-ZDD-Generation: {detail}\r\nContent-Length: 0\r\n\r\n".encode()
    with Server(answer_once(reply)) as server:
        [sample] = get(server.port)
    assert sample.generation == (5 if detail == "5" else None)


def counting(wanted: int, done: threading.Event) -> Script:
    """Answer forever; set `done` at the wanted request."""
    lock, seen = threading.Lock(), iter(range(1, wanted + 1))

    def script(connection: socket.socket, number: int) -> None:
        while read_request(connection):
            with lock:
                if next(seen, None) == wanted:
                    done.set()
            connection.sendall(OK)

    return script


def test_load_runs_every_kind_of_client_and_leaves_no_request_behind() -> None:
    enough = threading.Event()
    with Server(counting(200, enough)) as server:
        load = Load("127.0.0.1", server.port, ["/a", "/b?c=d"], clients=8, think=0.001, pace=0.001)
        with LoadThread(load) as thread:
            assert enough.wait(PATIENCE)
        assert thread.in_flight == 0
    samples = thread.samples
    assert len(samples) >= 200
    assert set(outcomes(samples)) == {Outcome.OK}
    kinds = {sample.client: sample.kind for sample in samples}
    assert sorted(kinds.values()) == ["keepalive"] * 2 + ["new"] * 4 + ["thinking"] * 2
    assert {sample.path for sample in samples} == {"/a", "/b?c=d"}


def test_stop_lets_the_request_in_hand_finish() -> None:
    received, stopping = threading.Event(), threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        received.set()
        assert stopping.wait(PATIENCE)
        connection.sendall(OK)

    async def run(port: int) -> tuple[int, Load]:
        load = Load("127.0.0.1", port, ["/"], clients=1, timeout=PATIENCE)
        await load.start()
        assert await asyncio.to_thread(received.wait, PATIENCE)
        in_flight = load.in_flight
        stop = asyncio.create_task(load.stop())
        stopping.set()
        await stop
        return in_flight, load

    with Server(script) as server:
        in_flight, load = asyncio.run(run(server.port))
    assert (in_flight, load.in_flight) == (1, 0)
    assert outcomes(load.samples) == [Outcome.OK]


def test_nobody_who_was_dismissed_begins_another_request() -> None:
    enough = threading.Event()
    with Server(counting(50, enough)) as server:
        with LoadThread(Load("127.0.0.1", server.port, ["/"], clients=4, think=0.001, pace=0.001)) as thread:
            assert enough.wait(PATIENCE)
            thread.dismiss()
            dismissed_at = time.monotonic()
            thread.stop()
        thread.dismiss()  # of nobody
    assert max(sample.started for sample in thread.samples) <= dismissed_at


def test_thread_may_be_stopped_twice_or_never_started() -> None:
    with Server(keep_answering()) as server:
        thread = LoadThread(Load("127.0.0.1", server.port, ["/"], clients=1))
        thread.stop()
        thread.start()
        thread.stop()
        thread.stop()


def test_thread_raises_what_keeps_the_load_from_starting() -> None:
    with Server(keep_answering()) as server:
        load = Load("127.0.0.1", server.port, ["/"], clients=1)
        with LoadThread(load):
            pass
        again = LoadThread(load)
        with pytest.raises(RuntimeError, match="make a new one"):
            again.start()
        again.stop()


BAD_ARGUMENTS: list[dict[str, object]] = [
    {"paths": []},
    {"paths": ["/with space"]},
    {"paths": ["/\u00e4"]},
    {"clients": 0},
    {"keepalive_share": 1.5},
    {"timeout": 0.0},
    {"pace": -1.0},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
def test_load_rejects_what_cannot_work(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments)).removesuffix("s")):
        Load("127.0.0.1", 1, **{"paths": ["/"], **arguments})  # type: ignore[arg-type]
