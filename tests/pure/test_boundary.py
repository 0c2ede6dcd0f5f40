"""What raises in ours is logged and refused; what gunicorn ends its loop with goes through."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator

import pytest
from gunicorn.errors import HaltServer

from zdd_web.gunicorn.adapter import boundary
from zdd_web.gunicorn.adapter.boundary import guarded


class Clock:
    """`time`, as far as the boundary looks at it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(boundary, "time", clock)
    monkeypatch.setattr(boundary, "_last", {})
    return clock


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="zdd_web"):
        yield


def breaks(*args: object) -> None:
    raise KeyError("slot")


def test_result_goes_through() -> None:
    assert guarded("here", lambda first, *, second: first + second)(1, second=2) == 3


def test_what_raises_is_logged_with_its_place_and_refused(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert guarded("handle_usr2", breaks)() is None
    (record,) = caplog.records
    assert record.getMessage() == "event=internal.error where=handle_usr2"
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert repr(record.exc_info[1]) == "KeyError('slot')"


@pytest.mark.parametrize("ends", [StopIteration(), HaltServer("drained", 1), SystemExit(3), KeyboardInterrupt()])
def test_what_ends_gunicorns_loop_goes_through(ends: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def end() -> None:
        raise ends

    with pytest.raises(type(ends)) as caught:
        guarded("here", end)()
    assert caught.value is ends
    assert caplog.records == []


def test_same_place_is_logged_once_a_second(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    tick, other = guarded("tick", breaks), guarded("handle_term", breaks)
    for now, logged in ((100.0, 1), (100.02, 1), (100.999, 1), (101.0, 2), (101.5, 2), (102.0, 3)):
        clock.now = now
        assert tick() is None
        assert (now, len(caplog.records)) == (now, logged)
    assert other() is None
    assert caplog.records[-1].getMessage() == "event=internal.error where=handle_term"


def test_place_that_works_again_is_called_again(clock: Clock) -> None:
    outcomes = iter([ValueError(), None])

    def sometimes() -> str:
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome
        return "done"

    call = guarded("here", sometimes)
    assert (call(), call()) == (None, "done")


def test_guarded_function_looks_like_itself() -> None:
    assert guarded("here", breaks).__name__ == "breaks"
    assert list(inspect.signature(guarded("here", breaks)).parameters) == ["args"]
