"""Background work is counted from its offer to its end, whatever happens in between."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import itertools
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.forks import in_child
from tests.helpers.threads import at_once
from zdd_web import waitgroup
from zdd_web.errors import GroupClosed
from zdd_web.waitgroup import (
    Entry,
    WaitGroup,
    abandon,
    all_entries,
    all_groups,
    close_all,
    current_request,
    drained_hooks,
    on_drained,
    run_drained_hooks,
)
from zdd_web.waitgroup.threads import Threads, name_of

PATIENCE = 60

# The tests fork with the group's threads alive on purpose; a worker of gthread does, too.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def shut_down(group: WaitGroup) -> None:
    for pool in group._threads._pools.values():
        pool.shutdown()


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
    monkeypatch.setattr(all_groups, "observer", counts.append)
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

    class NoticedCondition(threading.Condition):
        """The group's own condition; tells when somebody has begun to wait on it."""

        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    group._changed = NoticedCondition()
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

    monkeypatch.setattr(all_groups, "_groups", Busy([group]))
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

        all_groups.observer = observe
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
    monkeypatch.setattr(all_groups, "observer", store)
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


def test_locks_are_renewed_and_what_is_in_hand_stays(group: WaitGroup) -> None:
    def child() -> list[object]:
        signal.alarm(10)  # the failure is a lock that nobody will ever release
        with group.track("own"):
            lock = group._changed
            waitgroup.renew_locks()
            return [group._changed is not lock, names(group)]

    assert in_child(child) == [True, ["own"]]


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
            return counts, all_groups.observer is None

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


# -- who does it, for whom, and where that stands


