"""Probes that were answered 200 are left out of access logs; whatever else is written stays."""

from __future__ import annotations

import io
import logging
import logging.config
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
from django.test import override_settings
from gunicorn.glogging import SafeAtoms

from zdd_web import access_log, process
from zdd_web.access_log import ProbeFilter
from zdd_web.board import Board
from zdd_web.flask import ZddWeb

Service = Callable[..., Board]
Args = Callable[[str, int], tuple[Any, ...]]


@pytest.fixture(autouse=True)
def serving(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service()
    # Without the apps of other tests, which live until they are collected.
    monkeypatch.setattr(process, "_apps", weakref.WeakKeyDictionary())


def gunicorn(target: str, status: int) -> tuple[Any, ...]:
    path = target.partition("?")[0]
    return (SafeAtoms({"U": path, "r": f"GET {target} HTTP/1.1", "s": str(status), "{host}i": "shop"}),)


def uvicorn(target: str, status: int) -> tuple[Any, ...]:
    return ("127.0.0.1:4711", "GET", target, "1.1", status)


def runserver(target: str, status: int) -> tuple[Any, ...]:
    return (f"GET {target} HTTP/1.1", str(status), "3")


FORMATS = {gunicorn: "%(h)s %(r)s %(s)s", uvicorn: '%s - "%s %s HTTP/%s" %d', runserver: '"%s" %s %s'}


def passes(args: tuple[Any, ...], by: Any = gunicorn) -> bool:
    record = logging.LogRecord("access", logging.INFO, "", 0, FORMATS[by], args, None)
    kept = bool(ProbeFilter().filter(record))
    record.getMessage()  # the record is as it was
    return kept


@pytest.mark.parametrize("by", FORMATS)
@pytest.mark.parametrize("target", ["/livez", "/readyz", "/healthz", "/startupz", "/livez/", "/readyz?verbose"])
def test_probe_that_was_answered_200_is_dropped(by: Args, target: str) -> None:
    assert not passes(by(target, 200), by)


@pytest.mark.parametrize("by", FORMATS)
@pytest.mark.parametrize("status", [503, 405, 404, 500, 301, 204])
def test_probe_that_was_answered_anything_else_stays(by: Args, status: int) -> None:
    assert passes(by("/readyz", status), by)


@pytest.mark.parametrize("by", FORMATS)
@pytest.mark.parametrize("target", ["/", "/shop/livez", "/livez2", "/?next=/livez", "*"])
def test_other_requests_stay(by: Args, target: str) -> None:
    assert passes(by(target, 200), by)


@pytest.mark.parametrize("by", [uvicorn, runserver])
def test_path_may_be_quoted(by: Args, service: Service) -> None:
    service(liveness_path="/alivé")
    assert not passes(by("/aliv%C3%A9", 200), by)


@pytest.mark.parametrize(
    "args",
    [None, (), ("Listening at: %s",), ({"U": "/livez"},), ({},), (1, 2, 3), ("a", "b", "c"), ("GET /livez", "200", "3"),
     ([],), {}],
)  # fmt: skip
def test_what_is_no_access_log_stays(args: Any) -> None:
    assert ProbeFilter().filter(logging.LogRecord("x", logging.INFO, "", 0, "text", args, None))


def test_paths_are_those_of_the_settings_and_of_the_newest(service: Service) -> None:
    assert passes(gunicorn("/up", 200))
    service(health_path="/up")
    assert [passes(gunicorn(path, 200)) for path in ("/up", "/healthz")] == [False, True]


def test_paths_outside_gunicorn_are_those_of_each_app() -> None:
    app = flask.Flask("logged")
    app.config["ZDD_WEB"] = {"HEALTH_PATH": "/flask-up"}
    ZddWeb(app)
    assert not passes(runserver("/flask-up", 200), runserver)
    assert passes(runserver("/django-up", 200), runserver)
    with override_settings(ZDD_WEB={"HEALTH_PATH": "/django-up"}):
        assert not passes(runserver("/django-up", 200), runserver)


@pytest.mark.usefixtures("no_handle")
def test_settings_that_cannot_work_lose_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with override_settings(ZDD_WEB={"NO_SUCH": 1}):
        assert passes(runserver("/no-probe", 200), runserver)
    process.use(None)
    monkeypatch.setenv("ZDD_WEB_GRACE_PERIOD", "soon")
    assert passes(gunicorn("/livez", 200))


def test_one_line_of_a_logging_configuration_is_enough() -> None:
    stream = io.StringIO()
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"probes": {"()": "zdd_web.access_log.ProbeFilter"}},
            "handlers": {"access": {"class": "logging.StreamHandler", "stream": stream, "filters": ["probes"]}},
            "loggers": {"tests.access": {"handlers": ["access"], "level": "INFO", "propagate": False}},
        }
    )
    logger = logging.getLogger("tests.access")
    for path, status in (("/livez", 200), ("/readyz", 503), ("/", 200)):
        logger.info(FORMATS[runserver], *runserver(path, status))
    assert stream.getvalue() == '"GET /readyz HTTP/1.1" 503 3\n"GET / HTTP/1.1" 200 3\n'


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    found = [logging.getLogger(name) for name in access_log.LOGGERS]
    before = [list(logger.filters) for logger in found]
    yield found
    for logger, filters in zip(found, before, strict=True):
        logger.filters[:] = filters


def test_filter_is_hung_on_once_however_often_it_is_asked_for(loggers: list[logging.Logger]) -> None:
    for _ in range(2):
        access_log.leave_probes_out()
    for logger in loggers:
        assert sum(isinstance(each, ProbeFilter) for each in logger.filters) == 1
