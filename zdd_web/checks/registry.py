"""Which checks there are: those of each app, and those that all apps of the process share.

`@zdd_web.check` registers a check that is shared: the right thing for a module of a process with one app. An app that
is made by a factory has a registry of its own, so that a second app, in a test, does not run the checks of the first.
A worker of gunicorn runs all of them: it is one thing to whatever probes it.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from zdd_web.board import MAX_CHECKS
from zdd_web.errors import SettingsError
from zdd_web.health import Kind

F = TypeVar("F", bound=Callable[[], Any])

_KINDS = {kind.label: kind for kind in Kind}


class Check(NamedTuple):
    """One check. `timeout` and `interval` are in seconds; only `critical` ones have a say."""

    name: str
    function: Callable[[], Any]
    timeout: float = 2.0
    interval: float = 10.0
    critical: bool = True
    kind: Kind = Kind.READINESS


#: Is called with a check that is registered when others run already, in a worker.
listener: Callable[[Check], None] | None = None

_all: weakref.WeakSet[Registry] = weakref.WeakSet()
_all_lock = threading.Lock()

_numbers = itertools.count(1)

#: Changes whenever a check of any registry does, or the settings of this process. Read on every request.
version = 0


def changed() -> None:
    """Have whatever was made of checks and settings be made again: one of them has changed."""
    global version
    version = next(_numbers)


class Registry:
    """The checks of one app, after those that are shared.

    >>> registry = Registry()
    >>> @registry.check("doctest")
    ... def always(): ...
    >>> [each.name for each in registry.registered()]
    ['doctest']
    """

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self.number = next(_numbers)
        with _all_lock:
            _all.add(self)
        changed()

    def check(
        self, name: str, *, kind: str = "readiness", timeout: float = 2.0, interval: float = 10.0, critical: bool = True
    ) -> Callable[[F], F]:
        """Register a function as a check of this app; see `zdd_web.check`. Raises `SettingsError`."""
        _validate(name, kind, timeout, interval)

        def register(function: F) -> F:
            # In a worker where they run already, those of other apps have their names and places on the board too.
            known = by_name() if listener is not None else self.by_name()
            _refuse_another(name, known.get(name), function)
            if name not in known and len(known) >= MAX_CHECKS:
                raise SettingsError(f"check {name!r} is one too many: a process may have {MAX_CHECKS}; combine some")
            made = Check(name, function, float(timeout), float(interval), bool(critical), _KINDS[kind])
            self._checks[name] = made
            changed()
            if listener is not None:
                listener(made)
            return function

        return register

    def by_name(self) -> dict[str, Check]:
        """Return its checks by their names."""
        return {**shared._checks, **self._checks}

    def registered(self) -> list[Check]:
        """Return its checks, in the order in which they were registered, those that are shared first."""
        return list(self.by_name().values())

    def kinds(self) -> dict[str, Kind]:
        """Return the names of its checks and their kinds."""
        return {name: each.kind for name, each in self.by_name().items()}

    def clear(self) -> None:
        """Forget its checks, but for those that are shared."""
        self._checks.clear()
        changed()


#: The checks that all apps of this process have.
shared = Registry()


def check(
    name: str, *, kind: str = "readiness", timeout: float = 2.0, interval: float = 10.0, critical: bool = True
) -> Callable[[F], F]:
    """Register a function, sync or async, as a check. It fails when it raises, returns False or takes too long.

    It runs when a worker is to get ready, and then each `interval` seconds, for at most `timeout` seconds. `kind` is
    the probe that it affects: "readiness", "liveness" (where taking too long is not a failure), or "startup", which
    is only asked of new workers. One that is not `critical` is reported, and has no other consequence.

    All apps of the process have it. Registered again, by the same place in the code, it replaces the one before.
    Raises `SettingsError` for a name that another function has, or that cannot be logged, and for a value that cannot
    work.

    >>> @check("doctest", critical=False)
    ... def always():
    ...     return True
    """
    return shared.check(name, kind=kind, timeout=timeout, interval=interval, critical=critical)


def _validate(name: object, kind: str, timeout: object, interval: object) -> None:
    if callable(name):
        raise SettingsError(f"check: {place(name)} was decorated without a name: write @zdd_web.check('database')")
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()) or len(name) > 48:
        raise SettingsError(f"check {name!r}: a name must be letters, digits and '_', such as 'database'")
    if kind not in _KINDS:
        raise SettingsError(f"check {name!r}: kind = {kind!r} must be one of {', '.join(map(repr, _KINDS))}")
    for what, value, most in (("timeout", timeout, 60), ("interval", interval, 3600)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise SettingsError(f"check {name!r}: {what} = {value!r} must be seconds between 0 and {most}")


def _refuse_another(name: str, known: Check | None, function: Callable[[], Any]) -> None:
    if known is not None and place(known.function) != place(function):
        raise SettingsError(
            f"check {name!r} is registered twice, by {place(known.function)} and {place(function)}: "
            f"give one of them another name"
        )


def place(function: Callable[[], Any]) -> str:
    """Return where a check is defined.

    A module may be imported again, under pytest or after a failed import: the same place is the same check.
    """
    if isinstance(function, functools.partial):
        return f"{place(function.func)}({', '.join(f'{key}={value!r}' for key, value in function.keywords.items())})"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def remember() -> Callable[[], None]:
    """Return what takes the shared checks back to how they are now, and forgets those of apps made since; for tests."""
    with _all_lock:
        known, apps = dict(shared._checks), set(_all)

    def restore() -> None:
        shared._checks = known
        with _all_lock:
            since = set(_all) - apps
        for registry in since:
            registry.clear()
        # Where no app was made since, nothing else has noted that the shared ones are others.
        changed()

    return restore


def by_name() -> dict[str, Check]:
    """Return the checks of all apps of this process, by their names.

    Of two apps that one factory has made the later one counts. Raises `SettingsError` when different functions of two
    apps have one name.
    """
    found = dict(shared._checks)
    with _all_lock:
        registries = sorted(_all, key=lambda each: each.number)
    for registry in registries:
        for name, each in registry._checks.items():
            _refuse_another(name, found.get(name), each.function)
            found[name] = each
    return found


def registered() -> list[Check]:
    """Return the checks of all apps of this process. Raises `SettingsError`, see `by_name()`."""
    return list(by_name().values())


def kinds() -> dict[str, Kind]:
    """Return the names and kinds of the checks of all apps. Raises `SettingsError`, see `by_name()`."""
    return {name: each.kind for name, each in by_name().items()}


def count() -> int:
    """Return how many there are in all apps."""
    return len(by_name())
