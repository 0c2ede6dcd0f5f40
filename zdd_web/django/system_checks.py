"""Django's system checks for zdd_web: `manage.py check`, with those for production under `--deploy`.

`AppConfig.ready()` registers them. Where the app is not installed, the middleware's import registers the one that says
so, which is then as late as that import. Settings are read at each run, so `override_settings` works.
"""

from __future__ import annotations

import os
import re
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register  # noqa: A004

from zdd_web import checks
from zdd_web.errors import SettingsError
from zdd_web.health import table
from zdd_web.settings import FrameworkSettings, Settings, collect

#: `manage.py check --tag zdd_web` runs these and no others.
TAG = "zdd_web"
MIDDLEWARE = "zdd_web.django.middleware.ProbeMiddleware"
SECURITY = "django.middleware.security.SecurityMiddleware"
COMMON = "django.middleware.common.CommonMiddleware"

#: Longer than any other setting could ask for.
_ANY_GRACE_PERIOD = 86_400.0

Found = list[CheckMessage]


def register_all() -> None:
    """Register all checks; a second call changes nothing."""
    for check in (check_settings, check_middleware):
        register(check, TAG)
    for check in (check_redirect, check_hosts):
        register(check, TAG, deploy=True)


def register_for_middleware() -> None:
    """Register what can be said where only the middleware is there."""
    register(check_installed, TAG)


def check_settings(app_configs: Any = None, **kwargs: Any) -> Found:
    """ZDD_WEB, with what the environment adds, can work."""
    try:
        values, _ = collect({}, os.environ, FrameworkSettings.of_django(settings))
    except SettingsError as error:
        return [Error(str(error), hint="All settings stand in docs/reference/settings.md.", id="zdd_web.E001")]
    trouble = _trouble(values)
    if not trouble:
        return _check_checks(values)
    if "grace_period" not in values and not _trouble({**values, "grace_period": _ANY_GRACE_PERIOD}):
        # It is not set here: gunicorn.conf.py may set it, which no management command reads.
        hint = "Set GRACE_PERIOD in ZDD_WEB, or silence this where gunicorn.conf.py has install(grace_period=...)."
        return [Warning(trouble, hint=hint, id="zdd_web.W004")]
    return [Error(trouble, hint="gunicorn would refuse to start, or a worker to boot.", id="zdd_web.E002")]


def _check_checks(values: dict[str, Any]) -> Found:
    try:
        checks.load(values.get("checks", ()), "CHECKS in ZDD_WEB")
    except (SettingsError, ImportError) as error:
        return [Error(str(error), hint="No worker would boot: fix the path or its options.", id="zdd_web.E003")]
    return []


def _trouble(values: dict[str, Any]) -> str:
    try:
        Settings(**values)
    except SettingsError as error:
        return str(error)
    return ""


def check_middleware(app_configs: Any = None, **kwargs: Any) -> Found:
    """ProbeMiddleware is there, and first."""
    before = _before()
    if before is None:
        hint = (
            f"Put {MIDDLEWARE!r} first, or silence this where wsgi.py or asgi.py wraps the application in "
            f"zdd_web.wsgi.ProbeMiddleware or zdd_web.asgi.ProbeMiddleware."
        )
        return [Warning("MIDDLEWARE has no ProbeMiddleware: nothing answers probes.", hint=hint, id="zdd_web.W001")]
    if before:
        text = f"ProbeMiddleware is number {len(before) + 1} in MIDDLEWARE: every probe passes {', '.join(before)}."
        hint = f"Put {MIDDLEWARE!r} first: a probe needs no session, no login, no database and no known host."
        return [Warning(text, hint=hint, id="zdd_web.W002")]
    return []


def check_installed(app_configs: Any = None, **kwargs: Any) -> Found:
    """The app is installed where its middleware is used."""
    if any((config.label, config.name) == ("zdd_web", "zdd_web.django") for config in apps.get_app_configs()):
        return []
    text = "ProbeMiddleware is used and the app is not installed: no system checks, no phase_changed, no manage.py zdd."
    return [Warning(text, hint="Put 'zdd_web' into INSTALLED_APPS.", id="zdd_web.W003")]


def check_redirect(app_configs: Any = None, **kwargs: Any) -> Found:
    """A probe over http is not sent to https."""
    if not settings.SECURE_SSL_REDIRECT or not _comes_first(SECURITY):
        return []
    exempt = [re.compile(each) for each in settings.SECURE_REDIRECT_EXEMPT]
    paths = [path for path in _paths() if not any(each.search(path.lstrip("/")) for each in exempt)]
    if not paths:
        return []
    text = f"SECURE_SSL_REDIRECT = True sends probes over http to https: {', '.join(paths)}."
    hint = f"Put {MIDDLEWARE!r} before {SECURITY!r}: a prober takes a redirect for a success, or fails at TLS."
    return [Warning(text, hint=hint, id="zdd_web.W005")]


def check_hosts(app_configs: Any = None, **kwargs: Any) -> Found:
    """A probe under the pod's address as its Host is not refused."""
    if "*" in settings.ALLOWED_HOSTS or not _comes_first(COMMON):
        return []
    text = f"ALLOWED_HOSTS = {settings.ALLOWED_HOSTS!r} refuses probes with 400: their Host is the pod's address."
    hint = f"Put {MIDDLEWARE!r} before {COMMON!r}; ALLOWED_HOSTS can stay as it is."
    return [Warning(text, hint=hint, id="zdd_web.W006")]


def _before() -> list[str] | None:
    """Return what stands before ProbeMiddleware; None when that is not there."""
    middleware = list(settings.MIDDLEWARE)
    return middleware[: middleware.index(MIDDLEWARE)] if MIDDLEWARE in middleware else None


def _comes_first(other: str) -> bool:
    before = _before()
    return other in (settings.MIDDLEWARE if before is None else before)


def _paths() -> list[str]:
    try:
        values, _ = collect({}, os.environ, FrameworkSettings.of_django(settings))
        known = Settings(**values)
    except SettingsError:
        known = Settings()  # said by another check
    return [path for path in table(known) if not path.endswith("/")]
