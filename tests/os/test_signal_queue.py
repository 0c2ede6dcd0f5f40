"""The queue of signals in gunicorn's master: every wait ends by its timeout."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from zdd_web.gunicorn.adapter import signal_queue
from zdd_web.gunicorn.adapter.signal_queue import SignalQueue

#: A wait that a handler interrupts, and that is over its time when the handler returns.
OVERDUE = """
import os, queue, signal, sys, threading, time
from zdd_web.gunicorn.adapter.signal_queue import SignalQueue

waits = {kind}()
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(0.6))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
try:
    waits.get(timeout=0.4)
except queue.Empty:
    sys.exit(7)
"""


def test_a_wait_that_is_over_its_time_ends() -> None:
    assert subprocess.run([sys.executable, "-c", OVERDUE.format(kind="SignalQueue")], timeout=30).returncode == 7


def test_items_come_out_in_order_and_then_none() -> None:
    signals = SignalQueue()
    for item in (1, 2, 3):
        signals.put_nowait(item)
    assert not signals.empty()
    assert [signals.get(timeout=0), signals.get_nowait(), signals.get(timeout=10)] == [1, 2, 3]
    assert signals.empty()
    with pytest.raises(queue.Empty):
        signals.get_nowait()
    with pytest.raises(queue.Empty):
        signals.get(block=False)


def test_a_handler_ends_the_wait() -> None:
    signals = SignalQueue()
    before = signal.signal(signal.SIGUSR1, lambda sig, frame: signals.put_nowait(sig))
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        assert signals.get(timeout=30) == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_was_queued_before_is_kept() -> None:
    before: queue.SimpleQueue[int] = queue.SimpleQueue()
    before.put_nowait(15)
    before.put_nowait(17)
    server = SimpleNamespace(SIG_QUEUE=before)
    signal_queue.replace_queue(server)
    assert [server.SIG_QUEUE.get_nowait(), server.SIG_QUEUE.get_nowait()] == [15, 17]


def test_gunicorn_23_keeps_its_list() -> None:
    server = SimpleNamespace(SIG_QUEUE=[15])
    signal_queue.replace_queue(server)
    assert server.SIG_QUEUE == [15]


def test_a_signal_that_waits_is_seen_and_stays() -> None:
    signals = SignalQueue()
    signals.put_nowait(signal.SIGUSR2)
    for waiting in (signals, [signal.SIGUSR2]):
        arbiter = SimpleNamespace(SIG_QUEUE=waiting)
        assert signal_queue.waits(arbiter, signal.SIGUSR2)
        assert not signal_queue.waits(arbiter, signal.SIGHUP)
        assert signal_queue.take(arbiter) == [signal.SIGUSR2]
        assert not signal_queue.waits(arbiter, signal.SIGUSR2)
