"""A Django project in one file, with Channels for its websockets. Run from this directory by gunicorn."""

import asyncio
import contextlib

import django
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path

import zdd_web
from zdd_web.asgi import ProbeMiddleware

settings.configure(
    ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of-a-rehearsal", INSTALLED_APPS=["zdd_web", "channels"]
)
django.setup()


async def index(request):
    await asyncio.sleep(0.01)
    return HttpResponse("ok\n", content_type="text/plain")


urlpatterns = [path("", index)]


class Echo(AsyncWebsocketConsumer):
    """Knows nothing of zdd_web: its connection is closed with 1012."""

    async def receive(self, text_data=None, bytes_data=None):
        await self.send(text_data)


class Feed(AsyncWebsocketConsumer):
    """Sends numbers on and on, and knows nothing of zdd_web either."""

    async def connect(self):
        await self.accept()
        self.task = asyncio.create_task(self.count())

    async def disconnect(self, code):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def count(self):
        number = 0
        while True:
            await self.send(str(number))
            number += 1
            await asyncio.sleep(0.02)


class Chat(AsyncWebsocketConsumer):
    """Ends its conversations itself, half a second after its worker begins to leave: `bye`, a `bye` back, and 1001."""

    async def connect(self):
        await self.accept()
        self.task = asyncio.create_task(self.end_when_leaving())

    async def disconnect(self, code):
        self.task.cancel()

    async def receive(self, text_data=None, bytes_data=None):
        if text_data == "bye":
            await self.close(code=1001)
        else:
            await self.send(text_data)

    async def end_when_leaving(self):
        await zdd_web.drain_event().wait_async()
        await asyncio.sleep(0.5)
        await self.send("bye")


application = ProbeMiddleware(
    ProtocolTypeRouter(
        {
            "http": get_asgi_application(),
            "websocket": URLRouter(
                [path("echo", Echo.as_asgi()), path("feed", Feed.as_asgi()), path("chat", Chat.as_asgi())]
            ),
        }
    )
)
