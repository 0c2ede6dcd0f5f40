"""A `logger_class` that is not derived from gunicorn's: it has gunicorn's methods, and no standard logger behind them.

structlog's users write such classes. gunicorn calls nothing but the methods, so nothing else is relied on here.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import Method

_LEVELS = {
    "critical": logging.CRITICAL,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
}


def is_standard(logger: object) -> bool:
    """Tell whether a gunicorn logger writes by the handlers of a standard one."""
    return isinstance(getattr(logger, "error_log", None), logging.Logger)


class Copying:
    """Such a logger, of which every line also goes to a handler."""

    def __init__(self, logger: object, handler: logging.Handler) -> None:
        self._logger, self._handler = logger, handler

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._logger, name)
        return self._copying(name, method) if name in _LEVELS else method

    def _copying(self, name: str, method: Method) -> Method:
        def log(message: object, *arguments: object, **options: object) -> object:
            failed = name == "exception" or options.get("exc_info")
            error = sys.exc_info() if failed else None
            self._handler.handle(logging.LogRecord("", _LEVELS[name], "", 0, message, arguments, error))
            return method(message, *arguments, **options)

        return log
