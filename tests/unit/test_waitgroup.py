"""Background work is counted from its offer to its end, whatever happens in between."""

from __future__ import annotations

import contextvars
import gc
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from tests.unit.forks import in_child
from tests.unit.threads import at_once
from zdd_web import waitgroup
from zdd_web.waitgroup import Entry, WaitGroup, all_entries

PATIENCE = 60

# The tests fork with the group's threads alive on purpose; a worker of gthread does, too.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def shut_down(group: WaitGroup) -> None:
    if group._executor is not None:
        group._executor.shutdown()


@pytest.fixture
def group() -> Iterator[WaitGroup]:
    group = WaitGroup("unit", threads=4)
    yield group
    shut_down(group)


@pytest.fixture
def lane() -> Iterator[WaitGroup]:
    """A group with one thread: what is offered second waits for what was offered first."""
    group = WaitGroup("lane", threads=1)
    yield group
    shut_down(group)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    monkeypatch.setattr(waitgroup, "observer", counts.append)
    return counts


def names(group: WaitGroup) -> list[str]:
    return [entry.name for entry in group.entries()]


# -- track, add, done


def test_track_counts_its_body(group: WaitGroup) -> None:
    with group.track("one") as entry, group.track():
        assert (len(group), names(group)) == (2, ["one", "tracked"])
        assert group.wait(timeout=0) is False
        assert (entry.group, entry.thread) == (group, threading.current_thread().name)
    assert (len(group), group.wait(timeout=0)) == (0, True)


def test_body_that_raises_leaves_nothing_in_hand(group: WaitGroup) -> None:
    with pytest.raises(ZeroDivisionError), group.track("breaks"):
        _ = 1 / 0
    assert group.entries() == []


def test_done_counts_once(group: WaitGroup) -> None:
    first, second = group.add("first"), group.add("second")
    first.done()
    first.done()
    assert names(group) == ["second"]
    second.done()
    assert group.wait(timeout=0)


def test_entries_are_listed_oldest_first_with_their_ages(group: WaitGroup) -> None:
    entries = [group.add(name) for name in "abc"]
    assert group.entries() == entries
    ages = [entry.age for entry in entries]
    assert ages == sorted(ages, reverse=True)
    assert ages[-1] >= 0
    for entry in entries:
        entry.done()


def test_entries_of_all_groups_are_found_oldest_first(group: WaitGroup, lane: WaitGroup) -> None:
    with group.track("a"), lane.track("b"), group.track("c"):
        assert [(entry.group.name, entry.name) for entry in all_entries()] == [
            ("unit", "a"),
            ("lane", "b"),
            ("unit", "c"),
        ]
    assert all_entries() == []


def test_empty_group_is_true(group: WaitGroup) -> None:
    assert bool(group) is True


def test_wait_returns_when_another_thread_is_done(group: WaitGroup) -> None:
    entry = group.add("elsewhere")
    waiting = threading.Event()
    threads = []

    class Listening(threading.Condition):
        """The group's own condition; tells when somebody has begun to wait on it."""

        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    group._changed = Listening()
    threads.append(threading.Thread(target=lambda: waiting.wait(PATIENCE) and entry.done()))
    threads[0].start()
    assert group.wait(PATIENCE) is True
    threads[0].join()


# -- go, task


def test_go_runs_elsewhere_and_returns_the_result(group: WaitGroup) -> None:
    def work(first: int, *, second: int) -> tuple[int, str]:
        return first + second, threading.current_thread().name

    total, thread = group.go(work, 1, second=2).result(PATIENCE)
    assert total == 3
    assert thread.startswith("zdd_web-unit")
    assert group.wait(PATIENCE)


def test_work_is_in_hand_from_its_offer_and_not_from_its_start(lane: WaitGroup) -> None:
    release = threading.Event()
    first = lane.go(release.wait, PATIENCE, name="first")
    second = lane.go(len, "queued", name="second")
    assert names(lane) == ["first", "second"]
    assert lane.wait(timeout=0) is False
    release.set()
    assert (first.result(PATIENCE), second.result(PATIENCE)) == (True, 6)
    assert lane.wait(PATIENCE)


