"""What a report says about samples and handovers, as tables, and what must hold for any samples at all."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.cli.rehearse import text_report
from zdd_web.cli.rehearse.report import Handover, Outcome, Report, Sample, StopResult, build, percentile

STOP = StopResult(requested_at=30.0, ended_at=31.5, exit_status=0, in_flight=4, ok=True)


def sample(
    started: float,
    ended: float | None = None,
    outcome: Outcome = Outcome.OK,
    generation: int | None = None,
    detail: str = "",
) -> Sample:
    end = started if ended is None else ended
    return Sample(0, "new", "/", started, started, end, outcome, 200, generation, detail)


def handover(number: int, ready_at: float | None, *, done_at: float = 0.0, ok: bool = True) -> Handover:
    at = done_at if ready_at is None else ready_at
    reason = "" if ok else "it never got ready"
    return Handover(number, number, number + 1, at - 0.5, ready_at, done_at or at + 1, ok, reason)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, None),
        ([3.0], 0.5, 3.0),
        ([3.0], 0.99, 3.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, 2.0, 3.0], 0.5, 2.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 102)], 0.99, 100.0),
        ([1.0, 2.0], 0.0, 1.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float | None) -> None:
    assert expected == percentile(values, share)


@pytest.mark.parametrize(
    ("started", "ended", "expected"),
    [
        (0.0, 0.5, {"steady"}),
        (8.9, 8.99, {"steady"}),
        (8.5, 9.0, {"around"}),
        (9.5, 9.6, {"around", "before"}),
        (10.5, 10.6, {"around"}),
        (2.0, 20.0, {"around"}),
        (11.5, 11.6, {"steady", "after"}),
        (12.5, 12.6, {"steady"}),
    ],
)
def test_windows(started: float, ended: float, expected: set[str]) -> None:
    report = build([sample(started, ended)], [handover(1, 10.0)], stop=None)
    assert expected == {window for window, latency in report.latency.items() if latency.requests}


def test_latency_is_that_of_complete_replies_in_milliseconds() -> None:
    samples = [sample(0, n / 1000) for n in range(1, 101)] + [sample(0, 9, Outcome.TIMEOUT)]
    steady = build(samples, [], stop=None).latency["steady"]
    assert (steady.requests, steady.p50, steady.p99, steady.max) == (101, 50, 99, 100)


def test_requests_by_generation_come_in_order_with_the_unmarked_last() -> None:
    samples = [sample(0, generation=g) for g in (2, None, 10, 2, 1)]
    generations = build(samples, [], stop=None).generations
    assert list(generations.items()) == [(1, 1), (2, 2), (10, 1), (None, 1)]


def test_time_to_handover_leaves_out_the_failed() -> None:
    handovers = [
        Handover(1, 1, 2, 0.0, 1.0, 2.0, ok=True),
        Handover(2, 2, 3, 10.0, 14.0, 15.0, ok=True),
        Handover(3, 3, 4, 20.0, None, 80.0, ok=False),
        Handover(4, 3, 4, 90.0, 92.0, 93.0, ok=True),
    ]
    report = build([], handovers, stop=None)
    assert report.seconds_to_handover == (1.0, 2.0, 4.0)
    assert [around.seconds for around in report.handovers] == [1.0, 4.0, None, 2.0]


def test_around_a_handover() -> None:
    samples = [
        sample(1, 2, generation=1),
        sample(9.2, 9.4, generation=1),
        sample(5, 15, generation=1),
        sample(10.1, 10.4, generation=2),
        sample(10.2, 10.2, Outcome.RESET),
        sample(10.2, 10.2, Outcome.STALE),
        sample(12, 13, generation=2),
    ]
    [around] = build(samples, [handover(1, 10.0)], stop=None).handovers
    assert (around.requests, around.lost, around.generations, around.early_answers) == (4, 1, (1, 2), 0)


@pytest.mark.parametrize(
    ("handovers", "answered_at", "expected"),
    [
        ([handover(1, 10.0)], 9.9, [1]),
        ([handover(1, 10.0)], 10.0, [0]),
        ([handover(1, None, done_at=10.0, ok=False)], 9.0, [1]),
        ([handover(1, None, done_at=10.0, ok=False)], 11.0, [1]),
        # The second attempt is generation 2 again: from its request on, the failed one is out of it.
        ([handover(1, None, done_at=10.0, ok=False), Handover(2, 1, 2, 20, 21, 22, True)], 21.5, [0, 0]),
        ([handover(1, None, done_at=10.0, ok=False), Handover(2, 1, 2, 20, 21, 22, True)], 20.5, [0, 1]),
        ([handover(1, None, done_at=10.0, ok=False), Handover(2, 1, 2, 20, 21, 22, True)], 9.0, [1, 0]),
    ],
)
def test_early_answers(handovers: Sequence[Handover], answered_at: float, expected: list[int]) -> None:
    report = build([sample(answered_at, generation=2)], handovers, stop=None)
    assert expected == [around.early_answers for around in report.handovers]
    assert report.ok == (not any(expected) and all(h.ok for h in handovers))


@pytest.mark.parametrize(
    ("answered_at", "expected"),
    [
        ([8.0, 9.5, 9.75, 10.5, 10.75], 1.5),  # the gap reaches into the second before
        ([8.75, 9.5, 10.0, 10.5, 14.0], 3.5),
        ([2.0, 8.0, 8.75, 9.5, 10.0, 10.5, 11.0, 11.5, 19.0], 0.75),  # those elsewhere do not count
    ],
)
def test_longest_stall(answered_at: list[float], expected: float) -> None:
    report = build([sample(at) for at in answered_at], [handover(1, 10.0)], stop=None)
    assert expected == report.longest_stall


def test_stall_without_an_end_lasts_until_the_load_ends() -> None:
    samples = [sample(9.5), sample(10.0), sample(10.5, 20.0, Outcome.TIMEOUT)]
    assert build(samples, [handover(1, 10.0)], stop=None).longest_stall == 10.0


@pytest.mark.parametrize(
    ("lost", "where"),
    [
        (sample(10.0, 10.132, Outcome.RESET), "+0.132 s after handover 1"),
        (sample(9.0, 9.75, Outcome.CLOSED), "-0.250 s before handover 1"),
        (sample(15.0, 16.0, Outcome.REFUSED), "-4.000 s before handover 2"),
        (sample(10.5, 20.5, Outcome.TIMEOUT), "+0.500 s after handover 1"),
        (sample(30.0, 30.5, Outcome.REFUSED), "+0.500 s after the stop"),
    ],
)
def test_loss_is_set_against_the_nearest_event(lost: Sample, where: str) -> None:
    handovers = [handover(2, 20.0), handover(1, 10.0)]
    report = build([sample(0), lost], handovers, stop=STOP)
    [loss] = report.losses
    assert where == loss.where
    assert (lost.started if lost.outcome is Outcome.TIMEOUT else lost.ended) == loss.at
    assert not report.ok


def test_loss_without_any_event_has_no_place() -> None:
    [loss] = build([sample(3, 4, Outcome.RESET)], [], stop=None).losses
    assert (loss.at, loss.where) == (1.0, "")


@pytest.mark.parametrize(
    ("samples", "handovers", "stop", "expected"),
    [
        ([sample(0)], [], None, True),
        ([sample(0)], [handover(1, 10.0)], STOP, True),
        ([sample(0), sample(1, outcome=Outcome.STALE)], [], None, True),
        ([], [], None, False),
        ([sample(0, outcome=Outcome.STALE)], [], None, False),
        ([sample(0), sample(1, outcome=Outcome.SERVER_ERROR)], [], None, False),
        ([sample(0)], [handover(1, None, done_at=5.0, ok=False)], None, False),
        ([sample(0)], [], StopResult(1, 2, 0, 0, ok=False, reason="cut off"), False),
    ],
)
def test_ok(samples: list[Sample], handovers: list[Handover], stop: StopResult | None, expected: bool) -> None:
    assert expected is build(samples, handovers, stop=stop).ok


times = st.floats(0, 100, allow_nan=False)
samples_of_any_kind = st.lists(
    st.builds(
        lambda started, length, outcome, generation: sample(started, started + length, outcome, generation),
        times,
        st.floats(0, 10, allow_nan=False),
        st.sampled_from(Outcome),
        st.none() | st.integers(1, 5),
    ),
    max_size=60,
)
any_handovers = st.lists(times, max_size=5).map(
    lambda ats: [handover(number, at) for number, at in enumerate(sorted(ats), 1)]
)


@given(samples_of_any_kind, any_handovers)
def test_counts_add_up(samples: list[Sample], handovers: list[Handover]) -> None:
    report = build(samples, handovers, stop=None)
    assert sum(report.outcomes.values()) == len(samples)
    no_requests = report.outcomes[Outcome.STALE] + report.outcomes[Outcome.UNSENT]
    assert report.requests == len(samples) - no_requests
    assert report.requests == report.outcomes[Outcome.OK] + report.lost == sum(report.generations.values())
    assert report.lost == len(report.losses) == sum(s.outcome.lost for s in samples)
    assert report.requests == report.latency["steady"].requests + report.latency["around"].requests
    around = [a.requests for a in report.handovers]
    assert max(around, default=0) <= report.latency["around"].requests <= sum(around)
    assert all(a.lost <= a.requests for a in report.handovers)


@given(samples_of_any_kind, any_handovers, st.none() | st.just(STOP))
def test_any_report_can_be_written(samples: list[Sample], handovers: list[Handover], stop: StopResult | None) -> None:
    report = build(samples, handovers, stop=stop)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report.to_json()
    assert text_report.text(report).startswith(text_report.verdict(report) + "\n")


def full_report() -> Report:
    samples = [sample(9.5, 9.6, generation=1), sample(10.1, 10.2, generation=2)]
    samples += [sample(10.1, 10.25, Outcome.RESET, detail="ECONNRESET"), sample(3, outcome=Outcome.STALE)]
    return build(samples, [handover(1, 10.0)], stop=STOP)


def test_json_keys() -> None:
    values = full_report().to_json()
    assert list(values) == [
        *("format", "ok", "requests", "lost", "early_answers", "outcomes", "generations", "latency_ms"),
        *("seconds_to_handover", "longest_stall", "handovers", "losses", "stop", "different", "differences"),
        *("excused", "scenarios", "phases", "generator", "interrupted"),
    ]
    assert (values["format"], values["ok"], values["requests"], values["lost"]) == (1, False, 3, 1)
    assert list(values["outcomes"]) == [outcome.value for outcome in Outcome]
    assert values["generations"] == {"1": 1, "2": 1, "unknown": 1}
    assert list(values["handovers"][0]) == [
        *(
            "number",
            "from_generation",
            "to_generation",
            "requested_at",
            "ready_at",
            "done_at",
            "ok",
            "reason",
        ),
        *("seconds", "requests", "lost", "generations", "early_answers", "longest_stall"),
    ]
    assert list(values["losses"][0]) == [
        *("client", "kind", "path", "connection_opened", "started", "ended", "outcome", "status"),
        *("generation", "detail", "length", "digest", "method", "at", "event", "offset", "where"),
    ]
    assert values["losses"][0]["outcome"] == "reset"


@pytest.mark.parametrize(
    ("ok", "lost", "upgrades", "stop", "expected"),
    [
        (12345, 0, 20, STOP, "0 of 12,345 requests lost in 20 upgrades and a stop"),
        (7, 3, 1, None, "3 of 10 requests LOST in 1 upgrade"),
        (1, 0, 0, STOP, "0 of 1 requests lost in a stop"),
        (1, 0, 0, None, "0 of 1 requests lost in 0 upgrades"),
    ],
)
def test_verdict(ok: int, lost: int, upgrades: int, stop: StopResult | None, expected: str) -> None:
    samples = [sample(0)] * ok + [sample(0, outcome=Outcome.RESET)] * lost
    handovers = [handover(number, 10.0 * number) for number in range(1, upgrades + 1)]
    assert expected == text_report.verdict(build(samples, handovers, stop=stop))


def test_text_names_what_went_wrong() -> None:
    handovers = [handover(1, None, done_at=5.0, ok=False), handover(2, 10.0)]
    samples = [sample(9.0, 9.5, generation=3), sample(10.0, 10.132, Outcome.RESET, detail="ECONNRESET")]
    samples.append(sample(1, outcome=Outcome.UNSENT))
    stop = StopResult(20, 21, None, 0, ok=False, reason="killed at the deadline")
    lines = text_report.text(build(samples, handovers, stop=stop)).splitlines()
    assert lines[1:5] == [
        "FAILED: handover 1: it never got ready",
        "TOO EARLY: handover 2: 1 answers of generation 3 before it was ready",
        "FAILED: the stop: killed at the deadline",
        "NOTE: 1 requests not sent for want of ports or descriptors on this machine",
    ]
    assert any("+0.132 s after handover 2" in line and "200 ECONNRESET" in line for line in lines)


def test_text_says_when_nothing_was_proven() -> None:
    assert text_report.text(build([], [], stop=None)).splitlines()[1] == "NOT PROVEN: no request was sent"


def test_text_shows_the_first_of_many_losses() -> None:
    report = build([sample(n, outcome=Outcome.REFUSED) for n in range(1000)], [], stop=None)
    assert "... and 960 more" in text_report.text(report)
