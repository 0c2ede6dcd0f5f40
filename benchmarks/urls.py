"""The Django views that `middleware.py` asks."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.urls import path


def view(request: HttpRequest, number: int) -> HttpResponse:
    """Answer."""
    return HttpResponse(b"ok\n")


async def aview(request: HttpRequest, number: int) -> HttpResponse:
    """Answer from the event loop."""
    return HttpResponse(b"ok\n")


urlpatterns = [path("sync/<int:number>", view), path("async/<int:number>", aview)]
