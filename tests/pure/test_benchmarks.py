"""The benchmarks' arithmetic."""

from __future__ import annotations

import http.client
import http.server
import itertools
import math
import random
import threading
from pathlib import Path

import pytest

from benchmarks.balancers.proxies import PROXIES
from benchmarks.balancers.traffic import ask
from benchmarks.client import reply_length
from benchmarks.handover import row
from benchmarks.interval import Interval, median_interval, verdict
from benchmarks.middleware import ADAPTORS, Cost, measure
from benchmarks.middleware import table as cost_table
from benchmarks.overhead import Pair, Run
from benchmarks.real_apps.__main__ import channels_row, wagtail_row
from benchmarks.servers import ROOT
from zdd_web.cli.rehearse.report import Handover, Sample, build
from zdd_web.cli.rehearse.report import Outcome as Result


def test_the_interval_of_eleven_values_leaves_out_the_outermost_ones() -> None:
    interval = median_interval([float(n) for n in range(1, 12)])
    assert interval == Interval(6.0, 2.0, 10.0, pytest.approx(1 - 2 * 12 / 2048))


def test_the_order_of_the_values_does_not_matter() -> None:
    values = [3.0, 1.0, 2.0, 6.0, 5.0, 4.0, 7.0]
    assert {median_interval(order) for order in itertools.islice(itertools.permutations(values), 50)} == {
        median_interval(sorted(values))
    }


@pytest.mark.parametrize("count", range(6))
def test_fewer_than_six_values_have_no_95_percent_interval(count: int) -> None:
    assert median_interval([1.0] * count) is None


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    random.seed(20)
    tries = 4_000
    intervals = [median_interval([random.expovariate(1) for _ in range(11)]) for _ in range(tries)]
    # Far from normal on purpose; the median of Exp(1) is ln 2.
    covered = sum(i is not None and i.low <= math.log(2) <= i.high for i in intervals) / tries
    assert covered == pytest.approx(0.988, abs=0.008)


@pytest.mark.parametrize(
    ("low", "high", "begin"),
    [(0.97, 1.0, "reaches"), (0.9, 0.969, "does not reach"), (0.9, 0.97, "not decided"), (0.96, 1.1, "not decided")],
)
def test_the_verdict_names_the_side_of_the_bar(low: float, high: float, begin: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high, 0.988), 0.97).startswith(begin)


def test_too_few_pairs_give_no_verdict() -> None:
    assert "too few" in verdict(None, 0.97)


def test_both_ratios_are_below_one_when_zdd_web_costs_something() -> None:
    pair = Pair(without=Run(1000.0, 100.0), with_zdd_web=Run(980.0, 102.0), first="with")
    assert (pair.ratio, pair.cpu_ratio) == (pytest.approx(0.98), pytest.approx(100 / 102))


def test_a_reply_is_as_long_as_its_head_and_its_content_length() -> None:
    reply = b"HTTP/1.1 200 OK\r\nServer: gunicorn\r\nContent-Length: 3\r\n\r\nok\n"
    assert reply_length(reply) == len(reply)
    assert reply_length(reply[:20]) == 0


def test_a_reply_that_is_no_200_ends_the_client() -> None:
    with pytest.raises(ValueError, match="not a reply"):
        reply_length(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")


def sample(started: float, seconds: float) -> Sample:
    return Sample(0, "new", "/", started, started, started + seconds, Result.OK, 200, 1)


def test_the_handover_row_divides_the_two_p99() -> None:
    samples = [sample(10.0, 0.010), sample(20.0, 0.015)]
    handover = Handover(1, 1, 2, requested_at=19.0, ready_at=20.0, done_at=21.0, ok=True)
    found = row("example_flask", "sync", build(samples, [handover], stop=None).to_json())
    assert found[:4] == ("example_flask", "sync", 2, 0)
    assert found[4:7] == ("10.0 ms", "15.0 ms", "1.50")
    assert found[8:] == ("1.00 s", "1.00 s")


def test_the_handover_row_of_a_rehearsal_without_requests_has_dashes() -> None:
    found = row("example_flask", "sync", build([], [], stop=None).to_json())
    assert found[4:7] == ("-", "-", "-")
    assert found[8:] == ("-", "-")


@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_every_adaptor_can_be_measured(adaptor: str, settings: object) -> None:
    settings.ROOT_URLCONF = "benchmarks.urls"  # type: ignore[attr-defined]
    cost = measure(adaptor, rounds=1, requests=2)
    assert cost.adaptor == adaptor
    assert cost.bare > 0
    assert cost.adapted > 0


def test_the_cost_of_an_adaptor_is_what_it_adds() -> None:
    cost = Cost("WSGI", bare=200.0, adapted=300.0)
    assert (cost.added, cost.ratio) == (100.0, 1.5)
    assert cost_table([cost]).splitlines()[-1].split() == ["WSGI", "200", "300", "100", "1.500"]


def test_real_apps_rows_count_lost_messages_beside_lost_requests() -> None:
    echo = {"messages": 20, "sent_again": 1, "lost": {}, "closes": {"1012": 2}}
    chat = {"messages": 10, "sent_again": 0, "lost": {"another reply": 2}, "closes": {"1001": 2, "1006": 1}}
    report = {"requests": 100, "lost": 3, "failures": [], "sockets": {"echo": echo, "chat": chat}}
    codes = "echo: 1012 (2)\nchat: 1001 (2), 1006 (1)"
    assert channels_row(report) == [100, 3, 30, 2, "echo 1, chat 0", codes, "none"]
    handovers = [{"ok": True, "reason": ""}, {"ok": False, "reason": "boom"}]
    stop = {"ok": False, "reason": "the service did not end in time"}
    row_of_wagtail = wagtail_row({"requests": 7, "lost": 0, "handovers": handovers, "stop": stop})
    assert (row_of_wagtail[:2], row_of_wagtail[-1]) == ([7, 0], "boom; the service did not end in time")


def test_balancers_are_measured_with_the_settings_of_the_page() -> None:
    page = (ROOT / "docs/how-to/load-balancers.md").read_text()
    measured = "\n".join(proxy.configuration(Path("/tmp"), 80, (8001, 8002)) for proxy in PROXIES)
    for setting in (
        "max_fails=1 fail_timeout=1s",
        "keepalive_timeout 60s;",
        "proxy_next_upstream error timeout;",
        "option httpchk GET /readyz",
        "default-server check inter 1s fall 2 rise 2",
        "common_lb_config: {healthy_panic_threshold: {value: 0}}",
        "{timeout: 1s, interval: 1s, no_traffic_interval: 1s, unhealthy_threshold: 2, healthy_threshold: 1,",
        "common_http_protocol_options: {idle_timeout: 60s}",
    ):
        assert setting in page
        assert setting in measured


def test_a_lost_request_is_one_without_its_own_answer() -> None:
    class Reply(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(502 if self.path == "/fails" else 200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"own")

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        seen = [ask(connection, "GET", number, keep=False) for number in ("own", "other", "fails")]
        connection.close()
        server.shutdown()
        thread.join()
    assert seen == ["", "another's reply", "502"]
    refused = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    assert ask(refused, "GET", "own", keep=False) == "ConnectionRefusedError"
