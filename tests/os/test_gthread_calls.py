"""Calls that a gthread worker's threads leave to its loop."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.workers import gthread as stock

from zdd_web.gunicorn.adapter import gthread

PATIENCE = 20.0


@pytest.fixture
def unchanged() -> Iterator[Any]:
    """gunicorn's own queue."""
    if not hasattr(stock, "PollableMethodQueue"):
        pytest.skip("this gunicorn has none")
    queue = stock.PollableMethodQueue()
    queue.init()
    yield queue
    queue.close()


@pytest.fixture
def queue(unchanged: Any) -> Any:
    gthread.wake_once(SimpleNamespace(method_queue=unchanged))
    return unchanged


def wakes(queue: Any) -> int:
    """Count what is in its pipe, and take it."""
    try:
        return len(os.read(queue.fileno(), 4096))
    except BlockingIOError:
        return 0


def turns(queue: Any) -> int:
    """Have a loop turn until nothing wakes it any more."""
    done = 0
    with selectors.DefaultSelector() as poller:
        poller.register(queue.fileno(), selectors.EVENT_READ, queue.run_callbacks)
        while events := poller.select(0):
            done += 1
            for key, _ in events:
                key.data(key.fileobj)
    return done


def test_many_calls_wake_the_loop_once(queue: Any) -> None:
    done: list[int] = []
    for number in range(20):
        queue.defer(done.append, number)
    assert wakes(queue) == 1
    queue._queue.get_nowait()()
    assert done == list(range(20))
    queue.defer(done.append, 20)
    assert turns(queue) == 1
    assert done == list(range(21))


def test_calls_that_come_while_others_are_run_do_not_keep_the_loop_from_its_sockets(queue: Any) -> None:
    done: list[int] = []

    def again(number: int) -> None:
        done.append(number)
        queue.defer(again, number + 1)

    queue.defer(again, 0)
    queue.run_callbacks(queue.fileno())
    # gunicorn runs ten more than it was woken for.
    assert 0 < len(done) <= 12 * gthread.CALLS_AT_ONCE
    queue.run_callbacks(queue.fileno())
    assert done == list(range(len(done)))


def test_a_call_that_leaves_another_one_has_it_run_too(queue: Any) -> None:
    done: list[str] = []

    def first() -> None:
        queue.defer(done.append, "second")
        done.append("first")

    queue.defer(first)
    assert turns(queue) == 1
    assert done == ["first", "second"]


def test_an_error_in_a_call_leaves_the_others_to_another_turn(queue: Any) -> None:
    done: list[str] = []
    queue.defer(lambda: 1 / 0)
    queue.defer(done.append, "second")
    with pytest.raises(ZeroDivisionError):
        turns(queue)
    turns(queue)
    assert done == ["second"]


def test_a_thread_that_is_ended_before_it_wakes_the_loop_costs_no_call(unchanged: Any) -> None:
    queue = unchanged
    wake, ended, done = queue.defer, [], []

    def is_ended_once(callback: Any) -> None:
        if not ended:
            ended.append(True)
            raise SystemExit
        wake(callback)

    queue.defer = is_ended_once
    gthread.wake_once(SimpleNamespace(method_queue=queue))
    with pytest.raises(SystemExit):
        queue.defer(done.append, 0)
    for number in range(1, 2 * gthread.CALLS_AT_ONCE):
        queue.defer(done.append, number)
    turns(queue)
    assert done == list(range(2 * gthread.CALLS_AT_ONCE))


def test_calls_of_many_threads_are_all_run_each_once_and_in_order(queue: Any) -> None:
    threads, each = 8, 2000
    done: list[tuple[int, int]] = []

    def leave(thread: int) -> None:
        for number in range(each):
            queue.defer(done.append, (thread, number))

    running = [threading.Thread(target=leave, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as poller:
        poller.register(queue.fileno(), selectors.EVENT_READ)
        while len(done) < threads * each:
            # A wake-up that is missing would be waited for in vain.
            assert poller.select(max(0.0, deadline - time.monotonic())), len(done)
            queue.run_callbacks(queue.fileno())
    for thread in running:
        thread.join()
    for number in range(threads):
        assert [done_at for thread, done_at in done if thread == number] == list(range(each))


def test_one_that_is_closed_writes_nothing(queue: Any) -> None:
    reading, writing = queue._read_fd, queue._write_fd
    queue.close()
    # Another file has the number.
    other = os.pipe2(os.O_NONBLOCK)
    try:
        assert set(other) & {reading, writing}
        queue.defer(lambda: None)
        with pytest.raises(BlockingIOError):
            os.read(other[0], 1)
    finally:
        for fd in other:
            os.close(fd)
        queue._read_fd = queue._write_fd = None