class Held:
    """Work that says when it has begun, and goes on until it is let go."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.stands_here()

    def stands_here(self) -> None:
        self.begun.set()
        self.released.wait(PATIENCE)


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.released.set()


def test_stack_is_that_of_the_thread_that_does_the_work(lane: WaitGroup, held: Held) -> None:
    lane.go(held)
    queued = lane.go(len, "queued")
    assert held.begun.wait(PATIENCE)
    first, second = lane.entries()
    assert ("stands_here" in first.stack(), first.stack().splitlines()[0].startswith('  File "')) == (True, True)
    assert first.thread_id in {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    # What waits for a thread has none.
    assert (second.thread, second.thread_id, second.stack()) == ("", 0, "")
    held.released.set()
    assert queued.result(PATIENCE) == 6
    assert lane.wait(PATIENCE)
    # A thread that does something else by now is none of its.
    assert (first.stack(), second.stack()) == ("", "")


def test_tracked_body_is_found_in_its_own_thread(group: WaitGroup) -> None:
    with group.track() as entry:
        assert entry.thread_id == threading.get_ident()
        assert "test_tracked_body_is_found_in_its_own_thread" in entry.stack()


def test_entry_of_a_thread_that_has_ended_has_no_stack(group: WaitGroup) -> None:
    thread = threading.Thread(target=group.add, args=("left alone",))
    thread.start()
    thread.join()
    (entry,) = group.entries()
    assert (entry.in_hand, entry.stack()) == (True, "")
    entry.done()
    assert entry.in_hand is False


@types.coroutine
def old_style(gate: asyncio.Event) -> Iterator[Any]:
    yield from gate.wait()  # type: ignore[misc]


def test_stack_of_a_task_goes_down_to_what_it_waits_for(group: WaitGroup) -> None:
    async def waits(gate: asyncio.Event) -> None:
        await innermost(gate)

    async def innermost(gate: asyncio.Event) -> None:
        await old_style(gate)

    async def main() -> tuple[str, str, str]:
        gate = asyncio.Event()
        task = group.create_task(waits(gate))
        (entry,) = group.entries()
        fresh = entry.stack()
        await asyncio.sleep(0)
        waiting = entry.stack()
        gate.set()
        await task
        return fresh, waiting, entry.stack()

    fresh, waiting, over = asyncio.run(main())
    assert ("in waits" in fresh, "in innermost" in fresh) == (True, False)
    places = [waiting.find(f"in {name}\n") for name in ("waits", "innermost", "old_style", "wait")]
    assert places == sorted(places)
    assert places[0] > 0
    assert over == ""


def test_stack_of_a_task_that_blocks_its_loop_is_that_of_the_thread(group: WaitGroup, held: Held) -> None:
    async def blocks() -> None:
        held.stands_here()

    async def main() -> None:
        await group.create_task(blocks())

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert held.begun.wait(PATIENCE)
    (entry,) = group.entries()
    assert "in stands_here" in entry.stack()
    held.released.set()
    thread.join()


def test_body_that_is_tracked_within_a_coroutine_is_found_by_its_task(group: WaitGroup) -> None:
    async def tracks(gate: asyncio.Event) -> None:
        with group.track():
            await gate.wait()

    async def main() -> str:
        gate = asyncio.Event()
        task = asyncio.get_running_loop().create_task(tracks(gate))
        await asyncio.sleep(0)
        (entry,) = group.entries()
        stack = entry.stack()
        gate.set()
        await task
        return stack

    assert "in tracks" in asyncio.run(main())


@pytest.mark.parametrize("suspended", [True, False])
def test_stack_of_a_greenlet_is_its_own_while_another_runs(
    group: WaitGroup, monkeypatch: pytest.MonkeyPatch, suspended: bool
) -> None:
    def elsewhere() -> Iterator[types.FrameType]:
        yield sys._getframe()

    generator = elsewhere()
    frame = next(generator)
    greenlet = types.SimpleNamespace(gr_frame=frame if suspended else None)
    monkeypatch.setitem(sys.modules, "greenlet", types.SimpleNamespace(getcurrent=lambda: greenlet))
    with group.track() as entry:
        assert ("in elsewhere\n" in entry.stack()) is suspended
        assert ("in test_stack_of_a_greenlet_is" in entry.stack()) is not suspended


def test_entry_names_the_request_that_it_was_offered_in(group: WaitGroup, caplog: pytest.LogCaptureFixture) -> None:
    def nested() -> str:
        with group.track() as entry:
            return entry.request

    def breaks() -> None:
        raise ValueError("no such order")

    assert current_request.get() == ""
    token = current_request.set("POST /orders")
    try:
        assert group.go(nested).result(PATIENCE) == "POST /orders"
        with group.track() as entry:
            current_request.set("GET /next")
            assert entry.request == "POST /orders"
        assert group.go(breaks, name="receipt").exception(PATIENCE)
    finally:
        current_request.reset(token)
    assert caplog.messages == [
        'event=background.failed group=unit name=receipt request="GET /next" error="ValueError: no such order"'
    ]


def test_partial_is_named_after_its_function(group: WaitGroup) -> None:
    with pytest.raises(ValueError, match="hush"):
        group.go(functools.partial(functools.partial(int, base=10), "hush")).result(PATIENCE)
    assert name_of(functools.partial(functools.partial(int, base=10), "hush")) == "int"


def test_failures_are_counted(group: WaitGroup) -> None:
    def breaks() -> None:
        raise ValueError

    def leaves() -> None:
        raise SystemExit(1)

    async def fails() -> None:
        raise ValueError

    async def main() -> None:
        with pytest.raises(ValueError):
            await group.create_task(fails())

    concurrent.futures.wait([group.go(work) for work in (breaks, len, leaves, breaks, int)], PATIENCE)
    asyncio.run(main())
    with group.executor(1) as executor:
        executor.submit(breaks)
    assert group.wait(PATIENCE)
    assert group.failed == 6  # with len(), which wants an argument
    assert in_child(lambda: group.failed) == 0


def test_finished_work_is_freed_without_the_garbage_collector(
    group: WaitGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under Python 3.10 Django's own closing makes a circle that holds the frames of its callers.
    monkeypatch.delitem(sys.modules, "django.db", raising=False)

    class Result:
        pass

    freed = threading.Event()

    def work() -> Result:
        result = Result()
        weakref.finalize(result, freed.set)
        return result

    gc.collect()
    gc.disable()
    try:
        future = group.go(work)
        future.result(PATIENCE)
        assert not freed.is_set()
        del future
        assert freed.wait(PATIENCE)
    finally:
        gc.enable()


# -- asyncio


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of failures; anything else must be about work that was given up."""
    given_up = ("background.deadline", "background.handed_back", "background.abandoned", "background.abandoned_by_name")
    messages = [record.getMessage() for record in caplog.records if vars(record)["zdd_event"] not in given_up]
    assert [message for message in messages if not message.startswith("event=background.failed ")] == []
    return [message.removeprefix("event=background.failed ") for message in messages]


