"""gunicorn.workers: sync and gthread."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.wsgi import Response
from gunicorn.workers import base, gthread, sync
from gunicorn.workers.base import Worker
from gunicorn.workers.gthread import TConn, ThreadWorker
from gunicorn.workers.sync import SyncWorker

from tests.contract.stock import Calls, in_order
from tests.contract.stock import a_stock_worker as a_worker

#: 23 has a gthread of its own; 27.0.1 waits for kept connections by itself.
IS_23 = not hasattr(ThreadWorker, "set_accept_enabled")
LINGERS = hasattr(gthread, "STOP_KEEPALIVE_LINGER")


# -- every class


def test_worker_installs_these_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, installed = a_worker(SyncWorker), {}
    worker.PIPE = (0, 1)
    for name in ("exit", "quit", "abort", "usr1", "winch"):
        setattr(worker, f"handle_{name}", name)
    fake = SimpleNamespace(**{name: getattr(signal, name) for name in dir(signal) if name.startswith("SIG")})
    fake.signal, fake.siginterrupt = installed.__setitem__, lambda *arguments: None
    monkeypatch.setattr(base, "signal", fake)
    Worker.init_signals(worker)
    named = {sig: handler for sig, handler in installed.items() if isinstance(handler, str)}
    assert named == {
        signal.SIGTERM: "exit",
        signal.SIGQUIT: "quit",
        signal.SIGINT: "quit",
        signal.SIGABRT: "abort",
        signal.SIGUSR1: "usr1",
        signal.SIGWINCH: "winch",
    }


def test_boot_calls_these_methods_of_the_instance_in_this_order() -> None:
    assert in_order(
        Worker.init_process, "util.set_owner_process(", "self.init_signals()", "self.load_wsgi()",
        "self.cfg.post_worker_init(self)", "self.run()",
    )  # fmt: skip
    worker = a_worker(SyncWorker)
    assert [name for name in ("alive", "max_requests", "timeout", "sockets", "tmp") if not hasattr(worker, name)] == []


def test_sigterm_only_ends_the_loop() -> None:
    worker = a_worker(SyncWorker)
    worker.handle_exit(signal.SIGTERM, None)
    assert worker.alive is False


def test_reply_decides_to_close_when_its_headers_are_written() -> None:
    assert in_order(Response.default_headers, "self.should_close()")
    request = SimpleNamespace(
        version=(1, 1), should_close=lambda: False, method="GET", headers=[], scheme="http", path="/"
    )
    response = Response(request, None, Config())
    response.start_response("200 OK", [("Content-Length", "0")])
    assert not response.should_close()
    response.force_close()
    assert response.should_close()
    assert response.must_close


# -- sync


def test_sync_accepts_from_each_readable_listener() -> None:
    calls, worker = Calls(), a_worker(SyncWorker)
    worker.wait = lambda timeout: ["one", "two"]

    def accept(listener: str) -> None:
        calls.append(listener)
        worker.alive = False

    worker.accept, worker.PIPE = accept, ("pipe", "pipe")
    worker.run_for_multiple(1.0)
    # The second too, although the loop is to end.
    assert calls == ["one", "two"]


def test_sync_goes_on_where_there_is_no_connection() -> None:
    worker, turns = a_worker(SyncWorker), []

    def accept(listener: str) -> None:
        worker.alive = len(turns) < 2
        raise BlockingIOError(11, "again")

    worker.accept, worker.wait, worker.PIPE = accept, lambda timeout: turns.append(timeout) or ["one"], ("p", "p")
    worker.run_for_multiple(1.0)
    assert len(turns) == 2


def test_sync_waits_for_half_of_the_timeout() -> None:
    arbiter = inspect.getsource(__import__("gunicorn.arbiter").arbiter.Arbiter.spawn_worker)
    assert "self.timeout / 2.0" in arbiter
    assert in_order(SyncWorker.run, "timeout = self.timeout or 0.5")
    worker, waited = a_worker(SyncWorker), []
    worker.sockets, worker.wait = [SimpleNamespace(setblocking=lambda flag: None)] * 2, waited.append
    worker.is_parent_alive = lambda: False
    worker.run()
    assert waited == [5.0]


def test_sync_asks_for_the_name_of_a_listener() -> None:
    assert in_order(SyncWorker.handle_request, "self.cfg.pre_request(", "listener.getsockname()")


def test_sync_closes_gracefully_from_26_on() -> None:
    graceful = "close_graceful" in inspect.getsource(SyncWorker.handle)
    assert graceful is hasattr(sync.util, "close_graceful")


def test_sync_beats_before_each_accept() -> None:
    assert in_order(SyncWorker.run_for_one, "while self.alive:", "self.notify()", "self.accept(listener)")


# -- gthread


class Poller:
    """A selector in which nothing is ever ready."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def register(self, what: Any, *arguments: Any) -> None:
        self._calls.append("register")

    def unregister(self, what: Any) -> None:
        self._calls.append("unregister")

    def select(self, timeout: float) -> list[Any]:
        return []

    def close(self) -> None:
        pass


