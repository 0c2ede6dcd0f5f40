"""The settings in force in a generation: where they come from, and what happens when two places disagree.

The master merges Django's settings module (when `DJANGO_SETTINGS_MODULE` names one in its environment), `install()` and
the environment. The module is read by a child process (read_django_settings.py), at the first hook that sees gunicorn's
whole configuration: before, neither `chdir` nor `pythonpath` nor `raw_env` need be the last word. It is left out where
it is not imported within `UPGRADE_TIMEOUT`: most hold no `ZDD_WEB`, and if this one does, and contradicts what the
master runs with, its workers find that.

A worker then hears what its apps bring. Their app settings (the paths of the probes) are taken. For a master setting it
is too late: one that differs from what is in force, and that the master has not weighed itself, ends the worker's boot.

On SIGHUP the master stays, and so do its settings: the child that tries a reload reads all sources again and refuses it
when a master setting has changed. App settings may change, the new workers take them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from zdd_web import process
from zdd_web.errors import NeedsUpgrade, SettingsError
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.read_django_settings import SETTINGS_MODULE, read_django
from zdd_web.settings import (
    APP_SETTINGS,
    DEFAULT_UPGRADE_TIMEOUT,
    PROBE_SETTINGS,
    FrameworkSettings,
    Settings,
    Source,
    Sourced,
    collect,
    merge,
    spelled,
)

#: A reload brings new code into the workers: what that is called changes with it. No worker acts on it.
TAKEN_BY_A_RELOAD = frozenset({"release"})

_installed: Mapping[str, Any] = {}
_in_force: Sourced | None = None
_settled = False


# -- in the master


def take(installed: Mapping[str, Any]) -> None:
    """Note the arguments of `install()`, at the start and at each reload.

    Raises `SettingsError` for what no other source can fix.
    """
    global _installed, _settled
    collect(installed, os.environ)
    _installed, _settled = installed, False


def settle(cfg: Config) -> Settings:
    """Return the settings in force, from all sources; `cfg` is gunicorn's finished configuration.

    The first call reads Django's settings module, which may take some time. Raises `SettingsError`.
    """
    global _in_force, _settled
    if not _settled:
        environ = {**os.environ, **cfg.env}
        # After a reload, whose proof has found that nothing of the master's has changed there.
        django = _in_force.django if _in_force is not None else read_django(environ, _upgrade_timeout(environ))
        _in_force, _settled = merge(_installed, environ, django), True
    assert _in_force is not None
    return _in_force.settings


def in_force() -> Settings:
    """Return the settings in force: the master's one holder of them; the defaults before `settle()`."""
    return Settings() if _in_force is None else _in_force.settings


def refuse_changes(cfg: Config) -> None:
    """Read all sources again, in the child that tries a reload, and have it refused when the master's have changed.

    Raises `NeedsUpgrade` for such a change, and `SettingsError` for what cannot work.
    """
    global _in_force, _settled
    before = _in_force
    if before is None:
        return
    environ = {**os.environ, **cfg.env}
    django = read_django(environ, before.settings.upgrade_timeout)
    if django is None and environ.get(SETTINGS_MODULE):
        # Not read in time. If it has changed since the master read it, the app that is tried next contradicts it.
        django = before.django
    after = merge(_installed, environ, django)
    for field in dataclasses.fields(Settings):
        name = field.name
        old, new = getattr(before.settings, name), getattr(after.settings, name)
        if name not in (*APP_SETTINGS, *TAKEN_BY_A_RELOAD) and old != new:
            raise NeedsUpgrade(
                f"{name.upper()} changed from {spelled(old)} ({before.text(name)}) to {spelled(new)} "
                f"({after.text(name)}): SIGHUP keeps the master and its settings; "
                f"use an upgrade (SIGUSR2), which takes it over"
            )
    _in_force, _settled = after, True


def _upgrade_timeout(environ: Mapping[str, str]) -> float:
    values, _ = collect(_installed, environ)
    timeout: float = values.get("upgrade_timeout", DEFAULT_UPGRADE_TIMEOUT)
    return timeout


# -- in a worker


def apply_app_settings(settings: Settings) -> Settings:
    """Return the settings of this worker, now that its apps are loaded.

    `settings` are those of its master. Raises `SettingsError` when an app contradicts them.
    """
    master = _in_force or Sourced(settings, {})
    here = process.current()
    here.fixed = master.fixed
    here.settings = join(master, [*_of_django(), *process.app_settings()])
    return here.settings


def _of_django() -> list[FrameworkSettings]:
    # An app that uses Django has imported it, and one that does not shall not have to.
    conf = sys.modules.get("django.conf")
    if conf is None or not conf.settings.configured:
        return []
    return [FrameworkSettings.of_django(conf.settings)]


def join(master: Sourced, brought: Sequence[FrameworkSettings]) -> Settings:
    """Return the master's settings with the app settings that apps bring.

    Raises `SettingsError` when an app contradicts the master, or another app.
    """
    values: dict[str, Any] = {}
    said_by: dict[str, FrameworkSettings] = {}
    if any(app.module for app in brought):
        # What the master has read in Django's settings may have been taken out there since.
        values = {name: getattr(Settings(), name) for name in APP_SETTINGS if _is_djangos(master, name)}
    for app in brought:
        for name, value in app.values.items():
            if name in TAKEN_BY_A_RELOAD:
                continue
            other = said_by.setdefault(name, app)
            if other.values[name] != value:
                raise SettingsError(
                    f"{app.text(name)} contradicts {other.text(name)}: the apps of one worker share its settings; "
                    f"give both the same value"
                )
            apart = master.settings.has_probe_port and name in PROBE_SETTINGS
            if name in APP_SETTINGS and name not in master.fixed and not apart:
                values[name] = value
            elif value != getattr(master.settings, name) and not _master_already_considered(master, app, name):
                raise SettingsError(
                    f"{app.text(name)} contradicts {master.text(name)}, which gunicorn's master runs with: "
                    f"{_remedy(master, app, name)}"
                )
    try:
        return dataclasses.replace(master.settings, **values)
    except SettingsError as error:
        places = "; ".join(said_by[name].text(name) for name in sorted(values) if name in said_by)
        raise SettingsError(f"{error} (set by: {places})") from None


def _is_djangos(master: Sourced, name: str) -> bool:
    return name in master.origin and master.origin[name].source is Source.DJANGO


def _master_already_considered(master: Sourced, app: FrameworkSettings, name: str) -> bool:
    # The master has read this very value, and a stronger source has overruled it, as the order of sources has it.
    known = master.django
    return known is not None and known.source == app.source and known.values.get(name) == app.values[name]


def _remedy(master: Sourced, app: FrameworkSettings, name: str) -> str:
    upper, value = name.upper(), app.said[name]
    write = f"write install(globals(), {name}={value!r})"
    remove = f"take {upper} out of ZDD_WEB"
    if master.django is not None and master.django.source == app.source:
        return f"it has changed since the master read it; {remove}, or upgrade (SIGUSR2), which reads it again"
    if name not in master.origin or master.origin[name].source is Source.KUBERNETES:
        return f"{write}, or export {SETTINGS_MODULE}={app.module} for gunicorn's master" if app.module else write
    if master.origin[name].source is Source.INSTALL:
        return f"{write}, or {remove}"
    if master.origin[name].source is Source.ENVIRONMENT:
        text = value
        if isinstance(value, Mapping):
            text = ",".join(f"{key}={each}" for key, each in value.items())
        elif isinstance(value, (list, tuple)):
            text = ",".join(value)
        return f"export ZDD_WEB_{upper}={text}, or {remove}"
    return f"{remove} in one of the two"
