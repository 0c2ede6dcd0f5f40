"""Counting as the requests come gives what a look at all of them gives, in memory that does not grow with them."""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.cli.rehearse import report, tally, timeline
from zdd_web.cli.rehearse.latencies import Latencies
from zdd_web.cli.rehearse.samples import NEAR, Handover, Outcome, Sample
from zdd_web.cli.rehearse.tally import MOST_LOSSES, Tally
from zdd_web.cli.rehearse.timeline import Timeline


def sample(started: float, ended: float, outcome: Outcome = Outcome.OK, generation: int | None = 1) -> Sample:
    return Sample(0, "new", "/", started, started, ended, outcome, 200, generation)


def handover(number: int, at: float, ok: bool = True) -> Handover:
    return Handover(number, number, number + 1, at - 0.25, at if ok else None, at + (0.5 if ok else 0), ok)


def replay(samples: Sequence[Sample], handovers: Sequence[Handover]) -> Tally:
    """Tell a tally of everything when it happens, as a rehearsal does."""
    counted = Tally()
    events: list[tuple[float, int, object]] = [(each.ended, 1, each) for each in samples]
    for each in handovers:
        events += [(each.requested_at, 0, each.requested_at), (each.done_at, 2, each)]
    for _, _, event in sorted(events, key=lambda event: event[:2]):
        if isinstance(event, Sample):
            counted.append(event)
        elif isinstance(event, Handover):
            counted.handover(event)
        else:
            counted.expect(float(str(event)))
    return counted


times = st.integers(0, 4000).map(lambda n: n / 64)
samples_of_any_kind = st.lists(
    st.builds(
        lambda started, length, outcome, generation: sample(started, started + length, outcome, generation),
        times,
        st.integers(0, 200).map(lambda n: n / 64),
        st.sampled_from([Outcome.OK, Outcome.OK, Outcome.RESET, Outcome.SERVER_ERROR, Outcome.STALE]),
        st.none() | st.integers(1, 4),
    ),
    max_size=40,
)
handovers_one_after_the_other = st.lists(st.booleans(), max_size=6).map(
    lambda oks: [handover(n, 5.0 * n, ok) for n, ok in enumerate(oks, 1)]
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_BATCH", 3)


@given(samples_of_any_kind, handovers_one_after_the_other)
def test_what_is_counted_as_it_comes_is_what_is_there_in_the_end(
    samples: list[Sample], handovers: list[Handover]
) -> None:
    at_once = report.build(samples, handovers, stop=None).to_json()
    streamed = report.of(replay(samples, handovers), stop=None).to_json()
    for each in (at_once, streamed):
        # Of requests that ended at the same instant the first one counts as the first of a bucket or a list.
        each["losses"] = sorted(map(repr, each["losses"]))
        each["latency_ms"] = {name: (found["requests"], found["max"]) for name, found in each["latency_ms"].items()}
        # A reply before the second in which its generation was asked for is a different one here and there.
        each["differences"] = sorted(map(repr, each["differences"]))
    assert streamed == at_once


@given(samples_of_any_kind, handovers_one_after_the_other)
def test_what_is_counted_around_handovers_is_what_the_definitions_say(
    samples: list[Sample], handovers: list[Handover]
) -> None:
    found = report.of(replay(samples, handovers), stop=None)
    requests = [each for each in samples if each.outcome not in (Outcome.STALE, Outcome.UNSENT)]
    ends = sorted(each.ended for each in requests if each.outcome.answered)
    points = [min((s.started for s in requests), default=0), *ends, max((s.ended for s in requests), default=0)]
    gaps = list(pairwise(points)) if requests else []
    for around in found.handovers:
        at = around.handover.at
        near = [each for each in requests if each.started - NEAR <= at <= each.ended + NEAR]
        assert (around.requests, around.lost) == (len(near), sum(each.outcome.lost for each in near))
        stalls = [end - begin for begin, end in gaps if begin - NEAR <= at <= end + NEAR]
        assert around.longest_stall == max(stalls, default=0.0)
    steady = [r for r in requests if all(not r.started - NEAR <= h.at <= r.ended + NEAR for h in handovers)]
    assert found.latency["steady"].requests == len(steady)


def many(count: int, every: float) -> Iterator[Sample]:
    for n in range(count):
        yield sample(n * every, n * every + 0.004, generation=1 + int(n * every / 3))


def test_memory_does_not_grow_with_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 20)
    monkeypatch.setattr(tally, "_BATCH", 1024)
    counted = Tally()

    def feed(begin: int, end: int) -> None:
        for n in range(begin, end):
            at = n / 100
            if not n % 300 and n:
                counted.expect(at)
                counted.handover(Handover(n // 300, n // 300, n // 300 + 1, at, at + 0.1, at + 0.2, ok=True))
            counted.append(sample(at, at + 0.004, generation=1 + n // 300))

    feed(0, 15_000)
    tracemalloc.start()
    try:
        feed(15_000, 45_000)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # A hundred handovers, a thousand bytes or two for each, and not one of thirty thousand requests.
    assert grown < 400_000
    assert len(counted._ends) <= 1024 + 200
    assert report.of(counted, stop=None).requests == 45_000


def test_only_the_first_losses_are_kept_and_all_are_counted() -> None:
    counted = Tally()
    for n in range(MOST_LOSSES + 5):
        counted.append(sample(n / 1000, n / 1000, Outcome.REFUSED, None))
    found = report.of(counted, stop=None)
    assert (found.lost, len(found.losses)) == (MOST_LOSSES + 5, MOST_LOSSES)


def test_percentiles_are_measured_values_within_a_thousandth() -> None:
    latencies = Latencies()
    values = [math.exp(n / 500) for n in range(5000)]
    for value in values:
        latencies.add(value)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = report.percentile(values, share)
        found = latencies.percentile(share)
        assert exact is not None
        assert found in values
        assert found == pytest.approx(exact, rel=1e-3)
    assert latencies.max == values[-1]
    assert sys.getsizeof(latencies._counts) < 400_000


def test_a_timeline_has_a_bounded_number_of_slices_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 10)
    line = Timeline()
    for each in many(1000, 0.05):
        line.add(each)
    line.add(sample(50.0, 50.5, Outcome.RESET, None))
    assert len(line.slices) <= 10
    assert line.width == pytest.approx(6.4)
    assert sum(sum(each.answered.values()) for each in line.slices) == 1000
    assert [each.lost for each in line.slices if each.lost] == [1]
    half = line.slices[0].percentile(0.5)
    assert half is not None
    assert half == pytest.approx(4.0, rel=0.13)
