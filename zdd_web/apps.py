"""Where Django looks for the AppConfig of `INSTALLED_APPS = ["zdd_web"]`."""

from __future__ import annotations

from django.apps import AppConfig


class ZddWebConfig(AppConfig):
    """The one AppConfig. Django finds management commands under the path of `name`, hence the two names."""

    name = "zdd_web.django"
    label = "zdd_web"
    verbose_name = "zdd_web"

    def ready(self) -> None:
        """Register the system checks, and have `phase_changed` sent."""
        # Not before: Django imports this file to learn what apps there are.
        from zdd_web.django import signals, system_checks

        system_checks.register_all()
        signals.listen()
