"""`zdd-web`, run in this process, and what tests of the commands share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from tests.helpers.masters import Masters
from zdd_web.cli import main


def zdd(*arguments: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def name() -> str:
    """A name that no other service on this machine has, whatever else is tested on it."""
    return f"unit-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def masters() -> Iterator[Masters]:
    """Processes with a board, which end with the test."""
    masters = Masters()
    yield masters
    masters.stop()
