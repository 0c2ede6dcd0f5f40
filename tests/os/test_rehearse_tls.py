"""Load under TLS: which servers are trusted, and that every way to fail a request is told apart as without TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.helpers.certificates import SelfSigned, self_signed
from tests.os.test_load import OK, PATIENCE, Script, Server, answer_once, keep_answering, outcomes, read_request, reset
from zdd_web.cli import main
from zdd_web.cli.rehearse import rehearsal
from zdd_web.cli.rehearse.load import Client, Outcome, Sample, Target
from zdd_web.cli.rehearse.samples import Kind


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> SelfSigned:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "SETTLE", 0.3)


class TLSServer(Server):
    """Speaks TLS before the script sees a connection."""

    def __init__(self, signed: SelfSigned, script: Script) -> None:
        self.context = signed.server()
        super().__init__(script)

    def serve(self, connection: socket.socket, number: int) -> None:
        # A reset drops what is not sent yet, as a reply that would wait until the session tickets are acknowledged.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connection = self.context.wrap_socket(connection, server_side=True)
        except OSError:
            connection.close()
            return
        super().serve(connection, number)


def get(
    signed: SelfSigned,
    port: int,
    times: int = 1,
    kind: Kind = "keepalive",
    name: str = "localhost",
    before_last: Callable[[Client], object] = lambda client: None,
    timeout: float = PATIENCE,
) -> list[Sample]:
    """Let one client send some requests, one after the other."""

    async def run() -> list[Sample]:
        samples: list[Sample] = []
        trust = ssl.create_default_context(cafile=str(signed.certificate))
        target = Target(socket.AF_INET, ("127.0.0.1", port), "localhost", timeout, trust, name)
        with contextlib.closing(Client(target, 0, kind, samples.append)) as client:
            for number in range(1, times + 1):
                if number == times > 1:
                    before_last(client)
                await client.get("/")
        return samples

    return asyncio.run(run())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_kept_connection_is_used_again_and_a_new_one_is_not(signed: SelfSigned, version: ssl.TLSVersion) -> None:
    with TLSServer(signed, keep_answering()) as server:
        server.context.minimum_version = server.context.maximum_version = version
        kept = get(signed, server.port, times=3)
        assert len(server.connections) == 1
        new = get(signed, server.port, times=2, kind="new")
        assert len(server.connections) == 3
    assert outcomes(kept) == [Outcome.OK] * 3
    assert outcomes(new) == [Outcome.OK] * 2
    assert {sample.generation for sample in kept} == {7}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (OK[:-1], Outcome.TRUNCATED),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nended by the end of file", Outcome.OK),
        (b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n", Outcome.SERVER_ERROR),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", Outcome.INVALID),
        (b"", Outcome.CLOSED),
    ],
)
@pytest.mark.parametrize("politely", [False, True], ids=["bare end of file", "close_notify"])
def test_reply_then_end(signed: SelfSigned, reply: bytes, expected: Outcome, politely: bool) -> None:
    def script(connection: socket.socket, number: int) -> None:
        answer_once(reply)(connection, number)
        if politely:
            assert isinstance(connection, ssl.SSLSocket)
            connection.unwrap()

    with TLSServer(signed, script) as server:
        [sample] = get(signed, server.port)
    assert sample.outcome is expected, sample


def test_a_reply_in_many_records_is_whole(signed: SelfSigned) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"x" * 3000)

    with TLSServer(signed, script) as server:
        [sample] = get(signed, server.port)
    assert (sample.outcome, sample.length) == (Outcome.OK, 300_000)


def test_reset_with_and_without_a_part_of_the_reply(signed: SelfSigned) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK[:-1] if number else b"")
        reset(connection)

    with TLSServer(signed, script) as server:
        samples = get(signed, server.port, times=2)
    assert [(each.outcome, each.detail) for each in samples] == [
        (Outcome.RESET, "ECONNRESET"), (Outcome.TRUNCATED, "ECONNRESET"),
    ]  # fmt: skip


def test_close_after_a_request_on_a_reused_connection_is_a_race(signed: SelfSigned) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK)
        read_request(connection)

    with TLSServer(signed, script) as server:
        samples = get(signed, server.port, times=2)
    assert [(each.outcome, each.detail) for each in samples] == [
        (Outcome.OK, ""), (Outcome.KEEPALIVE_RACE, "end of file"),
    ]  # fmt: skip


def close_notify(connection: ssl.SSLSocket) -> None:
    connection.settimeout(0.1)  # it waits for the client's, which comes with the next request
    connection.unwrap()


@pytest.mark.parametrize(
    ("end", "detail"),
    [
        (close_notify, "end of file"),
        (lambda connection: connection.shutdown(socket.SHUT_RDWR), "end of file"),
        (reset, "ECONNRESET"),
        (lambda connection: connection.sendall(b"HTTP/1.1 408 Timeout\r\n\r\n"), "unsolicited bytes"),
        # Below TLS.
        (lambda connection: socket.socket.sendall(connection, b"garbage" * 9), "TLS: "),
    ],
    ids=["close_notify", "end of file", "reset", "408", "garbage"],
)
def test_a_connection_that_ended_while_idle_is_stale(
    signed: SelfSigned, end: Callable[[ssl.SSLSocket], object], detail: str
) -> None:
    answered = threading.Event()

    def script(connection: socket.socket, number: int) -> None:
        read_request(connection)
        connection.sendall(OK)
        if not number:
            assert isinstance(connection, ssl.SSLSocket)
            assert answered.wait(PATIENCE)
            end(connection)

    def until_it_ends(client: Client) -> None:
        answered.set()
        assert client._connection is not None
        readable, _, _ = select.select([client._connection.wire.sock], [], [], PATIENCE)
        assert readable

    with TLSServer(signed, script) as server:
        samples = get(signed, server.port, times=2, before_last=until_it_ends)
    assert outcomes(samples) == [Outcome.OK, Outcome.STALE, Outcome.OK]
    assert samples[1].detail.startswith(detail)


def hang_up(connection: socket.socket, number: int) -> None:
    connection.recv(65536)


def reset_it(connection: socket.socket, number: int) -> None:
    connection.recv(65536)
    reset(connection)


def say_nothing(connection: socket.socket, number: int) -> None:
    while connection.recv(65536):
        pass


def answer_in_plain(connection: socket.socket, number: int) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.recv(65536)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (hang_up, Outcome.CLOSED),
        (reset_it, Outcome.RESET),
        (say_nothing, Outcome.TIMEOUT),
        (answer_in_plain, Outcome.INVALID),
    ],
)
def test_a_handshake_that_does_not_succeed(signed: SelfSigned, script: Script, expected: Outcome) -> None:
    with Server(script) as server:
        [sample] = get(signed, server.port, timeout=0.5 if expected is Outcome.TIMEOUT else PATIENCE)
    assert (sample.outcome, sample.connection_opened) == (expected, None), sample


def test_a_certificate_that_changes_for_one_that_is_not_trusted_is_invalid(signed: SelfSigned) -> None:
    with TLSServer(signed, keep_answering()) as server:
        [sample] = get(signed, server.port, name="shop.example")
    assert sample.outcome is Outcome.INVALID
    assert sample.detail.startswith("TLS: certificate: Hostname mismatch")


def rehearse(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["rehearse", "--clients", "2", "--do", "true", *arguments])


def test_a_service_under_tls_is_measured(signed: SelfSigned, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with TLSServer(signed, keep_answering()) as server:
        for trust in (["--cacert", str(signed.certificate)], ["--insecure"]):
            done = rehearse("--url", f"https://localhost:{server.port}/", *trust, "--json", str(file))
            assert done.exit_code == 0, done.output
            report = json.loads(file.read_text())
            assert (report["lost"], report["requests"] > 10) == (0, True)
            assert report["rehearsal"]["insecure"] == ("--insecure" in trust)


def test_a_server_that_is_not_trusted_is_named_with_a_remedy(signed: SelfSigned) -> None:
    with TLSServer(signed, keep_answering()) as server:
        url = f"https://localhost:{server.port}/"
        done = rehearse("--url", url)
        assert done.exit_code == 2
        # OpenSSL 1.1 writes it without the hyphen.
        assert " ".join(done.output.split()).replace("self signed", "self-signed") == (
            f"Error: --url {url}: TLS: certificate: self-signed certificate: give the certificate of its CA with "
            f"--cacert FILE, or --insecure to check nothing"
        )


def test_a_certificate_for_another_host_is_named_with_a_remedy(tmp_path: Path) -> None:
    signed = self_signed(tmp_path, "DNS:shop.example")
    with TLSServer(signed, keep_answering()) as server:
        url = f"https://127.0.0.1:{server.port}/"
        done = rehearse("--url", url, "--cacert", str(signed.certificate))
        assert done.exit_code == 2
        text = " ".join(done.output.split())
        assert "TLS: certificate: IP address mismatch, certificate is not valid for '127.0.0.1'" in text
        assert "name a host that it is for, or give --insecure to check nothing" in text
        assert rehearse("--url", url, "--insecure").exit_code == 0


def test_a_server_without_tls_is_named_with_a_remedy() -> None:
    with Server(answer_in_plain) as server:
        done = rehearse("--url", f"https://localhost:{server.port}/")
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert "TLS: wrong version number: where the server speaks plain HTTP, write http://" in text


def test_a_file_without_a_certificate_is_named(tmp_path: Path, signed: SelfSigned) -> None:
    for text in ("", "nothing"):
        (tmp_path / "ca.pem").write_text(text)
        done = rehearse("--url", "https://localhost:1/", "--cacert", str(tmp_path / "ca.pem"))
        assert done.exit_code == 2
        assert "ca.pem: no certificate can be read there" in " ".join(done.output.split())
    done = rehearse("--url", "https://localhost:1/", "--cacert", str(tmp_path / "nowhere"))
    assert (done.exit_code, "does not exist" in done.output) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--url", "http://127.0.0.1:1/", "--insecure"], "--cacert and --insecure are for a --url that begins with"),
        (["--url", "https://127.0.0.1:1/", "--insecure", "--cacert", __file__], "so --cacert would have no effect"),
    ],
)
def test_options_that_have_no_effect_are_refused(arguments: list[str], error: str) -> None:
    done = rehearse(*arguments)
    assert (done.exit_code, error in " ".join(done.output.split())) == (2, True), done.output