def a_gthread(calls: Calls, turns: int = 1, **settings: Any) -> Any:
    """Make a gthread worker of 24 or later that ends its loop after some turns."""
    if IS_23:
        pytest.skip("23 has a gthread of its own")
    worker, left = a_worker(ThreadWorker, **settings), [turns]
    worker.poller, worker.tpool = Poller(calls), SimpleNamespace(shutdown=lambda wait: calls.append("shutdown"))
    worker.method_queue = SimpleNamespace(fileno=lambda: 0, run_callbacks=None, close=lambda: None)

    def dispatch(timeout: float) -> None:
        calls.append("dispatch")
        left[0] -= 1
        if left[0] <= 0:
            worker.alive = False

    worker.set_accept_enabled = lambda enabled: calls.append(f"accept {enabled}")
    worker.wait_for_and_dispatch_events = dispatch
    worker.is_parent_alive = lambda: True
    worker.murder_keepalived = lambda **force: calls.append("murder_keepalived")
    worker.murder_pending = lambda: calls.append("murder_pending")
    return worker


def test_gthread_enables_accepting_each_turn() -> None:
    calls = Calls()
    a_gthread(calls, turns=2).run()
    # It goes by `_accepting`, which a method in the place of its own does not set.
    assert calls[:3] == ["register", "accept True", "accept True"]


def test_gthread_stops_accepting_after_its_loop() -> None:
    calls = Calls()
    worker = a_gthread(calls)
    worker.set_accept_enabled = lambda enabled: calls.append(f"accept {enabled} {worker.alive}")
    worker.run()
    assert "accept False False" in calls


def test_gthread_closes_idle_connections_each_turn() -> None:
    calls = Calls()
    a_gthread(calls).run()
    first = calls.index("dispatch")
    assert calls[first + 1] == "murder_keepalived"


def test_gthread_ends_when_its_master_is_gone() -> None:
    if IS_23:
        assert in_order(ThreadWorker.run, "while self.alive:", "if not self.is_parent_alive():", "break")
        return
    calls = Calls()
    worker = a_gthread(calls, turns=9)
    worker.is_parent_alive = lambda: False
    worker.run()
    assert "murder_pending" not in calls[: calls.index("accept False")]


def test_gthread_lingers_for_kept_connections_where_it_says_so() -> None:
    if LINGERS:
        assert gthread.STOP_KEEPALIVE_LINGER == 2.0
        assert in_order(ThreadWorker.run, "self.set_accept_enabled(False)", "STOP_KEEPALIVE_LINGER")


def test_gthread_ends_its_pool_in_a_signal_handler() -> None:
    calls, worker = Calls(), a_worker(ThreadWorker)
    worker.tpool = SimpleNamespace(shutdown=lambda wait: calls.append(f"shutdown {wait}"))
    worker.cfg.set("worker_int", lambda worker: calls.append("worker_int"))
    with pytest.raises(SystemExit):
        worker.handle_quit(signal.SIGQUIT, None)
    assert set(calls) == {"shutdown False", "worker_int"}


