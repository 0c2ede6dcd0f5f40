"""The log lines are interface: their words, their form, and that nothing swallows them."""

from __future__ import annotations

import errno
import io
import json
import logging
import logging.config
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from hypothesis import given
from hypothesis import strategies as st

from zdd_web import log
from zdd_web.log import EVENTS, emit, format_event

ROOT = Path(__file__).parents[2]


# -- the form


@pytest.mark.parametrize(
    ("event", "fields", "line"),
    [
        ("boot.started", {}, "event=boot.started"),
        ("boot.started", {"pid": 7, "workers": 2}, "event=boot.started pid=7 workers=2"),
        ("phase.serving", {"pid": 7, "generation": 3}, "generation=3 event=phase.serving pid=7"),
        ("refused", {"reason": "an upgrade is under way"}, 'event=refused reason="an upgrade is under way"'),
        ("refused", {"reason": ""}, 'event=refused reason=""'),
        ("refused", {"reason": 'say "no"'}, r'event=refused reason="say \"no\""'),
        ("refused", {"reason": "a=b"}, 'event=refused reason="a=b"'),
        ("refused", {"reason": "two\nlines\t"}, r'event=refused reason="two\nlines\t"'),
        ("refused", {"reason": "trailing\n"}, r'event=refused reason="trailing\n"'),
        ("refused", {"reason": "zu spät"}, 'event=refused reason="zu spät"'),
        ("refused", {"reason": None}, "event=refused reason=None"),
        ("refused", {"signal": "USR2", "ok": True}, "event=refused signal=USR2 ok=True"),
        ("upgrade.ready", {"seconds": 1.92}, "event=upgrade.ready seconds=1.92"),
        ("upgrade.ready", {"seconds": 1.92049}, "event=upgrade.ready seconds=1.92"),
        ("upgrade.ready", {"seconds": 60.0}, "event=upgrade.ready seconds=60"),
        ("upgrade.ready", {"seconds": 0.0}, "event=upgrade.ready seconds=0"),
        ("upgrade.ready", {"seconds": 0.0004}, "event=upgrade.ready seconds=0"),
        ("upgrade.ready", {"seconds": 100}, "event=upgrade.ready seconds=100"),
        ("boot.started", {"name": "[::1]:8000", "bind": "unix:/run/shop.sock"},
         "event=boot.started name=[::1]:8000 bind=unix:/run/shop.sock"),
    ],
)  # fmt: skip
def test_line_of_an_event(event: str, fields: dict[str, Any], line: str) -> None:
    assert format_event(event, fields) == line


def test_fields_of_the_caller_are_left_as_they_are() -> None:
    fields = {"pid": 7, "generation": 3}
    format_event("phase.serving", fields)
    assert fields == {"pid": 7, "generation": 3}


def parse(line: str) -> dict[str, str]:
    """Read a line as a dashboard does."""
    found, rest = {}, line
    while rest:
        key, _, rest = rest.partition("=")
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:]
        else:
            value, space, rest = rest.partition(" ")
            rest = space + rest
        found[key] = value
        rest = rest.removeprefix(" ")
    return found


@given(st.dictionaries(st.sampled_from(["reason", "error", "name", "generation"]), st.text(max_size=40)))
def test_any_line_is_one_line_and_can_be_read_back(fields: dict[str, str]) -> None:
    line = format_event("refused", fields)
    assert len(line.splitlines()) == 1
    assert parse(line) == {"event": "refused", **fields}


def test_unknown_word_raises_and_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError, match=r"phase\.serivng"):
        emit("phase.serivng", pid=7)
    assert caplog.records == []


def test_every_word_has_its_meaning_written_down() -> None:
    assert all(EVENTS.values())
    assert all(word == word.lower() and " " not in word for word in EVENTS)


# -- lines that somebody else would like to write

FORGED = "[2026-11-28 16:00:00 +0000] [1] [ERROR] generation=9 event=upgrade.failed reason=forged"

#: Whatever breaks a line for Python, journald or a terminal, and what moves a terminal's cursor.
BREAKS = [
    "\n",
    "\r\n",
    "\r",
    "\v",
    "\f",
    "\x1c",
    "\x1d",
    "\x1e",
    "\x85",
    "\u2028",
    "\u2029",
    "\x1b[2J",
    "\x9b2J",
    "\x7f",
]


def event_lines(text: str) -> list[str]:
    """Return what a dashboard takes for lines of an upgrade that failed, wherever it looks for the word."""
    return [line for line in text.splitlines() if "event=upgrade.failed" in line]


class Noted(ValueError):
    def __init__(self, message: str, note: str) -> None:
        super().__init__(message)
        self.__notes__ = [note]


