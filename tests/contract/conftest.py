from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.stock import made_workers


@pytest.fixture(autouse=True)
def heartbeats_are_closed() -> Iterator[None]:
    yield
    while made_workers:
        made_workers.pop().tmp.close()
