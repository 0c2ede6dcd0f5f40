"""Where Django looks for the AppConfig of `INSTALLED_APPS = ["zdd_web"]`."""

from __future__ import annotations

from django.apps import AppConfig


class ZddWebConfig(AppConfig):
    """The one AppConfig. Django finds management commands under the path of `name`, hence the two names."""

    name = "zdd_web.django"
    label = "zdd_web"
    verbose_name = "zdd_web"
