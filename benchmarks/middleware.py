"""What the adaptors cost a request that is no probe: nanoseconds through each, beside the bare app.

`python -m benchmarks.middleware`. Everything runs in this process, without a server: what is left is the app, which
does as little as its framework allows, and what stands before it. Both are asked in turns, and of many short rounds
the fastest counts: whatever else the machine does only ever adds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import click
from tabulate import tabulate

Ask = Callable[[int], float]

ENVIRON = {
    "REQUEST_METHOD": "GET", "PATH_INFO": "/orders/4711", "QUERY_STRING": "", "REMOTE_ADDR": "10.0.0.7",
    "SERVER_NAME": "shop", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http",
}  # fmt: skip
SCOPE = {
    "type": "http", "http_version": "1.1", "method": "GET", "path": "/orders/4711", "root_path": "",
    "query_string": b"", "headers": [], "client": ("10.0.0.7", 4711),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Nanoseconds a request takes without and with an adaptor."""

    adaptor: str
    bare: float
    adapted: float

    @property
    def added(self) -> float:
        """What the adaptor adds."""
        return self.adapted - self.bare

    @property
    def ratio(self) -> float:
        """Time with, divided by that without."""
        return self.adapted / self.bare


def called(function: Callable[..., object], *arguments: object) -> Ask:
    """Ask by calling a function; return the seconds that `count` calls took."""

    def ask(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            function(*arguments)
        return time.perf_counter() - began

    return ask


def awaited(function: Callable[..., Awaitable[object]], *arguments: object) -> Ask:
    """Ask by awaiting what a function returns, in one event loop."""

    async def loop(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            await function(*arguments)
        return time.perf_counter() - began

    return lambda count: asyncio.run(loop(count))


def wsgi() -> tuple[Ask, Ask]:
    """`zdd_web.wsgi.ProbeMiddleware`."""
    from zdd_web.wsgi import ProbeMiddleware

    body = [b"ok\n"]

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return body

    def start_response(*said: object) -> None: ...

    return called(app, ENVIRON, start_response), called(ProbeMiddleware(app), ENVIRON, start_response)


def asgi() -> tuple[Ask, Ask]:
    """`zdd_web.asgi.ProbeMiddleware`."""
    from zdd_web.asgi import ProbeMiddleware

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok\n"})

    async def send(message: Any) -> None: ...

    return awaited(app, SCOPE, None, send), awaited(ProbeMiddleware(app), SCOPE, None, send)


def flask() -> tuple[Ask, Ask]:
    """`zdd_web.flask.ZddWeb`: a Flask app with one view, through `wsgi_app`."""
    from flask import Flask

    from zdd_web.flask import ZddWeb

    def made(name: str) -> Flask:
        app = Flask(name)
        app.add_url_rule("/orders/<int:number>", view_func=lambda number: "ok\n")
        return app

    adapted = made("with")
    ZddWeb(adapted)

    def start_response(*said: object) -> None: ...

    # Flask writes into it.
    return (
        called(lambda app: app.wsgi_app(dict(ENVIRON), start_response), made("without")),
        called(lambda app: app.wsgi_app(dict(ENVIRON), start_response), adapted),
    )


def django(kind: str) -> tuple[Ask, Ask]:
    """`zdd_web.django.middleware.ProbeMiddleware` in Django's own chain of middleware, sync or async."""
    from django.conf import settings
    from django.core.handlers.base import BaseHandler
    from django.test import RequestFactory, override_settings

    if not settings.configured:
        import django

        settings.configure(ROOT_URLCONF="benchmarks.urls", INSTALLED_APPS=["zdd_web"], ALLOWED_HOSTS=["*"])
        django.setup()
    chains = []
    for middleware in ([], ["zdd_web.django.middleware.ProbeMiddleware"]):
        handler = BaseHandler()
        with override_settings(MIDDLEWARE=middleware):
            handler.load_middleware(is_async=kind == "async")
        chains.append(handler.get_response_async if kind == "async" else handler.get_response)
    request = RequestFactory().get(f"/{kind}/4711")
    if kind == "async":
        without, with_it = (awaited(chain, request) for chain in chains)
    else:
        without, with_it = (called(chain, request) for chain in chains)
    return without, with_it


ADAPTORS: dict[str, Callable[[], tuple[Ask, Ask]]] = {
    "WSGI": wsgi,
    "Flask": flask,
    "Django, sync": lambda: django("sync"),
    "Django, async": lambda: django("async"),
    "ASGI": asgi,
}


def measure(adaptor: str, rounds: int, requests: int) -> Cost:
    """Ask both sides in turns; the fastest round of each counts."""
    sides = ADAPTORS[adaptor]()
    for ask in sides:
        ask(requests)
    best = [float("inf")] * 2
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            # ABBA, as in overhead.py.
            for side in (0, 1) if number % 2 else (1, 0):
                best[side] = min(best[side], sides[side](requests) / requests * 1e9)
    finally:
        gc.enable()
    return Cost(adaptor, *best)


def table(costs: list[Cost]) -> str:
    """Return the result as it is printed."""
    rows = [
        (cost.adaptor, f"{cost.bare:,.0f}", f"{cost.adapted:,.0f}", f"{cost.added:,.0f}", f"{cost.ratio:.3f}")
        for cost in costs
    ]
    return tabulate(rows, ("adaptor", "bare app, ns", "with it, ns", "added, ns", "ratio"), disable_numparse=True,
                    colalign=("left", *["right"] * 4))  # fmt: skip


@click.command()
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1), help="Of each side.")
@click.option("--requests", default=200, show_default=True, type=click.IntRange(1), help="In a round.")
@click.option("--json", "json_file", type=click.File("w"), help="Write the result to FILE ('-' for stdout) too.")
def main(rounds: int, requests: int, json_file: TextIO | None) -> None:
    """Measure what each adaptor adds to a request that is no probe."""
    costs = [measure(adaptor, rounds, requests) for adaptor in ADAPTORS]
    click.echo(table(costs))
    if json_file is not None:
        said = [{**asdict(cost), "added": cost.added, "ratio": cost.ratio} for cost in costs]
        json.dump({"rounds": rounds, "requests": requests, "costs": said}, json_file, indent=2)


if __name__ == "__main__":
    main()
