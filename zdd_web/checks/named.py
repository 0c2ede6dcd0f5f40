"""The setting CHECKS: dotted paths to functions, to modules that register some, to django-health-check's classes."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Iterable
from typing import Any

from zdd_web.checks import registry as registries
from zdd_web.checks.registry import Registry
from zdd_web.errors import SettingsError
from zdd_web.settings import CheckSetting

_OURS = ("name", "kind", "timeout", "interval", "critical")

#: A function that is to be named in CHECKS may bring other defaults: `function.zdd_check = {"kind": "startup"}`.
DEFAULTS = "zdd_check"


def load(settings: Iterable[CheckSetting], source: str = "CHECKS", into: Registry | None = None) -> None:
    """Import and register what CHECKS names, as shared checks or `into` the registry of an app.

    Options of a check (`name`, `kind`, `timeout`, `interval`, `critical`) are taken, all others go to the function or
    the class. Raises `SettingsError` for what is not there, is not a check, or contains none.
    """
    registry = into if into is not None else registries.shared
    for path, options in settings:
        found = _find(path, source)
        if isinstance(found, types.ModuleType):
            _expect_checks_of(found, path, source, registry)
            continue
        if not callable(found):
            raise SettingsError(f"{source}: {path} is {type(found).__name__}, and no function")
        ours = {**getattr(found, DEFAULTS, {}), **{key: value for key, value in options.items() if key in _OURS}}
        theirs = {key: value for key, value in options.items() if key not in _OURS}
        try:
            function = _function(found, theirs)
            name = ours.pop("name", None) or path.rpartition(".")[2].lower()
            registry.check(name, **ours)(function)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{source}: {path} with {dict(options)}: {error}") from None
        except SettingsError as error:
            raise SettingsError(f"{source}: {path}: {error}") from None


def _find(path: str, source: str) -> Any:
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_path == error.name or module_path.startswith(f"{error.name}.")):
            raise  # something that the module itself imports
        raise SettingsError(f"{source}: {path}: there is no module {error.name!r}") from None
    if hasattr(module, name):
        return getattr(module, name)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise SettingsError(f"{source}: {path}: module {module_path!r} has no {name!r}") from None


def _expect_checks_of(module: types.ModuleType, path: str, source: str, registry: Registry) -> None:
    modules = [str(getattr(each.function, "__module__", "")) for each in registry.registered()]
    brought = [each for each in modules if each == path or each.startswith(f"{path}.")]
    if not brought:
        known = len(registry.registered())
        raise SettingsError(
            f"{source}: module {path} registers no check ({known} are known): name a function in it, or decorate "
            f"one with @zdd_web.check(...)"
        )


def _function(found: Any, options: dict[str, Any]) -> Any:
    if inspect.isclass(found):
        if not callable(getattr(found, "run", None)):
            raise TypeError("it is a class without run()")
        # As django-health-check has them, from 4 on: a dataclass with its options, whose `run()` raises.
        instance: Any = found(**options)
        return _bound(instance.run, found)
    if not options:
        inspect.signature(found).bind()
        return found
    inspect.signature(found).bind(**options)
    return functools.partial(found, **options)


def _bound(run: Any, found: type) -> Any:
    if inspect.iscoroutinefunction(run):

        async def call_async() -> Any:
            return await run()

        call: Any = call_async
    else:

        def call_sync() -> Any:
            return run()

        call = call_sync
    call.__module__, call.__qualname__ = found.__module__, found.__qualname__
    return call
