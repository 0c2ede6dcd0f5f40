"""Probes in Django.

First in `MIDDLEWARE`, so that a probe is answered before host validation (Kubernetes asks with the pod's IP as Host),
before SECURE_SSL_REDIRECT, sessions and authentication. `request.path_info` needs none of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from zdd_web.django import system_checks
from zdd_web.probes import Probes
from zdd_web.settings import FrameworkSettings


def _settings() -> FrameworkSettings:
    return FrameworkSettings.of_django(settings)


_probes = Probes(_settings)
system_checks.register_for_middleware()


@receiver(setting_changed, dispatch_uid="zdd_web")
def _setting_changed(*, setting: str, **kwargs: Any) -> None:
    # `override_settings` sends this; nothing else may change Django's settings.
    if setting == "ZDD_WEB":
        _probes.forget()


class ProbeMiddleware:
    """Answer probes; pass everything else on untouched, sync or async.

    The paths are those of `settings.ZDD_WEB`. Raises `SettingsError` when it cannot work.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        _settings()  # an error belongs to the start, not to the first request
        for problem in system_checks.check_installed():
            # Here too: no management command need ever import this module.
            if not problem.is_silenced():
                logging.getLogger("zdd_web").warning("%s: %s %s", problem.id, problem.msg, problem.hint)
        self.get_response = get_response
        self._async = iscoroutinefunction(get_response)
        if self._async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if _probes.asks(request.path_info):
            if self._async and _probes.must_wait():
                return self._later(request)
            response = _answer(request)
            if response is not None:
                return _now(response) if self._async else response
        # Async too: what the next one returns is awaited by the caller, and this adds no coroutine of its own.
        passed: HttpResponseBase | Awaitable[HttpResponseBase] = self.get_response(request)
        return passed

    async def _later(self, request: HttpRequest) -> HttpResponseBase:
        await asyncio.to_thread(_probes.wait)
        response: HttpResponseBase = _answer(request) or await self.get_response(request)
        return response


async def _now(response: HttpResponse) -> HttpResponseBase:
    return response


def _answer(request: HttpRequest) -> HttpResponse | None:
    headers = request.META
    reply = _probes.answer(
        request.path_info,
        request.method or "",
        query=headers.get("QUERY_STRING", ""),
        accept=headers.get("HTTP_ACCEPT", ""),
        peer=headers.get("REMOTE_ADDR") or "",
    )
    if reply is None:
        return None
    response = HttpResponse(reply.body, status=reply.status, reason=reply.reason)
    # A 503 is this probe's proper answer; Django would log it as an error and mail it to ADMINS.
    response._has_been_logged = True  # type: ignore[attr-defined]
    for name, value in reply.headers:
        response[name] = value
    return response
