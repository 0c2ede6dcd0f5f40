"""A function that is background work of a group whenever it is called."""

from __future__ import annotations

import concurrent.futures
import functools
import types
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

from zdd_web.waitgroup.entry import Group, OnAbandon
from zdd_web.waitgroup.threads import refuse_coroutines

P = ParamSpec("P")
R = TypeVar("R")


class Task(Generic[P, R]):
    """A function that runs in the background when called; `.function` is the function itself."""

    def __init__(self, group: Group, function: Callable[P, R], on_abandon: OnAbandon | None = None) -> None:
        refuse_coroutines(function, "give its coroutine to create_task()")
        functools.update_wrapper(self, function)
        self.group, self.function, self.on_abandon = group, function, on_abandon

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an object, as a function does: a method may be a task."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        return self.group._submit(self.function, args, kwargs, on_abandon=self.on_abandon)
