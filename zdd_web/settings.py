"""Settings: what can be set, where it may come from, and whether it can work.

One frozen `Settings`, validated when it is made. `resolve()` merges the sources in their order (defaults, `install()`,
environment) and names the source in every error: an operator must be able to tell from the message alone which file or
variable to edit, and what to write there.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zdd_web.errors import SettingsError

ENV_PREFIX = "ZDD_WEB_"
HANDOVER = "ZDD_WEB_HANDOVER"

LISTENERS = ("fd", "reuseport", "systemd")
LISTENERS_AVAILABLE = ("fd",)

#: Kubernetes' default terminationGracePeriodSeconds, and what its users have tuned their load balancers to.
DEFAULT_GRACE_PERIOD = 30.0
#: tableflip's default; long enough for a Django project with a few hundred models on a busy machine.
DEFAULT_UPGRADE_TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that zdd_web can be told. All durations are seconds.

    Raises `SettingsError` when a value has the wrong type or cannot work, alone or with the others.

    >>> Settings(grace_period=10).stop_budget()
    StopBudget(lame_duck=0.0, work=9.0, margin=1.0)
    """

    listener: str = "fd"
    upgrade_timeout: float = DEFAULT_UPGRADE_TIMEOUT
    grace_period: float = DEFAULT_GRACE_PERIOD
    drain_delay: float = 0.0
    recycle_timeout: float = 10.0
    warmup: tuple[str, ...] = ()
    max_generations: int = 4
    keep_pid: bool = False
    release_dir: str = ""
    env_file: str = ""
    liveness_path: str = "/livez"
    readiness_path: str = "/readyz"
    health_path: str = "/healthz"
    generation_header: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _NORMALISE[field.name](value))
            except ValueError as error:
                raise SettingsError(f"{field.name.upper()} = {value!r}: {error}") from None
        paths = [self.liveness_path, self.readiness_path, self.health_path]
        for path in paths:
            if paths.count(path) > 1 and path != self.health_path:
                raise SettingsError(
                    f"two probes share the path {path!r}: give LIVENESS_PATH and READINESS_PATH their own"
                )
        if self.liveness_path == self.health_path:
            raise SettingsError(f"HEALTH_PATH = {self.health_path!r} is LIVENESS_PATH too: health means readiness here")
        self.stop_budget()

    def stop_budget(self) -> StopBudget:
        """Split `grace_period` into lame duck, work and margin.

        Raises `SettingsError` with the sum when they do not fit.
        """
        # gunicorn's loop wakes once a second and processes take a moment to exit: what is promised to be gone before
        # GRACE_PERIOD must be told to go earlier. A tenth, between half a second and two seconds.
        margin = min(2.0, max(0.5, self.grace_period / 10))
        work = self.grace_period - self.drain_delay - margin
        if work <= 0:
            raise SettingsError(
                f"DRAIN_DELAY = {self.drain_delay:g} and {margin:g} to exit leave no time for requests in "
                f"GRACE_PERIOD = {self.grace_period:g} ({self.drain_delay:g} + {margin:g} >= {self.grace_period:g}): "
                f"raise GRACE_PERIOD (and Kubernetes' terminationGracePeriodSeconds) or lower DRAIN_DELAY"
            )
        return StopBudget(lame_duck=self.drain_delay, work=work, margin=margin)


@dataclass(frozen=True)
class StopBudget:
    """How a stop spends `GRACE_PERIOD`, in seconds, one after the other."""

    lame_duck: float
    work: float
    margin: float


def resolve(installed: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Merge defaults, the arguments of `install()` and `ZDD_WEB_*` variables into one `Settings`.

    The environment wins over `install()`: it is what an operator changes without a commit. Raises `SettingsError`.

    >>> resolve({"grace_period": 20}, {"ZDD_WEB_NAME": "shop"}).name
    'shop'
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in installed.items():
        _known(key, f"install({key}=...)")
        values[key], origin[key] = value, f"install({key}={value!r})"
    for variable, text in sorted(environ.items()):
        # What a master hands to its successor is no setting; it is still there where no install() has taken it out.
        if not variable.startswith(ENV_PREFIX) or variable == HANDOVER:
            continue
        key = variable[len(ENV_PREFIX) :].lower()
        _known(key, f"environment variable {variable}")
        values[key], origin[key] = text, f"{variable}={text}"
    for key, value in values.items():
        try:
            values[key] = _NORMALISE[key](value)
        except ValueError as error:
            raise SettingsError(f"{origin[key]}: {error}") from None
    try:
        return Settings(**values)
    except SettingsError as error:
        sources = "; ".join(origin[key] for key in sorted(origin))
        raise SettingsError(f"{error} (set by: {sources})" if sources else str(error)) from None


def _known(key: str, source: str) -> None:
    if key in _NORMALISE:
        return
    close = difflib.get_close_matches(key, _NORMALISE, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(_NORMALISE))}"
    raise SettingsError(f"{source}: no such setting {key!r}; {hint}")


def _listener(value: object) -> str:
    if value not in LISTENERS:
        raise ValueError(f"must be one of {', '.join(map(repr, LISTENERS))}")
    if value not in LISTENERS_AVAILABLE:
        raise ValueError(f"this listener mode is not available yet: use {LISTENERS_AVAILABLE[0]!r}")
    return str(value)


def _seconds(*, least: float, most: float = 86_400.0) -> Callable[[object], float]:
    def normalise(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("must be a number of seconds")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError("must be a number of seconds") from None
        if not least <= number <= most:  # false for NaN as well
            raise ValueError(f"must be between {least:g} and {most:g} seconds")
        return number

    return normalise


def _path(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"/[^\s?#]*[^\s?#/]", value):
        raise ValueError("must be an absolute path without query and without a slash at its end, such as '/readyz'")
    return value


def _paths(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of paths, such as ['/', '/search?q=warm']")
    for path in value:
        if not isinstance(path, str) or not re.fullmatch(r"/[^\s#]*", path):
            raise ValueError(f"{path!r} is no path: each must begin with '/' and hold no space")
    return tuple(value)


def _generations(value: object) -> int:
    if isinstance(value, bool) or not str(value).isdigit() or not 2 <= int(str(value)) <= 100:
        raise ValueError("must be a whole number between 2 (the old and the new) and 100")
    return int(str(value))


def _switch(value: object) -> bool:
    word = str(value).lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError("must be True or False")


def _absolute(value: object) -> str:
    if not isinstance(value, str) or (value and not value.startswith("/")):
        raise ValueError("must be an absolute path, or empty for none")
    return value


def _header(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9-]*", value):
        raise ValueError("must be a header name of letters, digits and '-', or empty for none")
    return value


def _name(value: object) -> str:
    # It becomes part of a memfd's name, which the kernel limits to 249 bytes, and of log lines.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._:@/\[\]-]{0,100}", value):
        raise ValueError("must be at most 100 letters, digits or any of . _ : @ / [ ] -")
    return value


_NORMALISE: dict[str, Callable[[object], Any]] = {
    "listener": _listener,
    "upgrade_timeout": _seconds(least=1),
    "grace_period": _seconds(least=1),
    "drain_delay": _seconds(least=0),
    "recycle_timeout": _seconds(least=0),
    "warmup": _paths,
    "max_generations": _generations,
    "keep_pid": _switch,
    "release_dir": _absolute,
    "env_file": _absolute,
    "liveness_path": _path,
    "readiness_path": _path,
    "health_path": _path,
    "generation_header": _header,
    "name": _name,
}