def lines_of(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """Return the fields of each line of an event."""
    found = [vars(record) for record in caplog.records if vars(record).get("zdd_event") == event]
    return [{key[4:]: value for key, value in fields.items() if key.startswith("zdd_")} for fields in found]


def test_task_is_in_hand_until_it_is_done(group: WaitGroup) -> None:
    async def greet(gate: asyncio.Event) -> str:
        await gate.wait()
        return current_request.get()

    async def main() -> list[object]:
        gate = asyncio.Event()
        token = current_request.set("GET /ws")
        task = group.create_task(greet(gate))
        named = group.create_task(greet(gate), name="mine")
        current_request.reset(token)
        await asyncio.sleep(0)
        assert names(group) == [greet.__qualname__, "mine"]
        assert [entry.request for entry in group.entries()] == ["GET /ws"] * 2
        assert named.get_name() == "mine"
        gate.set()
        found: list[object] = [await task, await named]
        await asyncio.sleep(0)
        return [*found, names(group)]

    assert asyncio.run(main()) == ["GET /ws", "GET /ws", []]


def test_group_keeps_a_task_that_nobody_else_does(group: WaitGroup) -> None:
    finished: list[str] = []

    async def work(gate: asyncio.Event) -> None:
        await gate.wait()
        finished.append("work")

    async def main() -> None:
        gate = asyncio.Event()
        seen = weakref.ref(group.create_task(work(gate)))
        await asyncio.sleep(0)
        gc.collect()
        assert seen() is not None
        gate.set()
        while group.entries():
            await asyncio.sleep(0)

    asyncio.run(main())
    assert finished == ["work"]


def test_exception_in_a_task_is_logged_once_and_kept(group: WaitGroup, caplog: pytest.LogCaptureFixture) -> None:
    async def breaks() -> None:
        raise ValueError("no such order")

    async def main() -> BaseException | None:
        kept = group.create_task(breaks(), name="kept")
        group.create_task(breaks(), name="dropped")
        while group.entries():
            await asyncio.sleep(0)
        gc.collect()
        return kept.exception()

    assert repr(asyncio.run(main())) == "ValueError('no such order')"
    # ... and no "Task exception was never retrieved".
    assert failures(caplog) == [
        f'group=unit name={name} error="ValueError: no such order"' for name in ("kept", "dropped")
    ]


@pytest.mark.parametrize("begun", [True, False])
def test_cancelled_task_is_done_and_no_failure(group: WaitGroup, caplog: pytest.LogCaptureFixture, begun: bool) -> None:
    async def main() -> None:
        task = group.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        if begun:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (len(group), group.failed, caplog.messages) == (0, 0, [])


def test_loop_that_ends_before_its_tasks_leaves_nothing_in_hand(group: WaitGroup) -> None:
    async def main() -> None:
        group.create_task(asyncio.sleep(PATIENCE))

    asyncio.run(main())
    assert group.wait(timeout=0)


def test_loop_that_is_left_with_its_tasks_is_reported(group: WaitGroup) -> None:
    async def stuck(gate: asyncio.Event) -> None:
        await gate.wait()

    loop = asyncio.new_event_loop()

    async def main() -> asyncio.Event:
        gate = asyncio.Event()
        group.create_task(stuck(gate))
        await asyncio.sleep(0)
        return gate

    gate = loop.run_until_complete(main())
    ((entry, stack),) = abandon(group.entries(), timeout=0)
    assert (entry.name, "in stuck" in stack) == (stuck.__qualname__, True)
    gate.set()
    assert entry.task is not None
    loop.run_until_complete(entry.task)
    loop.close()
    assert group.entries() == []


def test_create_task_outside_a_loop_says_so(group: WaitGroup) -> None:
    # With warnings as errors: the coroutine is not left behind either.
    with pytest.raises(RuntimeError, match=r"create_task\(\) of 'sleep' outside a running event loop: call it in one"):
        group.create_task(asyncio.sleep(0))
    gc.collect()
    assert group.entries() == []


def test_create_task_that_the_loop_refuses_is_not_in_hand(group: WaitGroup) -> None:
    async def main() -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise MemoryError

        coro = asyncio.sleep(0)
        asyncio.get_running_loop().set_task_factory(refuse)
        with pytest.raises(MemoryError):
            group.create_task(coro)
        asyncio.get_running_loop().set_task_factory(None)
        coro.close()

    asyncio.run(main())
    assert group.entries() == []


async def a_coroutine() -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        (lambda group: group.create_task(a_coroutine), r"not <function a_coroutine at .*>: call the async function"),
        (lambda group: group.go(a_coroutine), r"a_coroutine is an async function.* give its coroutine to create_task"),
        (lambda group: group.go(functools.partial(a_coroutine)), r"a_coroutine is an async function"),
        (lambda group: group.task(a_coroutine), r"a_coroutine is an async function"),
        (lambda group: group.executor().submit(a_coroutine), r"a_coroutine is an async function"),
        (lambda group: on_drained(a_coroutine), r"a_coroutine is an async function.* wrap it: on_drained\(lambda"),
    ],
)
def test_async_function_is_refused_where_nobody_would_await_it(
    group: WaitGroup, offer: Callable[[WaitGroup], object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        offer(group)
    assert group.entries() == []


# -- the executor


def test_executor_is_one_of_concurrent_futures_and_its_calls_are_in_hand(group: WaitGroup, held: Held) -> None:
    with group.executor(max_workers=1) as executor:
        assert isinstance(executor, concurrent.futures.Executor)
        first, second = executor.submit(held), executor.submit(divmod, 7, 2)
        assert held.begun.wait(PATIENCE)
        assert [entry.args for entry in group.entries()] == [(), (7, 2)]
        assert group.entries()[0].thread.startswith("zdd_web-unit-executor")
        held.released.set()
        assert (first.result(PATIENCE), second.result(PATIENCE)) == (None, (3, 1))
        assert list(concurrent.futures.as_completed([first, second], PATIENCE))
    assert group.wait(timeout=0)


def test_executor_maps_in_order_and_carries_the_context(group: WaitGroup) -> None:
    token = current_request.set("GET /map")
    try:
        with group.executor(3) as executor:
            assert list(executor.map(lambda number: (number, current_request.get()), range(20))) == [
                (number, "GET /map") for number in range(20)
            ]
            with pytest.raises(ZeroDivisionError):
                list(executor.map(divmod, [1], [0]))
    finally:
        current_request.reset(token)
    assert group.failed == 1


def test_executor_that_is_shut_down_takes_no_more(group: WaitGroup) -> None:
    group.after_close = "run_inline"
    executor = group.executor(2)
    executor.shutdown()
    executor.shutdown()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(len, "late")
        group.close()  # ... whatever the group would do with it
    assert group.entries() == []


def test_executor_shut_down_with_what_waits_cancels_it(group: WaitGroup, held: Held) -> None:
    executor = group.executor(1)
    first, second = executor.submit(held), executor.submit(len, "queued")
    assert held.begun.wait(PATIENCE)
    executor.shutdown(wait=False, cancel_futures=True)
    assert (first.cancelled(), second.cancelled(), len(group)) == (False, True, 1)
    held.released.set()
    executor.shutdown()
    assert group.wait(timeout=0)


def test_executor_of_the_parent_works_in_the_child(group: WaitGroup) -> None:
    used, unused, shut = group.executor(1), group.executor(1), group.executor(1)
    shut.shutdown()
    assert used.submit(len, "abc").result(PATIENCE) == 3

    def child() -> list[object]:
        signal.alarm(10)  # the failure is a queue that no thread reads
        found: list[object] = [executor.submit(len, "four").result() for executor in (used, unused)]
        with pytest.raises(RuntimeError):
            shut.submit(len, "four")
        return [*found, group.wait()]

    assert in_child(child) == [4, 4, True]
    used.shutdown()


def test_executor_has_as_many_threads_as_its_group_unless_told(group: WaitGroup, lane: WaitGroup) -> None:
    assert [each._threads._count for each in (group.executor(), lane.executor(), lane.executor(7))] == [4, 1, 7]


@pytest.mark.parametrize("count", [0, -1])
def test_pool_without_threads_is_refused(group: WaitGroup, count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} threads for 'zdd_web-none': give 1 or more"):
        WaitGroup("none", threads=count)
    with pytest.raises(ValueError, match=rf"{count} threads for 'zdd_web-unit-executor': give 1 or more"):
        group.executor(count)


def test_pool_is_one_whoever_comes_first() -> None:
    threads, pools = Threads(1, "race"), []
    at_once(20, lambda: pools.append(threads.pool()))
    assert len(set(map(id, pools))) == 1


# -- after the close

OFFERS: dict[str, Callable[[WaitGroup], Any]] = {
    "add": lambda group: group.add("work"),
    "track": lambda group: group.track("work").__enter__(),
    "go": lambda group: group.go(len, "four", name="work"),
    "task": lambda group: group.task(len)("four"),
    "executor": lambda group: group.executor(1).submit(len, "four"),
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_closed_group_rejects(group: WaitGroup, counts: list[int], offer: Callable[[WaitGroup], Any]) -> None:
    group.close()
    group.close()
    with pytest.raises(
        GroupClosed,
        match=r"^'(work|len)' came too late for the group 'unit': this process is about to end\. "
        r'Do it without the group, put it on a queue, or make the group with after_close="run_inline"$',
    ):
        offer(group)
    assert (group.entries(), counts) == ([], [])


def test_closed_group_rejects_tasks_and_leaves_no_coroutine_behind(group: WaitGroup) -> None:
    async def main() -> None:
        with pytest.raises(GroupClosed, match="'sleep' came too late for the group 'unit'"):
            group.create_task(asyncio.sleep(0))
        gc.collect()

    group.close()
    asyncio.run(main())


def test_what_was_in_hand_at_the_close_goes_on(lane: WaitGroup, held: Held) -> None:
    first, second = lane.go(held), lane.go(len, "queued")
    assert held.begun.wait(PATIENCE)
    lane.close()
    held.released.set()
    assert (first.result(PATIENCE), second.result(PATIENCE)) == (None, 6)


@pytest.fixture
def inline() -> WaitGroup:
    group = WaitGroup("inline", after_close="run_inline")
    group.close()
    return group


def test_closed_group_runs_inline(inline: WaitGroup) -> None:
    tenant = contextvars.ContextVar("tenant", default="nobody")

    def work(number: int) -> tuple[int, int, list[str]]:
        tenant.set("changed by the work")
        return number, threading.get_ident(), names(inline)

    def task(number: int) -> object:
        return inline.task(work)(number)

    for offer in (functools.partial(inline.go, work), task, functools.partial(inline.executor(1).submit, work)):
        future: Any = offer(7)
        assert (future.done(), future.result(0)) == (True, (7, threading.get_ident(), [work.__qualname__]))
        assert inline.entries() == []
    assert tenant.get() == "nobody"


def test_work_that_breaks_inline_is_logged_and_kept(inline: WaitGroup, caplog: pytest.LogCaptureFixture) -> None:
    future: Future[int] = inline.go(int, "seven")
    assert isinstance(future.exception(0), ValueError)
    assert (len(inline), inline.failed, len(failures(caplog))) == (0, 1, 1)


def test_signal_that_ends_the_process_is_not_kept_in_a_future(inline: WaitGroup) -> None:
    with pytest.raises(SystemExit):
        inline.go(sys.exit, 3)
    assert inline.entries() == []


def test_closed_group_that_does_not_reject_counts_what_it_cannot_run(inline: WaitGroup) -> None:
    async def main() -> None:
        task = inline.create_task(asyncio.sleep(0), name="task")
        assert names(inline) == ["added", "tracked", "task"]
        await task

    entry = inline.add("added")
    with inline.track():
        asyncio.run(main())
    entry.done()
    assert inline.wait(timeout=0)


def test_all_groups_are_closed_and_a_fork_opens_them(group: WaitGroup, lane: WaitGroup) -> None:
    def child() -> list[bool]:
        close_all()
        return [group.closed, lane.closed, waitgroup.background.closed, in_child(lambda: group.closed)]

    assert in_child(child) == [True, True, True, False]
    assert (group.closed, lane.closed) == (False, False)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match='after_close=\'inline\': write "reject" or "run_inline"'):
        WaitGroup(after_close="inline")  # type: ignore[arg-type]


@given(st.data())
def test_group_has_what_was_added_and_not_done(data: st.DataObject) -> None:
    group = WaitGroup("model", after_close=data.draw(st.sampled_from(["reject", "run_inline"])))
    ever: list[Entry] = []
    in_hand: list[Entry] = []
    for step in data.draw(st.lists(st.sampled_from(["add", "done", "break", "close", "wait"]), max_size=30)):
        rejects = group.closed and group.after_close == "reject"
        if step == "add" and not rejects:
            ever.append(group.add("work"))
            in_hand.append(ever[-1])
        elif step == "done" and ever:
            entry = data.draw(st.sampled_from(ever))
            entry.done()
            in_hand = [each for each in in_hand if each is not entry]
        elif step == "close":
            group.close()
        elif step in ("add", "break"):
            with pytest.raises(GroupClosed if rejects else KeyError), group.track():
                raise KeyError
        assert (group.entries(), len(group), group.wait(timeout=0)) == (in_hand, len(in_hand), not in_hand)
        assert [entry for entry in ever if entry.in_hand] == in_hand


# -- what is not finished


def test_what_is_still_in_hand_is_reported_with_its_stack(lane: WaitGroup, held: Held) -> None:
    lane.go(held, name="held")
    lane.go(len, "x", name="queued")
    assert held.begun.wait(PATIENCE)
    over, left = lane.add("over"), lane.add("left")
    entries = lane.entries()
    over.done()
    reported = abandon(entries, timeout=PATIENCE)
    assert [(entry.name, "stands_here" in stack) for entry, stack in reported] == [
        ("held", True),
        ("queued", False),
        ("left", False),
    ]
    # Neither a thread that it does not have nor the caller's own.
    assert [stack for _, stack in reported[1:]] == ["", ""]
    left.done()


def test_what_waits_for_a_thread_is_cancelled_lest_it_be_done_twice(lane: WaitGroup, held: Held) -> None:
    begun: list[str] = []
    again: list[tuple[object, ...]] = []
    running = lane.go(held)
    queued = lane.go(begun.append, "queued", on_abandon=lambda entry: again.append((entry.args, entry.kwargs)))
    assert held.begun.wait(PATIENCE)
    assert len(abandon(lane.entries(), timeout=PATIENCE)) == 2
    assert queued.cancelled()
    held.released.set()
    running.result(PATIENCE)
    assert lane.go(len, "next").result(PATIENCE) == 4
    assert (begun, again) == ([], [(("queued",), {})])


def test_on_abandon_is_called_for_each_way_of_offering(group: WaitGroup, held: Held) -> None:
    called: list[str] = []
    threads: set[str] = set()

    def note(entry: Entry) -> None:
        called.append(entry.name)
        threads.add(threading.current_thread().name)
        assert threading.current_thread().daemon

    @group.task(on_abandon=note)
    def task() -> None:
        held()

    async def main() -> None:
        group.create_task(asyncio.sleep(PATIENCE), name="create_task", on_abandon=note)
        with group.track("track", on_abandon=note):
            group.go(held, name="go", on_abandon=note)
            task()
            entry = group.add("add", on_abandon=note)
            quiet = group.add("quiet")
            assert len(abandon(group.entries(), timeout=PATIENCE)) == 6
            entry.done()
            quiet.done()

    asyncio.run(main())
    assert sorted(called) == sorted(["create_task", "track", "go", task.__qualname__, "add"])
    assert threads == {"zdd_web-apart"}


def test_on_abandon_that_breaks_or_hangs_is_logged_and_holds_nobody(
    group: WaitGroup, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(entry: Entry) -> None:
        raise ConnectionError("no broker")

    beats: list[float] = []
    entries = [group.add("breaks", on_abandon=breaks)]
    entries += [group.add("hangs", on_abandon=lambda entry: held()) for _ in range(40)]
    began = time.monotonic()
    # Long enough on a busy machine for those that give way to be noticed.
    assert len(abandon(entries, timeout=3.0, beat=lambda: beats.append(time.monotonic()))) == 41
    # One deadline for all: one after the other they would take 40 seconds.
    assert time.monotonic() - began < 30
    assert beats
    for entry in entries:
        entry.done()
    breaking, *hanging = failures(caplog)
    assert breaking == 'group=unit name=breaks hook=on_abandon error="ConnectionError: no broker"'
    (outcome,) = lines_of(caplog, "background.handed_back")
    assert outcome["on_abandon"] == 41 and outcome["returned"] == 0 and outcome["failed"] == 1
    # Each is accounted for, and those that hang have not kept all the others from being called.
    assert len(hanging) == outcome["running"] > waitgroup.ABANDONED_AT_ONCE
    assert outcome["running"] + outcome["not_run"] == 40
    assert {message.rpartition(" after ")[0] for message in hanging} == {
        'group=unit name=hangs hook=on_abandon error="TimeoutError: still running'
    }


def test_on_abandon_for_which_there_is_no_thread_is_logged(
    group: WaitGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    entries = [group.add("poor", on_abandon=print) for _ in range(40)]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert len(abandon(entries, timeout=PATIENCE)) == 40
    assert failures(caplog) == ['hook=on_abandon error="RuntimeError: can\'t start new thread"']
    (outcome,) = lines_of(caplog, "background.handed_back")
    assert (outcome["on_abandon"], outcome["not_run"]) == (40, 40)
    for entry in entries:
        entry.done()


def test_on_abandon_does_not_come_all_at_once(group: WaitGroup) -> None:
    # A thousand connections are more than a database has.
    running, most, lock = [0], [0], threading.Lock()

    def requeue(entry: Entry) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        with lock:
            running[0] -= 1

    entries = [group.add("work", on_abandon=requeue) for _ in range(300)]
    abandon(entries, timeout=PATIENCE)
    assert running == [0]
    assert 0 < most[0] <= waitgroup.ABANDONED_AT_ONCE
    for entry in entries:
        entry.done()


def test_the_number_of_tasks_comes_before_anything_of_the_apps(group: WaitGroup) -> None:
    steps: list[object] = []
    entries = [group.add("work", on_abandon=lambda entry: steps.append("called")) for _ in range(3)]
    over = group.add("over")
    over.done()
    abandon([*entries, over], timeout=PATIENCE, counted=steps.append)
    assert steps == [3, "called", "called", "called"]
    for entry in entries:
        entry.done()


def test_beyond_a_number_tasks_are_logged_by_name(group: WaitGroup, caplog: pytest.LogCaptureFixture) -> None:
    entries = [group.add(f"name-{number % 40}") for number in range(2_000)]
    assert len(abandon(entries, timeout=PATIENCE)) == 2_000
    (deadline,) = lines_of(caplog, "background.deadline")
    assert deadline["tasks"] == 2_000
    oldest = [line["name"] for line in lines_of(caplog, "background.abandoned")]
    assert oldest == [entry.name for entry in entries[:100]]
    *by_name, rest = lines_of(caplog, "background.abandoned_by_name")
    assert len(by_name) == 20 and rest["names"] == 20
    assert len(oldest) + sum(line["tasks"] for line in [*by_name, rest]) == 2_000
    for entry in entries:
        entry.done()


def test_names_take_no_more_than_their_time(
    group: WaitGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [group.add("work") for _ in range(60)]
    now = time.monotonic()
    # Each look at the clock takes a second: a log that is slow.
    monkeypatch.setattr(time, "monotonic", itertools.count(now).__next__)
    abandon(entries, timeout=20)
    monkeypatch.undo()
    named = len(lines_of(caplog, "background.abandoned"))
    (rest,) = lines_of(caplog, "background.abandoned_by_name")
    assert 10 <= named < 60
    assert named + rest["tasks"] == 60
    for entry in entries:
        entry.done()


def test_each_on_abandon_is_called_or_counted_as_not_run(group: WaitGroup, caplog: pytest.LogCaptureFixture) -> None:
    called: list[int] = []

    def slow(entry: Entry) -> None:
        called.append(entry.number)
        time.sleep(0.02)

    entries = [group.add("work", on_abandon=slow) for _ in range(2_000)]
    abandon(entries, timeout=0.2)
    (outcome,) = lines_of(caplog, "background.handed_back")
    assert outcome["on_abandon"] == 2_000
    assert outcome["returned"] + outcome["running"] == len(called)
    assert len(called) + outcome["not_run"] == 2_000
    assert outcome["not_run"] > 0
    for entry in entries:
        entry.done()


def test_what_was_given_up_is_not_begun_while_it_is_handed_back(lane: WaitGroup, held: Held) -> None:
    begun: list[str] = []

    def release(entry: Entry) -> None:
        # The lane's only thread is free from here on, and this one's turn has come.
        held.released.set()
        running.result(PATIENCE)

    running = lane.go(held)
    queued = lane.go(begun.append, "queued", on_abandon=release)
    assert held.begun.wait(PATIENCE)
    abandon(lane.entries(), timeout=PATIENCE)
    with pytest.raises(CancelledError):
        queued.result(PATIENCE)
    assert lane.wait(PATIENCE)
    assert begun == []


def test_thousand_tasks_are_finished_or_reported(group: WaitGroup) -> None:
    """Four threads, of which each stops at the fifth hundred: the rest of the queue never gets a thread."""
    stuck, released = threading.Semaphore(0), threading.Event()
    finished: list[int] = []
    again: list[int] = []

    def work(number: int) -> None:
        if number >= 500:
            stuck.release()
            released.wait(PATIENCE)
        finished.append(number)

    futures = [group.go(work, number, on_abandon=lambda entry: again.append(*entry.args)) for number in range(1_000)]
    for _ in range(4):
        assert stuck.acquire(timeout=PATIENCE)
    group.close()
    done = sorted(finished)
    reported = abandon(group.entries(), timeout=PATIENCE)
    assert sorted([*done, *(entry.args[0] for entry, _ in reported)]) == list(range(1_000))
    assert sorted(again) == sorted(entry.args[0] for entry, _ in reported) == list(range(500, 1_000))
    assert [bool(stack) for _, stack in reported].count(True) == 4
    released.set()
    assert group.wait(PATIENCE)
    assert [sum(future.cancelled() for future in futures), len(finished)] == [496, 504]


@pytest.mark.parametrize("after_close", ["reject", "run_inline"])
def test_thousand_tasks_that_meet_the_close_are_all_accounted_for(after_close: Any) -> None:
    group = WaitGroup("meeting", threads=2, after_close=after_close)
    numbers = iter(range(1_000))
    finished: list[int] = []
    rejected: list[int] = []
    lock = threading.Lock()

    def offer() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if number == 600:
                group.close()
            try:
                group.go(finished.append, number)
            except GroupClosed:
                rejected.append(number)

    at_once(8, offer)
    reported = [entry.args[0] for entry, _ in abandon(group.entries(), timeout=0)]
    shut_down(group)
    assert group.entries() == []
    # Work that ran when it was reported has ended since.
    assert sorted({*finished, *rejected, *reported}) == list(range(1_000))
    assert not set(rejected) & {*finished, *reported}
    assert bool(rejected) is (after_close == "reject")


# -- what an app does last


@pytest.fixture(autouse=True)
def no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drained_hooks, "_hooks", [])


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Collect what is logged; `caplog` is not for hypothesis, which calls a test many times."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zdd_web").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("zdd_web").removeHandler(handler)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([None, ValueError("broken"), SystemExit(3)]), max_size=6))
def test_hooks_run_last_in_first_out_whatever_becomes_of_them(outcomes: list[BaseException | None]) -> None:
    called: list[int] = []

    def hook(number: int, error: BaseException | None) -> None:
        called.append(number)
        if error is not None:
            raise error

    for number, error in enumerate(outcomes):
        on_drained(functools.partial(hook, number, error))
    with logged() as messages:
        run_drained_hooks()
        run_drained_hooks()  # which has nothing to do
    assert called == list(reversed(range(len(outcomes))))
    said = [type(error).__name__ for error in reversed(outcomes) if error is not None]
    assert [message.partition(' error="')[2].partition(":")[0] for message in messages] == said
    assert all(message.startswith("event=background.failed hook=on_drained name=") for message in messages)


def test_on_drained_is_a_decorator_that_leaves_the_function_alone() -> None:
    called: list[str] = []

    @on_drained
    def bare() -> None:
        called.append("bare")

    @on_drained(timeout=3)
    def with_timeout() -> None:
        called.append("with timeout")

    bare()
    with_timeout()
    assert called == ["bare", "with timeout"]
    assert drained_hooks._hooks == [(bare, 5.0), (with_timeout, 3)]


def test_hook_that_a_hook_adds_is_called_as_well() -> None:
    called: list[str] = []

    @on_drained
    def outer() -> None:
        called.append("outer")
        on_drained(lambda: called.append("inner"))

    run_drained_hooks(time.monotonic() + PATIENCE)
    assert called == ["outer", "inner"]


def test_hook_that_hangs_is_left_behind_with_a_heartbeat(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    beats: list[bool] = []
    called: list[str] = []
    on_drained(lambda: called.append("first in, last out"))
    on_drained(timeout=0.05)(held)
    run_drained_hooks(beat=lambda: beats.append(held.begun.is_set()))
    assert called == ["first in, last out"]
    assert beats
    (message,) = failures(caplog)
    assert message.partition(" object at ")[0] == 'hook=on_drained name="<tests.os.test_waitgroup.Held'
    assert "TimeoutError: still running after" in message


def test_hook_gets_no_more_than_the_deadline_leaves(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    called: list[str] = []

    @on_drained
    def too_late() -> None:
        called.append("too late")

    @on_drained(timeout=PATIENCE)
    def hangs() -> None:
        held()

    run_drained_hooks(time.monotonic() + 0.05)
    assert called == []
    hanging, not_called = failures(caplog)
    assert "hangs" in hanging
    assert "still running after" in hanging
    assert not_called.endswith('too_late" error="TimeoutError: not called, the deadline has passed"')


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeout_that_leaves_no_time_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match=rf"on_drained\(timeout={timeout}\): give seconds, more than 0"):
        on_drained(timeout=timeout)


# -- Django's connections

DJANGO = """
import json, sys, threading
import zdd_web.waitgroup
from zdd_web.waitgroup import WaitGroup, abandon, on_drained, run_drained_hooks
group = WaitGroup("shop", threads=1, after_close="run_inline")
assert group.go(len, "before Django is there").result() and "django" not in sys.modules
import django.db
assert group.go(len, "before it is configured").result()
from django.conf import settings
settings.configure(DATABASES={
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]},
    "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]},
})
django.setup()
from django.db import connection, connections
said = {}

def query(name, fail=False):
    for each in ("default", "other"):
        with connections[each].cursor() as cursor:
            cursor.execute("SELECT 1")
    seen[name] = [connections["default"], connections["other"]]
    if fail:
        raise ValueError

def was_closed(name):
    return [each.connection is None for each in seen[name]]

seen = {}
query("here")
group.go(query, "go").result()
group.go(query, "failing", fail=True).exception()
group.task(query)("task").result()
with group.executor(1) as executor:
    executor.submit(query, "executor").result()
on_drained(lambda: query("on_drained"))
run_drained_hooks()
entry = group.add("abandoned", on_abandon=lambda entry: query("on_abandon"))
abandon([entry], 60)
entry.done()
with group.track():
    query("track")
group.close()
group.go(query, "inline").result()
json.dump({name: was_closed(name) for name in seen}, sys.stdout)
"""


def test_threads_of_ours_leave_no_connection_of_django_open(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-Werror", "-c", DJANGO, str(tmp_path / "db.sqlite3")],
        check=True,
        timeout=PATIENCE,
        stdout=subprocess.PIPE,
    )
    ours = ("go", "failing", "task", "executor", "on_drained", "on_abandon")
    # The caller's own threads keep theirs: a request goes on with it.
    assert json.loads(run.stdout) == {
        **{name: [True, True] for name in ours},
        **{name: [False, False] for name in ("here", "track", "inline")},
    }


def test_connection_that_cannot_be_closed_is_logged_and_the_work_stands(
    group: WaitGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def close_all_() -> None:
        raise OSError("gone")

    settings = types.SimpleNamespace(settings=types.SimpleNamespace(configured=True))
    connections = types.SimpleNamespace(close_all=close_all_)
    monkeypatch.setitem(sys.modules, "django.conf", settings)
    monkeypatch.setitem(sys.modules, "django.db", types.SimpleNamespace(connections=connections))
    assert group.go(len, "four").result(PATIENCE) == 4
    assert group.wait(PATIENCE)
    assert failures(caplog) == ['group=unit name=len error="OSError: gone"']


def test_django_that_is_being_imported_is_left_alone(group: WaitGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "django.db", types.ModuleType("django.db"))
    assert group.go(len, "four").result(PATIENCE) == 4
    assert group.failed == 0
