"""Which of the user's hooks are called, and which are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zdd_web.gunicorn import hooks


@pytest.mark.parametrize(("awaits_promotion", "called"), [(True, []), (False, ["on_exit", "probe port"])])
def test_on_exit_is_not_called_in_a_master_that_was_never_in_office(
    monkeypatch: pytest.MonkeyPatch, awaits_promotion: bool, called: list[str]
) -> None:
    seen: list[str] = []
    master: Any = SimpleNamespace(
        generation=SimpleNamespace(awaits_promotion=awaits_promotion),
        probes=SimpleNamespace(end=lambda: seen.append("probe port")),
    )
    state: Any = SimpleNamespace(master=master, users={"on_exit": lambda server: seen.append("on_exit")})
    monkeypatch.setattr(hooks, "state", state)
    hooks.on_exit(None)
    assert seen == (called or ["probe port"])
