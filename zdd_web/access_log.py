"""Keep probes that were answered 200 out of an access log, and nothing else.

Under gunicorn, for all its worker classes: `LOG_PROBES = False`. Elsewhere a filter for the server that writes the log:

    "filters": {"probes": {"()": "zdd_web.access_log.ProbeFilter"}},
    "handlers": {"access": {"class": "logging.StreamHandler", "filters": ["probes"]}},

A probe that was answered anything but 200 stays, and so do zdd_web's own lines, which are in no access log.
"""

from __future__ import annotations

import logging
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any

from zdd_web import process
from zdd_web.errors import ZddError
from zdd_web.probes import Probes
from zdd_web.settings import FrameworkSettings

#: Who writes one line a request in a gunicorn worker.
LOGGERS = ("gunicorn.access", "uvicorn.access")


class ProbeFilter(logging.Filter):
    """Drops the access-log records of probes that were answered 200.

    It knows the records of gunicorn, uvicorn, Django's runserver and Werkzeug (`flask run`); any other passes.

    >>> record = logging.LogRecord("django.server", 20, "", 0, '"%s" %s %s', ("GET /livez HTTP/1.1", "200", "3"), None)
    >>> ProbeFilter().filter(record)
    False
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._probes: dict[str, Probes] = {"": Probes()}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record may be written."""
        path, status = _asked(record.args)
        if status != "200":
            return True
        try:
            return not self._is_probe(path)
        except ZddError:
            return True  # a setting that cannot work, of which others complain

    def _is_probe(self, path: str) -> bool:
        if self._probes[""].asks(path):
            return True
        # A worker's settings are those of its apps; where there is no gunicorn, each app has its own.
        return process.current().slot is None and any(Probes(_say(each)).asks(path) for each in _brought())


def _say(settings: FrameworkSettings) -> Any:
    return lambda: settings


def _brought() -> list[FrameworkSettings]:
    conf = sys.modules.get("django.conf")
    django = [FrameworkSettings.of_django(conf.settings)] if conf is not None and conf.settings.configured else []
    return [*django, *process.app_settings()]


def _asked(args: Any) -> tuple[str, str]:
    """Return path and status of a request; empty when the record is none of an access log."""
    if isinstance(args, Mapping):  # gunicorn: atoms
        return str(args.get("U", "")), str(args.get("s", ""))
    if not isinstance(args, tuple):
        return "", ""
    if len(args) == 5:  # uvicorn: client, method, path with query, HTTP version, status
        target, status = args[2], args[4]
    elif len(args) == 3 and isinstance(args[0], str) and args[0].count(" ") == 2:  # runserver, Werkzeug: request line
        target, status = args[0].split(" ")[1], args[1]
    else:
        return "", ""
    return urllib.parse.unquote(str(target).partition("?")[0]), str(status)


def leave_probes_out(logger: Any = None) -> None:
    """Filter what this worker of gunicorn logs, whatever its class; `logger` is gunicorn's own for it."""
    for name in LOGGERS:
        standard = logging.getLogger(name)
        if not any(isinstance(each, ProbeFilter) for each in standard.filters):
            standard.addFilter(ProbeFilter())
    if logger is not None and not isinstance(getattr(logger, "access_log", None), logging.Logger):
        _leave_probes_out_of_calls(logger)


def _leave_probes_out_of_calls(logger: Any) -> None:
    # A `logger_class` that is not derived from gunicorn's: what it writes to is not known, what it is called with is.
    access, is_probe = logger.access, ProbeFilter()._is_probe

    def unless_probe(response: Any, request: Any, environ: Any, request_time: Any) -> None:
        if not str(response.status).startswith("200") or not is_probe(environ.get("PATH_INFO", "")):
            access(response, request, environ, request_time)

    logger.access = unless_probe