def test_entry_says_which_thread_does_the_work(lane: WaitGroup) -> None:
    def work() -> tuple[str, str]:
        return lane.entries()[0].thread, threading.current_thread().name

    said, did = lane.go(work).result(PATIENCE)
    assert said == did


def test_go_names_the_work_after_its_function_unless_told(group: WaitGroup) -> None:
    release = threading.Event()

    class Callable_:
        def __call__(self) -> None:
            release.wait(PATIENCE)

        def __repr__(self) -> str:
            return "<callable>"

    def named() -> None:
        release.wait(PATIENCE)

    futures = [group.go(named), group.go(Callable_()), group.go(named, name="mine")]
    assert names(group) == [named.__qualname__, "<callable>", "mine"]
    release.set()
    for future in futures:
        future.result(PATIENCE)


def test_keyword_name_belongs_to_the_group_and_the_rest_to_the_function(group: WaitGroup) -> None:
    assert group.go(dict, name="label", function=1, self=2).result(PATIENCE) == {"function": 1, "self": 2}


def test_task_runs_in_the_background_and_keeps_its_function(group: WaitGroup) -> None:
    @group.task
    def rebuild(what: str) -> str:
        """Rebuild it."""
        return f"{what} in {threading.current_thread().name}"

    assert rebuild("index").result(PATIENCE).startswith("index in zdd_web-unit")
    assert rebuild.function("index") == f"index in {threading.current_thread().name}"
    assert (rebuild.__name__, rebuild.__doc__) == ("rebuild", "Rebuild it.")


def test_exception_is_logged_and_kept_in_the_future(group: WaitGroup, caplog: pytest.LogCaptureFixture) -> None:
    def breaks() -> None:
        raise ValueError("no such order")

    with caplog.at_level(logging.INFO, logger="zdd_web"):
        future = group.go(breaks, name="send-receipt")
        error = future.exception(PATIENCE)
    assert group.wait(PATIENCE)
    assert repr(error) == "ValueError('no such order')"
    (record,) = caplog.records
    assert record.getMessage() == (
        'event=background.failed group=unit name=send-receipt error="ValueError: no such order"'
    )
    assert (record.levelno, record.exc_info and record.exc_info[1]) == (logging.ERROR, error)


def test_context_variables_are_carried_over_and_not_back(group: WaitGroup) -> None:
    tenant = contextvars.ContextVar("tenant", default="nobody")

    def work() -> str:
        seen = tenant.get()
        tenant.set("changed in the background")
        return seen

    tenant.set("shop 7")
    assert group.go(work).result(PATIENCE) == "shop 7"
    assert tenant.get() == "shop 7"


def test_future_cancelled_before_it_ran_is_not_in_hand_any_more(lane: WaitGroup) -> None:
    release = threading.Event()
    first = lane.go(release.wait, PATIENCE, name="first")
    second = lane.go(len, "never", name="second")
    assert second.cancel() is True
    assert names(lane) == ["first"]
    release.set()
    assert first.result(PATIENCE)
    assert lane.wait(PATIENCE)
    with pytest.raises(CancelledError):
        second.result(PATIENCE)


def test_work_that_cannot_be_offered_is_not_in_hand(lane: WaitGroup) -> None:
    lane.go(len, "first").result(PATIENCE)
    shut_down(lane)
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        lane.go(len, "second")
    assert lane.wait(PATIENCE)


def test_thousand_tasks_are_all_accounted_for(group: WaitGroup, counts: list[int]) -> None:
    done: list[int] = []
    futures = [group.go(done.append, number) for number in range(1_000)]
    assert group.wait(PATIENCE)
    assert sorted(done) == list(range(1_000))
    assert all(future.done() or future.running() for future in futures)
    assert (len(group), group.entries(), counts[-1]) == (0, [], 0)
    assert max(counts) <= 1_000


# -- the observer


def test_observer_hears_every_change_over_all_groups(group: WaitGroup, lane: WaitGroup, counts: list[int]) -> None:
    with group.track(), lane.track():
        pass
    entry = group.add("once")
    entry.done()
    entry.done()
    assert counts == [1, 2, 1, 0, 1, 0]


