"""Where settings come from, which source wins, and what to call each in an error.

`merge()` puts the sources in their order: defaults (one more inside Kubernetes), Django's settings module, `install()`,
environment. Every error
names its source: an operator must be able to tell from the message alone which file or variable to edit, and what to
write there.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from zdd_web.errors import SettingsError
from zdd_web.settings.model import APP_SETTINGS, DEFAULT_GRACE_PERIOD, Settings
from zdd_web.settings.values import NORMALISE, check_name, hint, spelled

ENV_PREFIX = "ZDD_WEB_"
HANDOVER = "ZDD_WEB_HANDOVER"

#: Kubernetes sets it in every container. It removes a stopping pod from its Services while the pod is told to stop, and
#: not before: load balancers go on sending for some seconds.
IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
DRAIN_DELAY_IN_KUBERNETES = 10.0


#: Kubernetes tells every pod of a namespace of each Service there: of one that is named `zdd-web`, like this.
_SERVICE_LINK = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)\Z")


class Source(enum.Enum):
    """Who may set something, the weakest first."""

    KUBERNETES = "the default inside Kubernetes"
    DJANGO = "Django's settings module"
    INSTALL = "install()"
    ENVIRONMENT = "environment"


class Origin(NamedTuple):
    """Where a value comes from; `text` names the place and the value as it was written there."""

    source: Source
    text: str


class FrameworkSettings(NamedTuple):
    """A `ZDD_WEB` dictionary of Django's settings or of a Flask app's config, checked, with its names in lower case."""

    source: str
    values: Mapping[str, Any]
    #: The values as they were written.
    said: Mapping[str, Any]
    #: Django's settings module, if it is one.
    module: str = ""

    @classmethod
    def read(cls, source: str, raw: object, module: str = "") -> FrameworkSettings:
        """Check a dictionary. Raises `SettingsError` for an unknown name or a value that cannot work.

        >>> FrameworkSettings.read("app.config['ZDD_WEB']", {"GRACE_PERIOD": 20}).values
        {'grace_period': 20.0}
        """
        if not isinstance(raw, Mapping):
            raise SettingsError(f"{source}: {raw!r} is not a dictionary: write ZDD_WEB = {{'GRACE_PERIOD': 30}}")
        names = {name.upper(): name for name in NORMALISE}
        values: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in names:
                raise SettingsError(f"{source}: no such setting {key!r}; {hint(str(key).upper(), names)}")
            try:
                values[names[key]] = NORMALISE[names[key]](value)
            except ValueError as error:
                raise SettingsError(f"{source}: {key} = {value!r}: {error}") from None
        return cls(source, values, {names[key]: value for key, value in raw.items()}, module)

    @classmethod
    def of_django(cls, settings: Any) -> FrameworkSettings:
        """Check what `django.conf.settings` says; it is handed in, since this module imports no framework."""
        # None under `settings.configure()` and under `override_settings`.
        module = getattr(settings, "SETTINGS_MODULE", None) or ""
        return cls.read(django_source(module), getattr(settings, "ZDD_WEB", {}), module)

    def text(self, name: str) -> str:
        """Name a value and its place."""
        return f"{self.source}: {name.upper()} = {self.said[name]!r}"


def django_source(module: str) -> str:
    """Name the dictionary of a settings module."""
    return f"ZDD_WEB in Django's settings module {module}" if module else "ZDD_WEB in Django's settings"


class Sourced(NamedTuple):
    """Settings, and for each that was set, where."""

    settings: Settings
    origin: Mapping[str, Origin]
    django: FrameworkSettings | None = None

    @property
    def fixed(self) -> frozenset[str]:
        """The names that are set by something stronger than an app."""
        return frozenset(name for name, origin in self.origin.items() if origin.source is not Source.DJANGO)

    def text(self, name: str) -> str:
        """Name a value and its place, as `FrameworkSettings.text` does."""
        value = getattr(self.settings, name)
        return self.origin[name].text if name in self.origin else f"the default {name.upper()} = {spelled(value)}"


def resolve(
    installed: Mapping[str, Any], environ: Mapping[str, str], django: FrameworkSettings | None = None
) -> Settings:
    """Merge defaults, Django's settings module, the arguments of `install()` and `ZDD_WEB_*` variables.

    Raises `SettingsError`.

    >>> resolve({"grace_period": 20}, {"ZDD_WEB_NAME": "shop"}).name
    'shop'
    """
    return merge(installed, environ, django).settings


def merge(installed: Mapping[str, Any], environ: Mapping[str, str], django: FrameworkSettings | None = None) -> Sourced:
    """Do as `resolve()`, and keep where each value comes from."""
    values, origin = collect(installed, environ, django)
    try:
        return Sourced(Settings(**values), origin, django)
    except SettingsError as error:
        sources = "; ".join(origin[key].text for key in sorted(origin))
        raise SettingsError(f"{error} (set by: {sources})" if sources else str(error)) from None


def collect(
    installed: Mapping[str, Any], environ: Mapping[str, str], django: FrameworkSettings | None = None
) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Check each name, and each value that wins, for itself; return them and where they come from.

    The environment wins over `install()`: it is what an operator changes without a commit. `install()` wins over
    Django's settings, which several services may share. Raises `SettingsError`.
    """
    values: dict[str, Any] = {}
    origin: dict[str, Origin] = {}
    if IN_KUBERNETES in environ:
        text = f"the default DRAIN_DELAY inside Kubernetes ({IN_KUBERNETES} is set)"
        values["drain_delay"], origin["drain_delay"] = DRAIN_DELAY_IN_KUBERNETES, Origin(Source.KUBERNETES, text)
    if django is not None:
        values.update(django.values)
        origin.update({key: Origin(Source.DJANGO, django.text(key)) for key in django.values})
    for key, value in installed.items():
        check_name(key, f"install({key}=...)")
        values[key], origin[key] = value, Origin(Source.INSTALL, f"install({key}={value!r})")
    for variable, text in sorted(environ.items()):
        # What a master hands to its successor is not a setting; it is still there where no install() has taken it out.
        if not variable.startswith(ENV_PREFIX) or variable == HANDOVER:
            continue
        if IN_KUBERNETES in environ and _SERVICE_LINK.match(variable[len(ENV_PREFIX) :]):
            continue
        key = variable[len(ENV_PREFIX) :].lower()
        check_name(key, f"environment variable {variable}", lambda name: f"{ENV_PREFIX}{name.upper()}")
        values[key], origin[key] = text, Origin(Source.ENVIRONMENT, f"{variable}={text}")
    for key, value in values.items():
        try:
            values[key] = NORMALISE[key](value)
        except ValueError as error:
            raise SettingsError(f"{origin[key].text}: {error}") from None
    if "drain_delay" in origin and origin["drain_delay"].source is Source.KUBERNETES:
        # A default must fit into any GRACE_PERIOD.
        grace_period = values.get("grace_period", DEFAULT_GRACE_PERIOD)
        values["drain_delay"] = min(DRAIN_DELAY_IN_KUBERNETES, grace_period / 3)
    return values, origin


def of_app(settings: Settings, fixed: Collection[str], brought: FrameworkSettings) -> Settings:
    """Return the settings that one app is served with: its own app settings, where nothing stronger has set them.

    Raises `SettingsError` when they cannot work together.
    """
    values = {name: value for name, value in brought.values.items() if name in APP_SETTINGS and name not in fixed}
    if not values:
        return settings
    try:
        return dataclasses.replace(settings, **values)
    except SettingsError as error:
        raise SettingsError(f"{brought.source}: {error}") from None
