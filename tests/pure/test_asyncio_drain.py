"""How long an asyncio worker that is leaving waits for those who are connected to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from zdd_web.gunicorn.workers import asyncio_drain
from zdd_web.gunicorn.workers.worker_adapter import LINGER
from zdd_web.system import clock


def leaving(monkeypatch: pytest.MonkeyPatch, websockets: set[Any], connections: list[Any]) -> list[bool]:
    """Have a worker leave; return whether it was over just before `LINGER` seconds, and after them."""
    now = [100.0]
    monkeypatch.setattr(asyncio_drain.time, "monotonic", lambda: now[0])
    runtime = SimpleNamespace(
        slot=SimpleNamespace(in_flight=0),
        process=SimpleNamespace(deadline_ns=clock.NEVER),
        end=SimpleNamespace(background_is_over=lambda: True, give_up_background=lambda: None),
    )
    adapter = SimpleNamespace(
        runtime=runtime,
        app=SimpleNamespace(websockets=websockets),
        connections=connections,
        stop_accepting=lambda: None,
        is_reading_a_head=lambda: False,
    )
    drain = asyncio_drain.AsyncioDrain(cast("asyncio_drain.DrainedAdapter", adapter))
    assert not drain.over(), "a connection that was accepted a moment ago is not known yet"
    seen = []
    for seconds in (LINGER - 0.1, LINGER):
        now[0] = 100.0 + seconds
        seen.append(drain.over())
    return seen


def test_a_worker_without_connections_waits_for_none(monkeypatch: pytest.MonkeyPatch):
    assert leaving(monkeypatch, set(), []) == [True, True]


def test_an_idle_connection_is_given_time(monkeypatch: pytest.MonkeyPatch):
    open_one = SimpleNamespace(transport=SimpleNamespace(is_closing=lambda: False))
    assert leaving(monkeypatch, set(), [open_one]) == [False, True]


def test_a_websocket_is_given_as_long_where_its_first_protocol_is_gone(monkeypatch: pytest.MonkeyPatch):
    # uvicorn: its handler has two seconds to end the conversation itself.
    assert leaving(monkeypatch, {object()}, []) == [False, True]
