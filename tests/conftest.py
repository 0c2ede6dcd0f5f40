from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def not_in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the same defaults where the tests run in a pod, whose stops take longer."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
