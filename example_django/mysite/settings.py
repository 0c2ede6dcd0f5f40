import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
# Read once: a running worker goes on naming the code that it runs.
VERSION = (BASE_DIR / "VERSION").read_text().strip()

# For development only: a real service sets DJANGO_SECRET_KEY.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "django-insecure-for-development-only")
DEBUG = os.environ.get("DJANGO_DEBUG") == "1"
ALLOWED_HOSTS = os.environ.get("DJANGO_ALLOWED_HOSTS", "localhost,127.0.0.1").split(",")

INSTALLED_APPS = ["zdd_web", "shop"]
MIDDLEWARE = [
    # First: a probe comes with the pod's address as its Host, which the others would refuse.
    "zdd_web.django.middleware.ProbeMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
]
ROOT_URLCONF = "mysite.urls"
# New code without its database, or with migrations that were not applied, does not take over.
ZDD_WEB = {"CHECKS": ["zdd_web.django.checks.database", "zdd_web.django.checks.migrations"]}
WSGI_APPLICATION = "mysite.wsgi.application"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / os.environ.get("DATABASE_PATH", "db.sqlite3"),
        "OPTIONS": {
            "init_command": "PRAGMA journal_mode=WAL;",
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
# Django sets it for the whole process: gunicorn's log lines in the workers would be in its default, Chicago.
TIME_ZONE = "UTC"

# Without DEBUG, Django's default sends tracebacks by mail only.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
    "loggers": {"django.request": {"level": "ERROR"}},  # no traceback for each 400
}
