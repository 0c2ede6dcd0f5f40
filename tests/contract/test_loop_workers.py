"""gunicorn.workers with a loop of their own: gevent, asgi and uvicorn's."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from gunicorn.workers.base import Worker

from tests.contract.stock import a_stock_worker as a_worker
from tests.contract.stock import in_order

# -- gevent


@pytest.fixture
def ggevent() -> Any:
    pytest.importorskip("gevent")
    from gunicorn.workers import ggevent

    return ggevent


def test_gevent_exits_when_its_master_is_gone(ggevent: Any) -> None:
    worker = a_worker(ggevent.GeventWorker)
    del worker.notify
    worker.ppid = -1
    with pytest.raises(SystemExit):
        worker.notify()
    Worker.notify(worker)  # ... and this does not


def test_gevent_makes_its_own_sockets_of_the_listeners(ggevent: Any) -> None:
    assert in_order(ggevent.GeventWorker.patch, "for s in self.sockets:", "socket.socket(s.FAMILY", "self.sockets =")


def test_gevent_looks_once_a_second(ggevent: Any) -> None:
    assert in_order(ggevent.GeventWorker.run, "while self.alive:", "self.notify()", "gevent.sleep(1.0)")


def test_gevent_accepts_by_the_server_of_its_module(ggevent: Any) -> None:
    assert ggevent.StreamServer.__module__ == "gevent.server"
    assert in_order(ggevent.GeventWorker.run, "partial(self.handle, s)", "StreamServer(s, handle=hfun")


def test_gevent_asks_for_the_name_of_a_listener(ggevent: Any) -> None:
    from gunicorn.workers.base_async import AsyncWorker

    assert in_order(AsyncWorker.handle, "listener.getsockname()", "with self.timeout_ctx():")


def test_gevent_kills_what_is_left_at_its_graceful_timeout(ggevent: Any) -> None:
    assert in_order(ggevent.GeventWorker.run, "self.cfg.graceful_timeout", "server.stop(timeout=1)")


def test_gevent_swallows_system_exit_in_a_request(ggevent: Any) -> None:
    assert in_order(ggevent.GeventWorker.handle_request, "except SystemExit:", "pass")


# -- asgi


@pytest.fixture
def gasgi() -> Any:
    return pytest.importorskip("gunicorn.workers.gasgi")


@pytest.fixture
def protocol(gasgi: Any) -> Any:
    from gunicorn.asgi.protocol import ASGIProtocol

    return ASGIProtocol


def test_asgi_takes_an_error_before_the_listener_for_its_own(gasgi: Any) -> None:
    assert in_order(gasgi.ASGIWorker._serve, "create_server(", "except Exception as", "self.log.error(")


def test_asgi_starts_the_app_before_it_listens(gasgi: Any) -> None:
    assert in_order(gasgi.ASGIWorker._serve, "startup()", "create_server(")


def test_asgi_shuts_down_when_its_master_is_gone(gasgi: Any) -> None:
    assert in_order(gasgi.ASGIWorker._serve, "while self.alive:", "self.ppid != os.getppid()", "await self._shutdown()")


def test_asgi_waits_for_connections_that_are_counted(gasgi: Any) -> None:
    assert in_order(gasgi.ASGIWorker._shutdown, "self.nr_conns")


def test_asgi_protocol_parses_where_data_arrives(protocol: Any) -> None:
    if hasattr(protocol, "_feed_callback_parser"):
        # What is pipelined is fed again, and not received again.
        assert inspect.getsource(protocol).count("self._feed_callback_parser(") >= 2
    assert hasattr(protocol, "data_received")


def test_asgi_closes_an_idle_connection_by_a_timer(protocol: Any) -> None:
    assert in_order(protocol, "_cancel_keepalive_timer")
    assert in_order(protocol, "def _arm_keepalive_timer") or in_order(protocol, "_keepalive_handle")


def test_asgi_protocol_has_what_tells_that_a_head_is_read(protocol: Any) -> None:
    source = inspect.getsource(protocol)
    assert [name for name in ("_request_ready", "reader", "transport") if f"self.{name} =" not in source] == []


def test_asgi_closes_connections_when_the_worker_ends(protocol: Any) -> None:
    assert "self.worker.alive" in inspect.getsource(protocol)


def test_asgi_has_a_shortcut_without_post_request(protocol: Any) -> None:
    assert "post_request" in inspect.getsource(protocol)


# -- uvicorn


def test_uvicorn_worker_has_what_is_replaced() -> None:
    module = pytest.importorskip("uvicorn_worker._workers")
    assert in_order(module.UvicornWorker._serve, "self.config.app = self.wsgi", "Server(config=self.config)")
    assert "self.config: Config = Config(" in inspect.getsource(module) or "self.config = Config(" in inspect.getsource(
        module
    )
