"""The Django side: `INSTALLED_APPS = ["zdd_web", ...]` and `ProbeMiddleware` first in `MIDDLEWARE`."""
