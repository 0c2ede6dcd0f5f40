"""gunicorn's configuration, as far as it is read here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from gunicorn.config import Config as GunicornsConfig
from gunicorn.config import make_settings

if TYPE_CHECKING:
    import argparse

#: A hook of the user's: what it takes depends on its name.
Hook: TypeAlias = Callable[..., Any]


class Setting(Protocol):
    """One of gunicorn's settings: `get()` returns its value, `default` what it is without any."""

    value: Any
    default: Any

    def get(self) -> Any:
        """Return the value."""

    def set(self, value: object) -> None:
        """Validate and set the value."""


class Config(Protocol):
    """`gunicorn.config.Config`: durations in whole seconds, `address` as parsed from `bind`."""

    address: Sequence[str | int | tuple[str, int]]
    backlog: int
    bind: Sequence[str]
    chdir: str
    check_config: bool
    daemon: bool
    env: Mapping[str, str]
    env_orig: dict[str, str]
    errorlog: str
    forwarded_allow_ips: Sequence[str]
    gid: int
    graceful_timeout: float
    initgroups: bool
    is_ssl: bool
    keepalive: int
    pidfile: str | None
    preload_app: bool
    proc_name: str
    #: "off" where it is not in use; False up to 23.
    proxy_protocol: str | bool
    pythonpath: str | None
    reuse_port: bool
    settings: dict[str, Setting]
    threads: int
    timeout: int
    uid: int
    on_exit: Callable[[object], None]
    on_reload: Callable[[object], None]
    pre_exec: Callable[[object], None]
    worker_abort: Callable[[object], None]
    worker_class: type
    worker_class_str: str
    worker_exit: Callable[[object, object], None]
    worker_int: Callable[[object], None]
    worker_connections: int
    workers: int

    def set(self, name: str, value: object) -> None:
        """Validate a value and set it."""


def normalise_hook(name: str, value: object) -> Hook:
    """Return a hook of the user as gunicorn would call it.

    A dotted string is imported and the number of arguments checked, by gunicorn itself, with gunicorn's own errors.
    """
    setting = make_settings()[name]
    setting.set(value)
    hook: Hook = setting.get()
    return hook


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return gunicorn's arguments, parsed, as a namespace. Ends the process when they cannot be."""
    # A new parser: that of an app reads a configuration file too.
    parsed: argparse.Namespace
    parsed, _ = GunicornsConfig().parser().parse_known_args(list(arguments))
    return parsed


def load(arguments: Sequence[str]) -> tuple[Config, str]:
    """Load a configuration as `gunicorn ARGUMENTS` does, its file included. Ends the process as a start does.

    Returns it, and the app as it is named there: `module:app`, or "".
    """
    from gunicorn.app.wsgiapp import WSGIApplication

    sys.argv = ["gunicorn", *arguments]
    app = WSGIApplication("%(prog)s [OPTIONS] [APP_MODULE]", prog="gunicorn")
    cfg = app.cfg
    assert cfg is not None
    loaded: Config = cfg
    return loaded, getattr(app, "app_uri", None) or ""


def knows(setting: str) -> bool:
    """Tell whether this gunicorn has such a setting.

    >>> knows("workers"), knows("wurkers")
    (True, False)
    """
    return setting in make_settings()