@pytest.mark.parametrize("brk", BREAKS, ids=map(ascii, BREAKS))
@pytest.mark.usefixtures("error_log")
def test_message_of_an_exception_forges_no_line(stream: io.StringIO, brk: str) -> None:
    try:
        try:
            raise KeyError(f"7{brk}{FORGED}")
        except KeyError as error:
            raise Noted(f"no such order: 7{brk}{FORGED}{brk}", f"{FORGED}{brk}{FORGED}") from error
    except Noted as error:
        emit("background.failed", logging.ERROR, error=f"{type(error).__name__}: {error}", exc_info=error)
    first, *others = stream.getvalue().splitlines()
    assert "event=background.failed" in first
    assert event_lines(stream.getvalue()) == []
    assert [line for line in others if line.startswith("[")] == []
    assert [each for each in stream.getvalue() if each != "\n" and log.escaping.CONTROL.match(each)] == []
    # It is still a traceback, and says what was said.
    assert "\nTraceback (most recent call last):\n  File " in stream.getvalue()
    assert "\ntests.os.test_log.Noted: no such order: 7" in stream.getvalue()
    assert "The above exception was the direct cause of the following exception:\n" in stream.getvalue()
    value = parse(first.partition("] [ERROR] ")[2])["error"]
    assert value == f"Noted: no such order: 7{brk}{FORGED}{brk}"


@pytest.mark.usefixtures("error_log")
def test_stack_that_follows_a_line_forges_none(stream: io.StringIO) -> None:
    emit("background.abandoned", name="job", detail=f"  File a.py\n{FORGED}\n\x1b[2J")
    assert event_lines(stream.getvalue()) == []
    assert [line[:2] for line in stream.getvalue().splitlines()[1:]] == ["  "] * 3


