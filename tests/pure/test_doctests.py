"""Every example in a docstring is executed."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import zdd_web
from zdd_web import process
from zdd_web.checks import registry
from zdd_web.gunicorn import hooks

MODULES = [
    "zdd_web",
    *(
        module.name
        for module in pkgutil.walk_packages(zdd_web.__path__, "zdd_web.")
        if not module.name.endswith("__main__")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_do_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An example may make this process one of zdd_web's; it is taken back.
    monkeypatch.setattr(process, "_current", None)
    monkeypatch.setattr(hooks, "state", None)
    monkeypatch.setattr(registry, "shared", registry.Registry())
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
    assert (results.attempted > 0) is (">>> " in inspect.getsource(module))
