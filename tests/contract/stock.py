"""gunicorn's own objects, made as far as a test needs them."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from gunicorn import arbiter as module
from gunicorn.app.base import Application, BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


class App(BaseApplication):
    """An app with some settings."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self.before_reload: Callable[[], None] = lambda: None
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[..., Any]:
        return app

    def reload(self) -> None:
        self.before_reload()


class Checked(Application):
    """An app of gunicorn's command line."""

    def __init__(self, calls: list[str], **settings: Any) -> None:
        self._calls = calls
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[..., Any]:
        self._calls.append("load")
        return app


class Calls(list[str]):
    """Notes calls, in their order."""

    def noting(self, name: str, then: Any = None) -> Callable[..., Any]:
        """Return a function that notes its name and returns `then`, or raises it."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.append(name)
            if isinstance(then, BaseException):
                raise then
            return then(*arguments, **options) if callable(then) else then

        return call


def an_arbiter(**settings: Any) -> Any:
    """Make an arbiter that has not started."""
    settings.setdefault("workers", 1)
    return Arbiter(App(**settings))


def a_worker(calls: Calls | None = None, **attributes: Any) -> Any:
    """Return what stands in for a worker in the arbiter's books."""
    noting = (calls if calls is not None else Calls()).noting
    worker = SimpleNamespace(age=1, aborted=False, booted=False, pid="[booting]", tmp=SimpleNamespace())
    worker.tmp.close, worker.tmp.last_update = noting("tmp.close"), lambda: 0.0
    vars(worker).update(attributes)
    return worker


class Os(ModuleType):
    """`os` as the arbiter's module sees it, with some functions replaced."""

    def __init__(self, **functions: Any) -> None:
        super().__init__("os")
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def exits(*statuses: tuple[int, int]) -> Os:
    """Return an `os` in which these children have ended."""
    left = list(statuses)

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        return left.pop(0) if left else (0, 0)

    return Os(waitpid=waitpid)


LOG = SimpleNamespace(**dict.fromkeys(("debug", "info", "error", "warning", "exception"), lambda *arguments: None))

#: They are closed at the end of a test.
made_workers: list[Any] = []


def a_stock_worker(kind: type, **settings: Any) -> Any:
    """Make a worker of a class, without its process."""
    cfg = Config()
    for name, value in settings.items():
        cfg.set(name, value)
    made = kind(1, os.getppid(), [], SimpleNamespace(wsgi=lambda: None), 5.0, cfg, LOG)
    made.notify = lambda: None
    made_workers.append(made)
    return made


def in_order(function: Any, *fragments: str) -> bool:
    """Tell whether a function's source has these in this order: for what only a whole server would show."""
    source, at = textwrap.dedent(inspect.getsource(function)), 0
    for fragment in fragments:
        at = source.find(fragment, at)
        if at < 0:
            return False
        at += len(fragment)
    return True


__all__ = [
    "App", "Arbiter", "Calls", "Checked", "Os", "a_stock_worker", "a_worker", "an_arbiter", "app", "exits", "in_order",
    "made_workers", "module",
]  # fmt: skip