@pytest.mark.usefixtures("error_log")
def test_credentials_are_in_no_line_no_traceback_and_no_field(
    stream: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    address = "postgres://shop:hunter2@db/shop"
    records: list[logging.LogRecord] = []
    keep = logging.Handler()
    keep.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("gunicorn.error").addHandler(keep)
    emit("background.failed", error=f"cannot reach {address}", exc_info=OSError(f"cannot reach {address}"), pid=7)
    logging.getLogger("gunicorn.error").removeHandler(keep)
    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count("cannot reach postgres://***@db/shop") == 2
    assert (records[0].zdd_error, records[0].zdd_pid) == ("cannot reach postgres://***@db/shop", 7)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("error_log")
def test_exception_that_cannot_be_shown_is_named(stream: io.StringIO) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    emit("internal.error", logging.ERROR, where="tick", exc_info=Broken())
    assert "Broken" in stream.getvalue()


# -- a log that cannot be written


def cannot_write(number: int) -> io.StringIO:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    return Full()


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_log_that_cannot_be_written_raises_nothing(
    error_log: logging.Logger, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(error_log.handlers[0], "stream", cannot_write(number))
    monkeypatch.setattr(sys, "stderr", cannot_write(number))
    emit("phase.draining", logging.ERROR)


@pytest.mark.parametrize("closed", [None, "closed"])
def test_log_on_a_stderr_that_is_closed_raises_nothing(
    error_log: logging.Logger, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, closed: str | None
) -> None:
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    emit("phase.draining", logging.ERROR)


def test_handler_that_raises_ends_nothing_and_loses_no_warning(
    error_log: logging.Logger, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("the log server is gone")

    monkeypatch.setattr(error_log, "handlers", [Raises()])
    monkeypatch.setattr(sys, "stderr", stream)
    emit("phase.draining")
    assert stream.getvalue() == ""
    emit("refused", logging.WARNING, signal="HUP")
    assert stream.getvalue() == "event=refused signal=HUP\n"


# -- where lines go


def test_line_goes_to_the_logger_zdd_web_outside_gunicorn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zdd_web"):
        emit("upgrade.ready", logging.WARNING, generation=2, workers=4)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("zdd_web", logging.WARNING)
    assert record.getMessage() == "generation=2 event=upgrade.ready workers=4"
    assert {key: value for key, value in vars(record).items() if key.startswith("zdd_")} == {
        "zdd_event": "upgrade.ready",
        "zdd_generation": 2,
        "zdd_workers": 4,
    }


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def error_log(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """gunicorn's own error log, set up by gunicorn, and in use."""
    monkeypatch.setattr(log, "_sink", log._sink)
    before = [(each, each.handlers[:], each.propagate, each.level, each.disabled) for each in loggers()]
    monkeypatch.setattr(sys, "stderr", stream)
    error_log = Logger(Config()).error_log
    log.use_gunicorn(error_log)
    yield error_log
    for each, handlers, propagate, level, disabled in before:
        each.handlers[:], each.propagate, each.disabled = handlers, propagate, disabled
        each.setLevel(level)


def loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in (None, "gunicorn", "gunicorn.error", "gunicorn.access", "zdd_web")]


@pytest.mark.usefixtures("error_log")
def test_line_goes_through_gunicorns_handlers_in_its_format(stream: io.StringIO) -> None:
    emit("phase.serving", generation=1, pid=7)
    assert stream.getvalue().endswith("] [INFO] generation=1 event=phase.serving pid=7\n")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.usefixtures("error_log")
def test_traceback_goes_with_the_line(stream: io.StringIO) -> None:
    try:
        _ = 1 / 0
    except ZeroDivisionError as error:
        emit("internal.error", logging.ERROR, where="tick", exc_info=True)
        emit("background.failed", logging.ERROR, exc_info=error)
    assert stream.getvalue().count("ZeroDivisionError: division by zero") == 2


def test_record_carries_its_fields_for_handlers_of_the_user(error_log: logging.Logger) -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    keep = Keep(level=logging.WARNING)
    error_log.addHandler(keep)
    emit("refused", logging.WARNING, signal="USR2", generation=1)
    emit("boot.started")
    error_log.removeHandler(keep)
    (record,) = records
    assert (record.zdd_event, record.zdd_signal, record.name) == ("refused", "USR2", "gunicorn.error")  # type: ignore[attr-defined]


def test_gunicorns_loglevel_is_obeyed(error_log: logging.Logger, stream: io.StringIO) -> None:
    error_log.setLevel(logging.WARNING)
    emit("boot.started")
    assert stream.getvalue() == ""
    emit("refused", logging.WARNING)
    assert stream.getvalue().endswith("event=refused\n")


APPS = {
    "a plain one, which disables what is there": {"version": 1},
    "one that says so": {"version": 1, "disable_existing_loggers": True},
    "one with a root of its own": {
        "version": 1,
        "disable_existing_loggers": True,
        "handlers": {"null": {"class": "logging.NullHandler"}},
        "root": {"handlers": ["null"], "level": "CRITICAL"},
    },
}


@pytest.mark.parametrize("config", APPS.values(), ids=APPS)
def test_logging_config_of_the_app_swallows_no_line(
    error_log: logging.Logger, stream: io.StringIO, config: dict[str, Any]
) -> None:
    logging.config.dictConfig(config)
    assert error_log.disabled
    emit("phase.draining", generation=1)
    assert stream.getvalue().endswith("[INFO] generation=1 event=phase.draining\n")


def test_file_name_that_is_no_utf_8_can_be_written() -> None:
    line = log.format_event("refused", {"reason": os.fsdecode(b"/srv/\xff")})
    assert line.encode() == b'event=refused reason="/srv/\\\\udcff"'


def test_logging_config_of_the_app_for_gunicorn_is_followed(error_log: logging.Logger, stream: io.StringIO) -> None:
    # "gunicorn" is the parent of "gunicorn.error": the config takes its handlers away and lets it propagate.
    logging.config.dictConfig(
        {
            "version": 1,
            "handlers": {"theirs": {"class": "logging.StreamHandler", "stream": stream}},
            "loggers": {"gunicorn": {"handlers": ["theirs"], "level": "INFO"}},
        }
    )
    assert error_log.handlers == []
    emit("phase.draining", generation=1)
    assert stream.getvalue() == "generation=1 event=phase.draining\n"


def test_file_of_gunicorns_error_log_is_written_after_the_apps_config(
    tmp_path: Path, error_log: logging.Logger
) -> None:
    config = Config()
    config.set("errorlog", str(tmp_path / "error.log"))
    logger = Logger(config)
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
    emit("phase.draining", generation=1)
    logger.close_on_exec()
    assert (tmp_path / "error.log").read_text().endswith("generation=1 event=phase.draining\n")
    for handler in error_log.handlers:
        handler.close()


def test_line_without_any_logging_config_is_not_lost_when_it_matters() -> None:
    script = "import logging; from zdd_web import log; log.emit('refused', logging.WARNING, signal='HUP')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "event=refused signal=HUP\n"


def test_message_is_left_where_the_platform_made_a_place_for_it(tmp_path: Path) -> None:
    place = tmp_path / "termination-log"
    log.leave_a_message(str(place), "nobody made it")
    assert not place.exists()
    place.write_text("of the container's life before, " * 10)
    log.leave_a_message(str(place), "x" * 5000)
    assert place.read_text() == "x" * 4096
    log.leave_a_message(str(place), "\x1b[2Jpostgres://shop:hunter2@db\n")
    assert place.read_text() == "\\x1b[2Jpostgres://***@db\n"
    log.leave_a_message("", "no place")
