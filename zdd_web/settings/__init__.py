"""What can be set, where it may come from, and whether it can work."""

from __future__ import annotations

from zdd_web.settings.model import (
    APP_SETTINGS,
    DEFAULT_UPGRADE_TIMEOUT,
    PROBE_SETTINGS,
    REQUEST_HEADER,
    Settings,
    StopBudget,
)
from zdd_web.settings.sources import (
    ENV_PREFIX,
    HANDOVER,
    IN_KUBERNETES,
    FrameworkSettings,
    Origin,
    Source,
    Sourced,
    collect,
    django_source,
    merge,
    of_app,
    resolve,
)
from zdd_web.settings.values import DETAILS, LISTENERS, CheckSetting, spelled

__all__ = [
    "APP_SETTINGS",
    "DEFAULT_UPGRADE_TIMEOUT",
    "DETAILS",
    "ENV_PREFIX",
    "HANDOVER",
    "IN_KUBERNETES",
    "LISTENERS",
    "PROBE_SETTINGS",
    "REQUEST_HEADER",
    "CheckSetting",
    "FrameworkSettings",
    "Origin",
    "Settings",
    "Source",
    "Sourced",
    "StopBudget",
    "collect",
    "django_source",
    "merge",
    "of_app",
    "resolve",
    "spelled",
]
