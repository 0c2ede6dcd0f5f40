"""Every example in a docstring is executed."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
from gunicorn.app.base import Application

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


def test_examples_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        with monkeypatch.context() as patch:
            # An example may make this process one of zdd_web's; it is taken back.
            process.use(None)
            patch.setattr(hooks, "state", None)
            patch.setattr(registry, "shared", registry.Registry())
            # install() replaces it: the tests of gunicorn's own, in the same process, would find ours.
            patch.setattr(Application, "run", Application.run)
            module = importlib.import_module(name)
            results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        process.use(None)
        assert results.failed == 0, f"{name}: an example prints something else; see above"
        assert (results.attempted > 0) is (">>> " in inspect.getsource(module)), f"{name}: no example was found"
