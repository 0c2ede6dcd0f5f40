"""How an app uses the public names, for mypy alone: nothing here is executed.

`assert_type` says what a checker of the user sees; what it must refuse bears a `type: ignore` with the error's code,
and `warn_unused_ignores` (strict) fails where it is not refused any more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures

from typing_extensions import assert_type

import zdd_web
from zdd_web.gunicorn import install
from zdd_web.process import DrainEvent
from zdd_web.waitgroup import Entry


def receipt(order: int, *, copies: int = 1) -> str:
    return f"receipt of {order}" * copies


async def mail(address: str) -> bytes:
    return address.encode()


# -- what the process knows


def state() -> None:
    assert_type(zdd_web.phase(), zdd_web.Phase)
    assert_type(zdd_web.phase().label, str)
    assert_type(zdd_web.draining(), bool)
    assert_type(zdd_web.generation(), int)
    assert_type(zdd_web.successor_serves(), bool)
    assert_type(zdd_web.deadline(), float | None)
    assert_type(zdd_web.drain_event(), DrainEvent)
    assert_type(zdd_web.drain_event().wait(timeout=5), bool)


# -- background work


@zdd_web.background.task
def rebuild(index: str) -> int:
    return len(index)


@zdd_web.background.task(on_abandon=print)
def send(address: str) -> bool:
    return bool(address)


def offer_again(entry: Entry) -> None:
    assert_type(entry.group.name, str)
    entry.group.go(print, *entry.args, name=entry.name)
    with entry.group.track("again", on_abandon=offer_again) as again:
        assert_type(again, Entry)


def background() -> None:
    assert_type(zdd_web.background, zdd_web.WaitGroup)
    assert_type(zdd_web.background.go(receipt, 5, copies=2), concurrent.futures.Future[str])
    assert_type(rebuild("pages"), concurrent.futures.Future[int])
    assert_type(send("a@example.org"), concurrent.futures.Future[bool])
    with zdd_web.background.track("import"):
        pass
    rebuild(5)  # type: ignore[arg-type]
    send()  # type: ignore[call-arg]


async def in_a_loop() -> None:
    assert_type(zdd_web.background.create_task(mail("a@example.org")), asyncio.Task[bytes])
    zdd_web.background.create_task(mail)  # type: ignore[arg-type]


# -- checks and hooks keep the functions that they decorate


@zdd_web.check("database", timeout=2, kind="liveness")
def database() -> bool:
    return True


@zdd_web.check("cache", critical=False)
async def cache() -> None: ...


@zdd_web.on_stop
def stop() -> None: ...


@zdd_web.on_drained(timeout=2)
def drained() -> None: ...


async def decorated() -> None:
    assert_type(database(), bool)
    assert_type(await cache(), None)
    stop()
    drained()
    zdd_web.check(database)  # type: ignore[arg-type]


# -- errors, and the configuration of gunicorn


def errors() -> None:
    try:
        install(globals(), name="shop", grace_period=30, warmup=["/"])
    except zdd_web.SettingsError as error:
        assert_type(error, zdd_web.SettingsError)
        base: zdd_web.ZddError = error
        raise base from None