def test_gthread_asks_the_reply_whether_to_close() -> None:
    assert in_order(ThreadWorker.handle_request, "self.wsgi(environ, resp.start_response)", "resp.should_close()")


def test_gthread_forces_the_reply_to_close_when_it_ends() -> None:
    assert in_order(ThreadWorker.handle_request, "if not self.alive", "resp.force_close()", "self.wsgi(")


def test_gthread_has_these_books() -> None:
    worker = a_worker(ThreadWorker)
    assert worker.nr_conns == 0
    if not IS_23:
        assert isinstance(worker.keepalived_conns, deque)
    if hasattr(ThreadWorker, "murder_pending"):
        assert isinstance(worker.pending_conns, deque)


def test_gthread_defers_a_silent_connection_after_a_while() -> None:
    if not hasattr(TConn, "wait_for_data"):
        pytest.skip("this gunicorn reads at once")
    assert gthread.DEFAULT_WORKER_DATA_TIMEOUT == 5.0
    assert in_order(ThreadWorker.handle, "conn.wait_for_data(DEFAULT_WORKER_DATA_TIMEOUT)", "return _DEFER")
    assert in_order(ThreadWorker.finish_request, "self.cfg.keepalive", "self.pending_conns.append(conn)")


def test_gthread_drops_what_is_deferred_as_it_ends() -> None:
    if not hasattr(TConn, "wait_for_data"):
        pytest.skip("this gunicorn defers none")
    # 27 takes it for a kept one, and its parser is made once something has been sent; the others close it by design.
    assert in_order(ThreadWorker.finish_request, "_DEFER and self.alive", "conn.close(")
    assert bool(gthread._DEFER)


def test_gthread_caps_only_kept_connections_when_it_ends() -> None:
    if not LINGERS:
        pytest.skip("this gunicorn caps none")
    source = inspect.getsource(ThreadWorker._cap_keepalive)
    assert "keepalived_conns" in source
    assert "pending_conns" not in source


def test_gthread_counts_a_connection_out_before_it_closes_it() -> None:
    if hasattr(sync.util, "close_graceful"):
        assert in_order(ThreadWorker.finish_request, "self.nr_conns -= 1", "conn.close(graceful=True)", "except")
        assert in_order(ThreadWorker.finish_request, "except Exception:", "self.nr_conns -= 1", "conn.close()")
        # close() makes the socket blocking first, which fails for one that is closed.
        assert in_order(TConn.close, "self.sock.setblocking(True)", "util.close_graceful(self.sock)")


def test_gthread_closes_a_connection_whose_reply_has_failed_in_its_thread() -> None:
    if hasattr(sync.util, "close_graceful"):
        assert in_order(ThreadWorker.handle_request, "util.close_graceful(conn.sock)", "raise StopIteration()")


def test_queue_of_calls_keeps_the_numbers_of_its_pipe() -> None:
    if IS_23:
        pytest.skip("23 has none")
    queue = gthread.PollableMethodQueue()
    queue.init()
    before = queue._write_fd
    queue.close()
    assert queue._write_fd == before


def test_queue_of_calls_writes_for_each_call() -> None:
    if IS_23:
        pytest.skip("23 has none")
    queue, done = gthread.PollableMethodQueue(), Calls()
    queue.init()
    for _ in range(3):
        queue.defer(done.append, "call")
    assert len(os.read(queue.fileno(), 50)) == 3
    queue.defer(done.append, "call")
    queue.run_callbacks(queue.fileno())
    assert done == ["call"] * 4
    # Looked up at each call, and not when the worker is made.
    assert "self.method_queue.defer(self.finish_request" in inspect.getsource(ThreadWorker.enqueue_req)
    queue.close()


def test_gthread_answers_requests_in_the_threads_of_a_pool() -> None:
    worker = a_worker(ThreadWorker, threads=2)
    pool = worker.get_thread_pool()
    pool.submit(lambda: None).result(5)
    assert all(isinstance(each, threading.Thread) for each in pool._threads)
    pool.shutdown()
