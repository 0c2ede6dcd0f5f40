"""A gunicorn logger of the user's with gunicorn's methods and nothing else."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger

from tests.helpers.forks import in_child
from zdd_web import access_log, log
from zdd_web.gunicorn.adapter import logger_class
from zdd_web.system import boot_log

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Methods:
    """What gunicorn calls, and what was said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.accessed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name not in ("critical", "error", "exception", "warning", "info", "debug"):
            raise AttributeError(name)
        return lambda text, *args, **options: self.said.append((name, text % args if args else text))

    def access(self, response: Any, request: Any, environ: Any, request_time: Any) -> None:
        self.accessed.append(environ["PATH_INFO"])


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Methods:
    monkeypatch.setattr(log, "_sink", log._sink)
    methods = Methods()
    log.use_gunicorn(methods)
    return methods


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_events_go_through_the_method_of_their_level(methods: Methods, level: int) -> None:
    log.emit("refused", level, signal="HUP", reason="100 % sure")
    assert methods.said == [(logging.getLevelName(level).lower(), 'event=refused signal=HUP reason="100 % sure"')]


def test_traceback_is_part_of_the_message(methods: Methods) -> None:
    log.emit("internal.error", logging.ERROR, where="tick", exc_info=ValueError("one\nevent=upgrade.failed"))
    ((name, text),) = methods.said
    assert (name, text) == ("error", "event=internal.error where=tick\nValueError: one\n    event\\u003dupgrade.failed")


def test_logger_that_fails_raises_nothing_and_loses_no_warning(
    methods: Methods, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    log.use_gunicorn(object())
    log.emit("phase.serving")
    log.emit("refused", logging.WARNING)
    assert stderr.getvalue() == "event=refused\n"


def test_gunicorns_own_logger_and_what_is_derived_from_it_is_standard() -> None:
    class Derived(Logger):
        pass

    assert logger_class.is_standard(Derived(Config()))
    assert not logger_class.is_standard(Methods())
    assert not logger_class.is_standard(SimpleNamespace(error_log=Methods()))


def test_boot_log_has_what_gunicorn_and_we_say(methods: Methods) -> None:
    memfd = boot_log.create()
    handler = boot_log.Handler(os.dup(memfd))
    copying = logger_class.Copying(methods, handler)
    log.use_gunicorn(copying)
    copying.info("Booting worker with pid: %s", 7)
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        copying.exception("Exception in worker process")
    log.emit("boot.started", pid=7)
    pid = os.getpid()
    lines = boot_log.tail(memfd).splitlines()
    assert lines[:2] == [f"[{pid}] [INFO] Booting worker with pid: 7", f"[{pid}] [ERROR] Exception in worker process"]
    assert lines[-2:] == ["ZeroDivisionError: division by zero", f"[{pid}] [INFO] event=boot.started pid=7"]
    assert [name for name, _ in methods.said] == ["info", "exception", "info"]
    handler.end()
    copying.info("after the boot")
    assert "after the boot" not in boot_log.tail(memfd)
    with pytest.raises(AttributeError):
        _ = copying.error_log
    os.close(memfd)


@pytest.mark.parametrize(
    ("status", "path", "written"), [("200 OK", "/livez", False), ("503 Gone", "/livez", True), ("200 OK", "/", True)]
)
def test_probes_are_left_out_of_its_access_log(status: str, path: str, written: bool) -> None:
    methods = Methods()
    access_log.leave_probes_out(methods)
    methods.access(SimpleNamespace(status=status), None, {"PATH_INFO": path}, None)
    assert methods.accessed == ([path] if written else [])


def test_forked_process_keeps_the_files_that_such_a_logger_may_write_to(methods: Methods, tmp_path: Path) -> None:
    def child() -> tuple[bool, bool]:
        with open(tmp_path / "json.log", "a") as file, open(tmp_path / "json.log") as other:
            needed = log.own_streams()
            return file.fileno() in needed, other.fileno() in needed

    assert in_child(child) == [True, False]
