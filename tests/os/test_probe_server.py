"""The probe port's process: its answers, one client's connection, and its loop, each for itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.board import Board, Header, WorkerState
from zdd_web.health import Health, Kind, Reply, Result, WorkerHealth
from zdd_web.lifecycle import Phase
from zdd_web.probe_server import answers, connection, scrapes, server, turns
from zdd_web.probe_server.answers import Answers, Asked, Verdicts
from zdd_web.probe_server.connection import HEAD_BYTES, Connection
from zdd_web.probe_server.server import Server
from zdd_web.probe_server.turns import Rank, Turns
from zdd_web.probes import kinds
from zdd_web.settings import Settings
from zdd_web.system import clock, proc

OK = Reply(200, "OK", (("Content-Length", "3"),), b"ok\n")


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create("probes", slots=2)
    board.header.phase, board.header.workers_wanted = Phase.SERVING, 1
    board.header.ready_at = clock.now_ns()
    board.claim(1).state = WorkerState.SERVING
    yield board
    board.close()


def register(board: Board, name: str, result: Result = Result.PASSED) -> None:
    slot = board.slot(0)
    record = slot.check(slot.checks)
    record.name, record.kind, record.result, record.critical = name, Kind.READINESS, result, 1
    record.fresh_until = clock.after_ns(60)
    slot.checks += 1


# -- answers


def test_every_probe_has_its_path_and_everything_else_is_not_found(board: Board) -> None:
    answers = Answers(board, Settings(readiness_path="/ready"))
    found = {path: answers.reply(Asked("GET", path)).status for path in ("/livez", "/ready", "/startupz/", "/readyz")}
    assert found == {"/livez": 200, "/ready": 200, "/startupz/": 200, "/readyz": 404}


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/readyz?verbose&exclude=db", "/readyz", "verbose&exclude=db"),
        (b"/readyz/caf%C3%A9", "/readyz/café", ""),
        (b"http://10.0.0.7:8081/livez?x=http://a/b", "/livez", "x=http://a/b"),
        (b"http://10.0.0.7", "/", ""),
        (b"/livez?x=http://a/b", "/livez", "x=http://a/b"),
        (b"*", "*", ""),
        (b"10.0.0.7:80", "10.0.0.7:80", ""),
    ],
)
def test_a_target_is_taken_apart(target: bytes, path: str, query: str) -> None:
    asked = Asked.read(b"GET", target, b"", "")
    assert (asked.path, asked.query) == (path, query)


def test_a_check_that_is_registered_later_gets_its_path_within_a_second(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(answers, "kinds", lambda board: made.append(1) or kinds(board))
    monkeypatch.setattr(answers, "REMAKE", 3600.0)
    found = Answers(board, Settings())
    assert found.reply(Asked("GET", "/readyz/db")).status == 404
    register(board, "db")
    # Whoever asks for thousands of paths that there are not has the board read for them once a second.
    assert {found.reply(Asked("GET", f"/readyz/{number}")).status for number in range(100)} == {404}
    assert len(made) == 1
    monkeypatch.setattr(answers, "REMAKE", 0.0)
    assert found.reply(Asked("GET", "/readyz/db")).status == 200


@pytest.mark.parametrize(
    ("details", "peer", "seen"),
    [("", "127.0.0.1", True), ("", "10.0.0.7", False), ("never", "127.0.0.1", False), ("always", "10.0.0.7", True)],
)
def test_details_are_for_this_machine_unless_the_setting_says_otherwise(
    board: Board, details: str, peer: str, seen: bool
) -> None:
    register(board, "database", Result.FAILED)
    reply = Answers(board, Settings(details=details)).reply(Asked("GET", "/readyz", peer=peer))
    assert reply.status == 503
    assert (b"database" in reply.body) is seen


def test_metrics_have_their_path(board: Board) -> None:
    reply = Answers(board, Settings()).reply(Asked("GET", "/metrics"))
    assert reply.status == 200
    assert b"zdd_web_generation " in reply.body
    assert Answers(board, Settings()).reply(Asked("POST", "/metrics")).status == 405
    options = Answers(board, Settings()).reply(Asked("OPTIONS", "/metrics"))
    assert (options.status, options.body) == (200, b"")


def test_metrics_are_rendered_at_most_once_a_second_whatever_clients_accept(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def exposition(collector: object, accept: str, *, details: bool) -> tuple[str, bytes]:
        made.append(accept)
        return "text/plain", f"{len(made)} {details}".encode()

    now = [100.0]
    monkeypatch.setattr(scrapes, "exposition", exposition)
    monkeypatch.setattr(scrapes, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    found = Answers(board, Settings())

    def scrape(accept: str, peer: str = "127.0.0.1") -> bytes:
        return found.reply(Asked("GET", "/metrics", accept=accept, peer=peer)).body

    assert {scrape("") for _ in range(100)} == {b"1 True"}
    # Names of checks are not for those who may not see them, kept or not.
    assert scrape("", peer="10.0.0.7") == b"2 False"
    assert {scrape(f"text/plain; version={number}") for number in range(100)} == {b"1 True", b"3 True", b"4 True"}
    assert scrape("x" * 5000) == b"1 True"
    now[0] += scrapes.KEEP
    assert scrape("") == b"5 True"


def test_metrics_without_their_library_say_how_to_get_it(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    reply = Answers(board, Settings()).reply(Asked("GET", "/metrics"))
    assert reply.status == 501
    assert b"zdd-web[metrics]" in reply.body


def test_for_a_master_that_was_killed_its_predecessors_board_speaks_while_that_one_lives(board: Board) -> None:
    before = Board.private()
    found = Answers(board, Settings(), before)
    board.header.phase = Phase.BOOTING
    assert found.reply(Asked("GET", "/readyz")).status == 503
    found.orphaned = True
    before.header.master_start = proc.start_time(os.getpid())
    assert found.reply(Asked("GET", "/readyz")).status == 200
    board.header.phase, before.header.master_start = Phase.SERVING, 1
    assert found.reply(Asked("GET", "/readyz")).status == 503
    assert found.reply(Asked("GET", "/livez")).status == 200


def test_a_lame_duck_is_ready_where_the_settings_say_so(board: Board) -> None:
    found = Answers(board, Settings(lame_duck_ready=True))
    statuses = {}
    for phase in (Phase.SERVING, Phase.LAME_DUCK, Phase.DRAINING):
        board.header.phase = phase
        statuses[phase] = found.reply(Asked("GET", "/readyz")).status
    assert statuses == {Phase.SERVING: 200, Phase.LAME_DUCK: 200, Phase.DRAINING: 503}


def test_a_retired_generation_speaks_for_its_successor_to_the_end(board: Board) -> None:
    found = Answers(board, Settings())
    board.header.successor_pid, board.header.successor_phase = 1, Phase.SERVING
    for phase, orphaned in ((Phase.RETIRING, False), (Phase.STOPPED, False), (Phase.STOPPED, True)):
        board.header.phase, found.orphaned = phase, orphaned
        assert [found.reply(Asked("GET", path)).status for path in ("/livez", "/readyz", "/startupz")] == [200] * 3


def test_a_verdict_is_logged_when_it_changes_and_not_while_a_generation_boots_or_retires(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "zdd_web")
    verdicts = Verdicts()
    well = Health(Phase.SERVING, wanted=1, workers=(WorkerHealth(),))
    ill = Health(Phase.SERVING, wanted=1, workers=(WorkerHealth(serving=False),))
    for health in (Health(Phase.BOOTING), well, well, ill, ill, Health(Phase.RETIRING), well, Health(Phase.LAME_DUCK)):
        verdicts.see(health)
    assert [record.getMessage() for record in caplog.records] == [
        'event=probe.failing probe=readiness reason="workers: 0 of 1 serve"',
        "event=probe.passing probe=readiness",
        'event=probe.failing probe=readiness reason="phase: lame_duck"',
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]


def test_a_master_that_stalls_is_logged_once_and_not_before_it_has_had_time_to_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "zdd_web")
    verdicts, well = Verdicts(), Health(Phase.SERVING, wanted=1, workers=(WorkerHealth(),))
    stalled = well._replace(master_stalled=6.0)
    for health in (stalled, stalled, well):
        verdicts.see(health)
    assert caplog.records == []
    monkeypatch.setattr(answers, "CONFIRM", 0.0)
    for health in (stalled, stalled, well, well):
        verdicts.see(health)
    assert [record.getMessage() for record in caplog.records] == [
        "event=master.stalled seconds=6",
        "event=master.resumed",
    ]


# -- one connection


class FakeTransport:
    """Keeps what is written, and says what was done to it."""

    def __init__(self, protocol: Connection) -> None:
        self.protocol, self.written, self.done = protocol, b"", [""]
        self.unread = 0

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def get_extra_info(self, name: str) -> Any:
        return ("10.0.0.7", 4711)

    def write(self, data: bytes) -> None:
        self.written += data
        self.unread += len(data)
        if self.unread > self.high:
            self.protocol.pause_writing()

    def is_closing(self) -> bool:
        return self.done[-1] in ("close", "abort")

    def can_write_eof(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.done.append(name)


class FakeOwner:
    def __init__(self, *, keeps: bool = True) -> None:
        self.buffer = memoryview(bytearray(65_536))
        self.asked: list[Asked] = []
        self.kept = keeps
        self.answer = OK
        self.waiting: Turns[Connection] = Turns()
        self.ranks: list[Rank] = []

    def is_liveness(self, head: bytes | bytearray) -> bool:
        return head.startswith(b"GET /livez")

    def wait(self, connection: Connection, rank: Rank) -> None:
        self.ranks.append(rank)
        self.waiting.add(connection, rank)

    def turn(self) -> None:
        next(self.waiting.round()).take_turn()

    def finish(self) -> None:
        while self.waiting:
            self.turn()

    def reply(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        return self.answer

    def keeps(self) -> bool:
        return self.kept

    def made(self, connection: Connection) -> None: ...
    def served(self, connection: Connection) -> None: ...
    def lost(self, connection: Connection) -> None: ...


class Talk:
    """A connection without a socket."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.owner = FakeOwner(keeps=keeps)
        self.connection = Connection(self.owner)
        self.transport = FakeTransport(self.connection)
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]

    def sends(self, data: bytes) -> None:
        self.owner.buffer[: len(data)] = data
        self.connection.buffer_updated(len(data))

    def says(self, data: bytes) -> Talk:
        for start in range(0, len(data), len(self.owner.buffer)):
            self.sends(data[start : start + len(self.owner.buffer)])
            self.owner.finish()
        return self

    @property
    def statuses(self) -> list[int]:
        client, found = h11.Connection(h11.CLIENT), []
        rest = self.transport.written
        while rest:
            client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
            client.send(h11.EndOfMessage())
            client.receive_data(rest)
            while (event := client.next_event()) is not h11.NEED_DATA and not isinstance(event, h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    found.append(event.status_code)
            assert isinstance(event, h11.EndOfMessage)
            rest = client.trailing_data[0]
            client = h11.Connection(h11.CLIENT)
        return found

    @property
    def done(self) -> list[str]:
        return self.transport.done[1:]


ONE = b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n"


def test_requests_on_a_kept_connection_are_answered_one_after_the_other() -> None:
    talk = Talk().says(ONE)
    assert talk.connection.idle
    talk.says(ONE + ONE)
    assert talk.statuses == [200, 200, 200]
    assert talk.done == []
    assert b"connection: close" not in talk.transport.written.lower()


def test_a_request_may_come_byte_by_byte_and_has_its_time_from_the_first() -> None:
    talk = Talk().says(ONE)
    kept_until = talk.connection.deadline
    for byte in ONE[:-1]:
        talk.says(bytes([byte]))
    assert talk.connection.deadline < kept_until
    assert len(talk.statuses) == 1
    assert len(talk.says(ONE[-1:]).statuses) == 2


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nAccept: */*\r\n\r\n",
        b"GET /livez HTTP/1.1\n\n",
        b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n",
    ],
)
def test_a_request_without_host_is_answered(request_: bytes) -> None:
    talk = Talk().says(request_)
    assert talk.statuses == [200]
    assert talk.owner.asked[0].path == "/livez"


def test_requests_without_host_may_follow_each_other() -> None:
    no_host = b"GET /livez HTTP/1.1\r\n\r\n"
    assert Talk().says(no_host + ONE + no_host + no_host).statuses == [200] * 4


def test_http_10_is_answered_and_closed() -> None:
    talk = Talk().says(b"GET /livez HTTP/1.0\r\n\r\n")
    assert talk.statuses == [200]
    assert talk.done == ["close"]


def test_a_reply_says_close_when_connections_are_not_kept() -> None:
    talk = Talk(keeps=False).says(ONE)
    assert b"Connection: close" in talk.transport.written
    assert talk.done == ["close"]
    # Closed twice it is cut: what was written may be taken by nobody.
    talk.connection.close()
    assert talk.done == ["close", "abort"]


def test_head_has_no_body() -> None:
    talk = Talk()
    talk.owner.answer = Reply(200, "OK", (("Content-Length", "3"),), b"")
    assert talk.says(b"HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\n").transport.written.endswith(b"\r\n\r\n")
    assert talk.connection.idle


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
     b"Content-Length: 5\r\n\r\n", b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"],
)  # fmt: skip
def test_a_body_is_not_read_but_the_request_answered_and_the_connection_ended(framing: bytes) -> None:
    talk = Talk().says(b"POST /livez HTTP/1.1\r\nHost: a\r\n" + framing)
    assert talk.statuses == [200]
    assert b"Connection: close" in talk.transport.written
    assert talk.done == ["write_eof"]
    talk.says(b"more " * 1000)
    assert talk.done == ["write_eof"]
    talk.says(b"x" * connection.DROPPED_BYTES)
    assert "abort" in talk.done


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20), 431),
        (b"GET /" + b"x" * (1 << 20), 431),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_ended(data: bytes, status: int) -> None:
    talk = Talk().says(data)
    assert talk.statuses == [status]
    assert talk.done[0] == "write_eof"
    assert talk.owner.asked == []


def test_a_client_that_reads_nothing_is_answered_no_more_until_it_does() -> None:
    talk = Talk()
    talk.owner.answer = Reply(200, "OK", (("Content-Length", "30000"),), b"x" * 30_000)
    talk.says(ONE * 100)
    assert len(talk.owner.asked) == 3
    assert talk.done == ["pause_reading"]
    assert len(talk.transport.written) < 2 * connection.UNREAD_BYTES
    talk.transport.unread = 0
    talk.connection.resume_writing()
    talk.owner.finish()
    assert len(talk.owner.asked) == 6
    talk.connection.close()
    assert talk.done[-1] == "abort"


@given(st.lists(st.one_of(st.binary(max_size=200), st.sampled_from([ONE, b"\r\n", b"GET / HTTP/1.1\r\n", b"\x00"]))))
def test_no_bytes_raise_or_are_kept_beyond_the_limit(chunks: list[bytes]) -> None:
    talk = Talk()
    for chunk in chunks:
        if not talk.transport.is_closing():
            talk.says(chunk)
    assert len(talk.connection._head) <= HEAD_BYTES + 200
    assert set(talk.statuses) <= {200, 400, 431, 501, 505}


def test_a_turn_has_one_answer_and_what_a_client_sends_meanwhile_is_bounded() -> None:
    talk = Talk()
    talk.sends(ONE * 400)
    talk.sends(ONE * 400)
    assert talk.owner.ranks == [Rank.OTHER]
    assert talk.done == ["pause_reading"]
    for number in range(1, 800):
        talk.owner.turn()
        assert len(talk.owner.asked) == number
    assert talk.done == ["pause_reading"]
    talk.owner.finish()
    assert talk.done == ["pause_reading", "resume_reading"]
    assert len(talk.statuses) == 800
    assert set(talk.owner.ranks[1:]) == {Rank.PIPELINED}


def test_liveness_goes_first_but_not_what_is_pipelined_behind_it() -> None:
    talk = Talk().says(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * 2 + ONE).says(ONE)
    assert talk.owner.ranks == [Rank.LIVENESS, Rank.PIPELINED, Rank.PIPELINED, Rank.OTHER]


@pytest.mark.parametrize(
    ("head", "is_liveness"),
    [(b"GET /alive HTTP/1.1\r\n", True), (b"OPTIONS /alive?verbose HT", True), (b"GET /alive/db HTTP/1.1", True),
     (b"GET /readyz HTTP/1.1\r\nReferer: /alive", False), (b"GET", False), (b"", False)],
)  # fmt: skip
def test_liveness_is_known_by_its_path(board: Board, head: bytes, is_liveness: bool) -> None:
    assert Answers(board, Settings(liveness_path="/alive")).is_liveness(head) is is_liveness


def test_all_that_was_asked_before_the_client_closed_its_half_is_answered() -> None:
    talk = Talk()
    talk.sends(ONE * 3)
    assert talk.connection.eof_received() is True
    talk.owner.finish()
    assert talk.statuses == [200] * 3
    assert talk.done == ["close"]
    assert Talk().connection.eof_received() is False


# -- turns


def test_a_round_is_by_rank_with_one_of_each_and_the_rest_while_there_is_time() -> None:
    clock_ = itertools.count(0, turns.ROUND / 4)
    waiting: Turns[str] = Turns(lambda: next(clock_))
    for number in range(9):
        for rank in Rank:
            waiting.add(f"{rank.name}{number}", rank)
    first = []
    for each in waiting.round():
        first.append(each)
        waiting.add("again", Rank.LIVENESS)
    assert first == ["LIVENESS0", "LIVENESS1", "LIVENESS2", "LIVENESS3", "OTHER0", "PIPELINED0"]
    assert len(waiting) == 27
    rest = [each for _ in range(27) for each in waiting.round()]
    assert [each for each in rest if each != "again"][:2] == ["LIVENESS4", "LIVENESS5"]
    assert len(waiting) == 0


# -- the loop


def test_a_new_connection_is_not_closed_for_those_that_were_answered_before(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 3)
    monkeypatch.setattr(server, "NEW_SECONDS", 600.0)

    def client(port: int) -> None:
        with contextlib.ExitStack() as stack:
            known = [stack.enter_context(connect(port)) for _ in range(3)]
            for sock in known:
                asks(sock)
            new = [stack.enter_context(connect(port)) for _ in range(2)]
            # The first of them has not asked yet when the second comes.
            for sock in (known[2], *new):
                assert asks(sock).startswith(b"HTTP/1.1 200")

    with running(board, client):
        pass


@contextlib.contextmanager
def running(
    board: Board, client: Callable[[int], None], predecessor: Board | None = None, **header: int
) -> Iterator[Server]:
    """Make a server in this process; `client` is run beside it with the port, and the server ends after it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        board.header.probe_pid, board.header.probe_accepts = os.getpid(), 1
        for name, value in header.items():
            setattr(board.header, name, value)
        made = Server(board, listener, Settings(), os.getppid(), lambda: None, predecessor)
        errors: list[BaseException] = []

        def talk() -> None:
            try:
                client(listener.getsockname()[1])
            except BaseException as error:
                errors.append(error)
            finally:
                board.header.probe_pid = 1

        thread = threading.Thread(target=talk)
        yield made
        thread.start()
        made.run()
        thread.join()
        assert errors == []
        assert listener.fileno() == -1


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def asks(sock: socket.socket) -> bytes:
    sock.sendall(ONE)
    received = b""
    while not received.endswith(b"ok\n"):
        data = sock.recv(65536)
        assert data, received
        received += data
    return received


def test_beyond_the_limit_the_connection_that_is_silent_for_longest_goes(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 3)

    def client(port: int) -> None:
        with connect(port) as first, connect(port) as second, connect(port) as third:
            for sock in (first, second, third, first):
                assert asks(sock).startswith(b"HTTP/1.1 200")
            with connect(port) as fourth:
                assert asks(fourth).startswith(b"HTTP/1.1 200")
                with contextlib.suppress(ConnectionResetError):
                    assert second.recv(1) == b""
                assert asks(first).startswith(b"HTTP/1.1 200")

    with running(board, client):
        pass


def test_a_head_that_does_not_come_ends_the_connection(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)

    def client(port: int) -> None:
        with connect(port) as silent, connect(port) as slow, connect(port) as kept:
            slow.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
            asks(kept)
            assert (silent.recv(1), slow.recv(1)) == (b"", b"")
            assert asks(kept).startswith(b"HTTP/1.1 200")

    with running(board, client):
        pass


def waits_until(port: int, header: Header, accepts: int) -> None:
    """Ask, be answered by nothing, write that word of a board, and be answered."""
    with connect(port) as waiting:
        waiting.sendall(ONE)
        waiting.settimeout(0.4)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        header.probe_accepts = accepts
        waiting.settimeout(20)
        assert waiting.recv(65536).startswith(b"HTTP/1.1 200")


def test_nobody_is_accepted_until_the_master_says_so_and_nobody_is_lost(board: Board) -> None:
    def client(port: int) -> None:
        waits_until(port, board.header, 1)

    with running(board, client, probe_accepts=0):
        pass


def test_none_is_accepted_while_the_predecessors_process_does(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "YIELD_SECONDS", 60)
    predecessor = Board.private()
    predecessor.header.probe_accepts = 1
    predecessor.header.master_pid, predecessor.header.master_start = os.getpid(), proc.start_time(os.getpid())

    def client(port: int) -> None:
        waits_until(port, predecessor.header, 0)
        # Only once: the predecessor's process accepts again when this one is lost.
        predecessor.header.probe_accepts = 1
        with connect(port) as again:
            asks(again)

    with running(board, client, predecessor, probe_shared=1):
        pass


@pytest.mark.parametrize(
    "what", [{"seconds": 0.3}, {"shared": 0}, {"start": 1}, {"layout": 1}], ids=["slow", "own port", "gone", "older"]
)
def test_a_predecessors_process_is_not_waited_for(
    board: Board, monkeypatch: pytest.MonkeyPatch, what: dict[str, float]
) -> None:
    monkeypatch.setattr(server, "YIELD_SECONDS", what.get("seconds", 60))
    predecessor = Board.private()
    header = predecessor.header
    header.probe_accepts, header.master_pid = 1, os.getpid()
    header.master_start = int(what.get("start", proc.start_time(os.getpid())))
    header.layout = int(what.get("layout", header.layout))

    def client(port: int) -> None:
        with connect(port) as sock:
            asks(sock)

    with running(board, client, predecessor, probe_shared=int(what.get("shared", 1))):
        pass


def test_kept_connections_have_one_more_request_when_nobody_is_accepted_any_more(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LINGER", 0.5)

    def client(port: int) -> None:
        with connect(port) as talks, connect(port) as is_silent:
            asks(talks)
            asks(is_silent)
            board.header.probe_accepts = 0
            assert b"Connection: close" in asks(talks)
            assert talks.recv(1) == b""
            assert is_silent.recv(1) == b""
            board.header.probe_accepts = 1
        with connect(port) as again:
            assert b"Connection: close" not in asks(again)

    with running(board, client):
        pass


def test_replies_of_a_service_that_stops_close_their_connection(board: Board) -> None:
    def client(port: int) -> None:
        board.header.phase = Phase.LAME_DUCK
        with connect(port) as sock:
            sock.sendall(ONE)
            received = b""
            while data := sock.recv(65536):
                received += data
        assert received.startswith(b"HTTP/1.1 503")
        assert b"Connection: close" in received

    with running(board, client):
        pass


def test_one_whose_master_is_gone_closes_the_port_at_once(board: Board) -> None:
    def client(port: int) -> None:
        with connect(port) as kept:
            asks(kept)
            made._master = 1
            deadline = time.monotonic() + 20
            while is_open(port):
                assert time.monotonic() < deadline
            kept.sendall(ONE)
            assert kept.recv(65536).startswith(b"HTTP/1.1 503")

    with running(board, client) as made:
        pass


def test_an_error_of_ours_is_a_500_and_said_once_a_second(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Answers, asked: Asked) -> Reply:
        raise ValueError("not this time")

    monkeypatch.setattr(Answers, "reply", fails)

    def client(port: int) -> None:
        with connect(port) as sock:
            for _ in range(3):
                sock.sendall(ONE)
                assert sock.recv(65536).startswith(b"HTTP/1.1 500")

    with running(board, client):
        pass
    assert len([record for record in caplog.records if "internal.error" in record.getMessage()]) == 1


def test_without_a_descriptor_left_one_is_made_free(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [True]

    class Listener:
        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def accept(self) -> Any:
            if failing:
                failing.clear()
                raise OSError(24, "Too many open files")
            return self._sock.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    def client(port: int) -> None:
        with connect(port) as sock:
            assert asks(sock).startswith(b"HTTP/1.1 200")

    with running(board, client) as made:
        made._listener = Listener(made._listener)  # type: ignore[assignment]
    assert failing == []


def test_the_loop_is_asyncios_own() -> None:
    # Under gevent's patches another one would be the policy's.
    assert asyncio.SelectorEventLoop is asyncio.unix_events._UnixSelectorEventLoop  # type: ignore[attr-defined]
