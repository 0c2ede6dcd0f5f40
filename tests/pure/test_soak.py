"""benchmarks.soak and benchmarks.scale: what they conclude from what they have measured."""

from __future__ import annotations

import doctest
import importlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.scale.__main__ import named_tasks
from benchmarks.soak import report
from benchmarks.soak.app import answer, break_as
from benchmarks.soak.chain import Chain, Plan
from benchmarks.soak.clients import Clients
from benchmarks.soak.service import FAULTS
from benchmarks.soak.verdict import MEMORY_TOLERANCE, Growth, growth, judge

EXAMPLES = (
    "deployed",
    "soak.app",
    "soak.chain",
    "soak.verdict",
    "soak.report",
    "soak.__main__",
    "scale.__main__",
    "scale.service",
)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_do_what_they_say(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"benchmarks.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


def samples(*values: float) -> list[dict[str, float]]:
    return [{"descriptors of the master": value} for value in values]


def test_growth_is_between_the_first_tenth_and_the_last() -> None:
    # One sample of twenty that is out of line, at either end, is outvoted by none: of two the lower one counts.
    (found,) = growth(samples(9, 17, *[9] * 16, 9, 12))
    assert found == Growth("descriptors of the master", 9, 9, 0.0)
    assert not found.grew


def test_one_more_descriptor_is_growth() -> None:
    (found,) = growth(samples(*range(9, 109)))
    assert (found.first, found.last, found.grew) == (13, 103, True)
    (found,) = growth(samples(*[9] * 50, *[10] * 50))
    assert found.grew


def test_fewer_are_no_growth() -> None:
    (found,) = growth(samples(*[10] * 50, *[9] * 50))
    assert not found.grew


@pytest.mark.parametrize(("more", "grew"), [(MEMORY_TOLERANCE, False), (MEMORY_TOLERANCE + 1, True)])
def test_memory_may_differ_by_what_an_allocator_keeps(more: int, grew: bool) -> None:
    (found,) = growth([{"resident memory of a worker, KiB": each} for each in (30_000, 30_000 + more)])
    assert found.grew is grew


@pytest.mark.parametrize("count", [0, 1])
def test_one_sample_shows_no_growth(count: int) -> None:
    assert growth(samples(9)[:count]) == []


def test_a_chain_without_requests_shows_nothing() -> None:
    assert not judge(0, [], [], requests=0, upgrades=3).ok
    assert not judge(0, [], [], requests=3, upgrades=0).ok
    assert judge(0, [], [], requests=3, upgrades=3).ok
    assert judge(0, [], [], requests=3, upgrades=3, leftovers="[7] were left").reasons == (
        "after the stop: [7] were left",
    )


def test_every_fault_has_its_turn_and_is_one_that_a_release_can_have() -> None:
    faults = list(Plan("fd", "gthread", 40, broken_each=5).faults())
    assert [fault for fault in faults if fault] == [*FAULTS, *FAULTS]
    assert list(Plan("fd", "gthread", 3, broken_each=0).faults()) == ["", "", ""]
    with pytest.raises(ImportError):
        break_as("import_error")
    with pytest.raises(ValueError, match="fault 'typo': one of import_error, never_ready"):
        break_as("typo")


def chain() -> Chain:
    made = Chain(Plan("fd", "gthread", 12), load={"requests": 5000, "posts": 2400, "lost": {"ECONNRESET (GET)": 3}})
    made.good, made.held, made.samples = 12, 3, [{"processes": 3}, {"processes": 3}]  # type: ignore[assignment]
    made.latencies = {"steady": [4000, 1.0, 2.5, 9.0], "upgrade": [1000, None, None, None]}
    made.losses = [
        {"at": 0.0, "kind": "ECONNRESET", "method": "GET", "connection": "new", "then": "steady", "now": "upgrade 3"}
    ]
    return made


def test_what_a_crashed_worker_had_in_hand_is_not_lost_and_is_in_the_report() -> None:
    good = chain()
    assert good.lost == 0
    assert good.verdict.ok
    page = report.page([good], [])
    assert "12 upgrades, 0 of them of broken code, and 5,000 requests: **0 lost**" in page
    assert "ECONNRESET, GET on a new connection, begun in: steady; lost in: upgrade 3" in page
    assert page.endswith("As promised: nothing lost, nothing grew.\n")
    # It is a page of docs/.
    assert max(map(len, page.splitlines())) <= 120


def test_the_report_says_what_was_not_as_promised() -> None:
    bad = chain()
    bad.held, bad.samples[-1]["processes"] = 1, 4
    assert report.verdict([bad]) == ["fd: 2 of 5000 requests lost", "fd: processes: from 3 to 4"]
    page = report.page([bad], ["systemd: the chain ended: boom"])
    assert "- systemd: the chain ended: boom\n- fd: 2 of 5000 requests lost\n" in page
    assert "As promised" not in page


def test_unfinished_tasks_are_counted_by_line_and_by_name() -> None:
    log = "\n".join(
        [
            "pid=7 event=background.deadline pid=7 tasks=12 on_abandon=0",
            "pid=7 event=background.abandoned pid=7 group=background name=scale",
            "pid=7 event=background.abandoned_by_name pid=7 group=background name=scale tasks=10 age=3",
            "pid=7 event=background.abandoned_by_name pid=7 names=1 tasks=1 age=3",
        ]
    )
    assert named_tasks(log) == (1, 11)


# -- the clients


@contextmanager
def server(spoil: str) -> Iterator[int]:
    """Answer as the app does, each fifth reply spoilt."""
    numbers = iter(range(1, 1_000_000))

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            while line := file.readline():
                head = [line]
                while (line := file.readline().lower()) not in (b"\r\n", b""):
                    head.append(line)
                length = next((int(each.split(b":")[1]) for each in head if each.startswith(b"content-length")), 0)
                body = answer("1", head[0].split()[1].decode(), file.read(length))
                spoilt = spoil if next(numbers) % 5 == 0 else ""
                if spoilt == "closed":
                    return
                sent = f"HTTP/1.1 {500 if spoilt == 'status 500' else 200} OK\r\nContent-Length: {len(body)}\r\n\r\n"
                if spoilt == "another reply":
                    body = b"-" * len(body)
                connection.sendall(sent.encode() + body[: -1 if spoilt == "truncated" else None])
                if spoilt == "truncated" or b"connection: close\r\n" in head:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("spoil", ["", "closed", "truncated", "another reply", "status 500"])
def test_clients_see_every_way_of_losing_a_request(spoil: str) -> None:
    with server(spoil) as port:
        clients = Clients(port, 4, 6, random.Random(1))
        clients.doing = "steady"
        while clients.counts.requests < 60:
            clients.turn(begin=True)
        clients.doing = "upgrade 1"
        while clients.in_hand:
            clients.turn(begin=False)
        clients.close()
        counts = clients.counts
        kinds = {kind.partition(" (")[0] for kind in counts.lost}
        assert kinds == ({spoil} if spoil else set())
        assert (counts.lost.total() > 5) is bool(spoil)
        assert 0 < counts.posts < counts.requests
        assert counts.opened < counts.requests
        line = clients.line()
        assert [loss["kind"] for loss in line["losses"]] == [spoil] * counts.lost.total()
        assert sum(count for count, *_ in line["latencies"].values()) == counts.requests - counts.lost.total()
        # Each loss is told once.
        assert clients.line()["losses"] == []
