"""The Flask extension: `ZddWeb(app)`, or `zdd = ZddWeb()` and `zdd.init_app(app)`.

Settings are in `app.config["ZDD_WEB"]`, in upper case: `{"READINESS_PATH": "/ready"}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import flask

from zdd_web import process
from zdd_web.checks import Registry
from zdd_web.errors import SettingsError
from zdd_web.settings import FrameworkSettings
from zdd_web.wsgi import ProbeMiddleware, Probes

__all__ = ["ZddWeb"]

EXTENSION = "zdd_web"

F = TypeVar("F", bound=Callable[[], Any])


class ZddWeb:
    """Make a Flask app answer probes, before its own routing, `before_request` functions and extensions.

    The object holds no state: one may serve several apps.
    """

    def __init__(self, app: flask.Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Wrap `app.wsgi_app`. A second call for the same app does nothing.

        `app.config["ZDD_WEB"]` may be set later, before the first request. Raises `SettingsError` when what is there
        already cannot work.
        """
        if EXTENSION in app.extensions:
            return
        settings_of(app)
        own = app.extensions[EXTENSION] = Registry()
        # In a gunicorn worker all apps are heard when they have been loaded.
        process.register_app_settings(app, settings_of)
        app.wsgi_app = ProbeMiddleware(  # type: ignore[method-assign]
            app.wsgi_app, Probes(lambda: settings_of(app), own)
        )

    def check(self, app: flask.Flask, name: str, **options: Any) -> Callable[[F], F]:
        """Register a check of this app alone; `zdd_web.check` has the options, and registers for all apps.

        Raises `SettingsError`, also for an app that was not given to `init_app`.
        """
        return registry_of(app).check(name, **options)


def registry_of(app: flask.Flask) -> Registry:
    """Return the checks of an app. Raises `SettingsError` for one that was not given to `ZddWeb`."""
    if EXTENSION not in app.extensions:
        raise SettingsError(f"Flask app {app.name!r} was not given to ZddWeb: write ZddWeb(app), or zdd.init_app(app)")
    found: Registry = app.extensions[EXTENSION]
    return found


def settings_of(app: flask.Flask) -> FrameworkSettings:
    """Check what an app's config says. Raises `SettingsError`."""
    return FrameworkSettings.read(f"app.config['ZDD_WEB'] of Flask app {app.name!r}", app.config.get("ZDD_WEB", {}))
