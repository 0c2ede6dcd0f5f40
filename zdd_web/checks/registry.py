"""Which checks there are: one registry a process, whatever apps live in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from zdd_web.board import MAX_CHECKS
from zdd_web.errors import SettingsError
from zdd_web.health import Kind

F = TypeVar("F", bound=Callable[[], Any])

_KINDS = {kind.label: kind for kind in Kind}


@dataclass(frozen=True)
class Check:
    """One check. `timeout` and `interval` are in seconds; only `critical` ones have a say."""

    name: str
    function: Callable[[], Any]
    timeout: float = 2.0
    interval: float = 10.0
    critical: bool = True
    kind: Kind = Kind.READINESS


_checks: dict[str, Check] = {}

#: Is told of a check that is registered when others run already.
listener: Callable[[Check], None] | None = None


def check(
    name: str, *, kind: str = "readiness", timeout: float = 2.0, interval: float = 10.0, critical: bool = True
) -> Callable[[F], F]:
    """Register a function, sync or async, as a check. It fails when it raises, returns False or takes too long.

    It runs when a worker is to get ready, and then each `interval` seconds, for at most `timeout` seconds. `kind` is
    the probe that it has a say in: "readiness", "liveness" (where taking too long is no failure), or "startup", which
    is only asked of new workers. One that is not `critical` is reported, and has no other consequence.

    Raises `SettingsError` for a name that another function has, or that cannot be logged, and for a value that cannot
    work.

    >>> @check("doctest", critical=False)
    ... def always():
    ...     return True
    """
    if callable(name):
        raise SettingsError(f"check: {place(name)} was decorated without a name: write @zdd_web.check('database')")
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()) or len(name) > 48:
        raise SettingsError(f"check {name!r}: a name must be letters, digits and '_', such as 'database'")
    if kind not in _KINDS:
        raise SettingsError(f"check {name!r}: kind = {kind!r} must be one of {', '.join(map(repr, _KINDS))}")
    for what, value, most in (("timeout", timeout, 60), ("interval", interval, 3600)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise SettingsError(f"check {name!r}: {what} = {value!r} must be seconds between 0 and {most}")

    def register(function: F) -> F:
        known = _checks.get(name)
        if known is not None and place(known.function) != place(function):
            raise SettingsError(
                f"check {name!r} is registered twice, by {place(known.function)} and {place(function)}: "
                f"give one of them another name"
            )
        if known is None and len(_checks) >= MAX_CHECKS:
            raise SettingsError(f"check {name!r} is one too many: a process may have {MAX_CHECKS}; combine some")
        made = _checks[name] = Check(name, function, float(timeout), float(interval), bool(critical), _KINDS[kind])
        if known is None and listener is not None:
            listener(made)
        return function

    return register


def place(function: Callable[[], Any]) -> str:
    """Return where a check is defined.

    A module may be imported again, under pytest or after a failed import: the same place is the same check.
    """
    if isinstance(function, functools.partial):
        return f"{place(function.func)}({', '.join(f'{key}={value!r}' for key, value in function.keywords.items())})"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def registered() -> list[Check]:
    """Return all checks, in the order in which they were registered."""
    return list(_checks.values())


def kinds() -> dict[str, Kind]:
    """Return their names and kinds."""
    return {name: each.kind for name, each in _checks.items()}


def count() -> int:
    """Return how many there are: asked on every request, to learn of new ones."""
    return len(_checks)
