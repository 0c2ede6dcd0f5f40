"""A Django project in one file: the settings, the urlconf and the views that tests/pure/test_django.py asks."""

from __future__ import annotations

import threading

from django.http import HttpRequest, HttpResponse
from django.urls import path

SECRET_KEY = "only for the tests"
ALLOWED_HOSTS = ["shop.example"]
ROOT_URLCONF = __name__
USE_TZ = True
INSTALLED_APPS = ["zdd_web", "django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
MIDDLEWARE = [
    "zdd_web.django.middleware.ProbeMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
]
# A session that is touched shows: in a cookie on the reply, and as a query that pytest-django forbids.
SESSION_SAVE_EVERY_REQUEST = True
SESSION_ENGINE = "django.contrib.sessions.backends.db"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}


def hello(request: HttpRequest) -> HttpResponse:
    """Answer as an app would."""
    return HttpResponse("the app")


async def ahello(request: HttpRequest) -> HttpResponse:
    """Answer as an async app would."""
    return HttpResponse("the async app")


async def athread(request: HttpRequest) -> HttpResponse:
    """Say which thread an async view runs in."""
    return HttpResponse(str(threading.get_ident()))


urlpatterns = [path("", hello), path("async", ahello), path("thread", athread)]