def test_observer_ends_at_zero_whatever_twenty_threads_do(group: WaitGroup, counts: list[int]) -> None:
    def work() -> None:
        for _ in range(50):
            with group.track():
                pass

    at_once(20, work)
    assert counts[-1] == 0
    assert set(counts) <= set(range(21))


def test_group_that_is_made_while_others_are_counted_does_no_harm(
    group: WaitGroup, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[WaitGroup] = []

    class Busy(weakref.WeakSet[WaitGroup]):
        """A set that somebody adds to in the middle of an iteration, as another thread may."""

        def __iter__(self) -> Iterator[WaitGroup]:
            for each in super().__iter__():
                if not made:
                    made.append(WaitGroup("meanwhile"))
                yield each

    monkeypatch.setattr(waitgroup, "_groups", Busy([group]))
    with group.track():
        assert counts == [1]
    assert len(made) == 1
    assert counts == [1, 0]


def test_work_that_the_garbage_collector_ends_within_the_observer_is_counted() -> None:
    def collect_while_observed() -> object:
        group = WaitGroup("collected")
        counts: list[int] = []

        def stream() -> Iterator[None]:
            with group.track("stream"):
                yield

        def observe(count: int) -> None:
            if len(counts) == 1:
                gc.collect()
            counts.append(count)

        waitgroup.observer = observe
        abandoned: list[Any] = [stream()]
        abandoned.append(abandoned)
        next(abandoned[0])
        del abandoned
        entry = group.add("next")
        return names(entry.group), counts[0], counts[-1]

    # In a child with an alarm: a failure may be a deadlock.
    assert in_child(collect_while_observed) == [["next"], 1, 1]


def test_count_that_was_overtaken_is_told_again(group: WaitGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    slot: list[int] = [0]
    overtaken, go_on = threading.Event(), threading.Event()

    def store(count: int) -> None:
        if threading.current_thread() is slow and not overtaken.is_set():
            overtaken.set()
            go_on.wait(PATIENCE)
        slot[0] = count

    slow = threading.Thread(target=lambda: group.add("slow"))
    monkeypatch.setattr(waitgroup, "observer", store)
    slow.start()
    assert overtaken.wait(PATIENCE)
    quick = threading.Thread(target=lambda: group.add("quick"))
    quick.start()
    quick.join()
    assert slot == [2]
    go_on.set()
    slow.join()
    assert slot == [2]
    for entry in group.entries():
        entry.done()


# -- forks


def test_child_of_a_fork_has_an_empty_group_that_works(group: WaitGroup) -> None:
    release, held = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with group._changed:
            held.set()
            release.wait(PATIENCE)

    busy = group.go(release.wait, PATIENCE)
    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    assert held.wait(PATIENCE)

    def child() -> list[object]:
        signal.alarm(10)  # the failure is a lock that nobody will ever release
        found: list[object] = [len(group), group.wait(timeout=0)]
        with group.track("own"):
            found.append(names(group))
        found.append(group.go(len, "four").result())
        found.append(group.wait())
        return found

    try:
        assert in_child(child) == [0, True, ["own"], 4, True]
    finally:
        release.set()
        holder.join()
        busy.result(PATIENCE)
    assert group.wait(PATIENCE)


def test_work_of_the_parent_does_not_end_work_of_the_child() -> None:
    group = WaitGroup("fresh")

    def child(parents: Entry) -> Callable[[], object]:
        def act() -> object:
            own = group.add("own")
            parents.done()
            return own.number == parents.number, names(group)

        return act

    with group.track("before the fork") as entry:
        assert in_child(child(entry)) == [True, ["own"]]
    assert len(group) == 0


def test_child_of_a_worker_does_not_write_into_the_workers_slot(group: WaitGroup, counts: list[int]) -> None:
    def child() -> object:
        with group.track():
            return counts, waitgroup.observer is None

    with group.track():
        assert in_child(child) == [[1], True]
    assert counts == [1, 0]


def test_method_may_be_a_task() -> None:
    group = WaitGroup("methods")

    class Shop:
        name = "shop"

        @group.task
        def greet(self, who: str) -> str:
            return f"{self.name} greets {who}"

    assert Shop().greet("you").result() == "shop greets you"
    assert group.wait(timeout=10)
