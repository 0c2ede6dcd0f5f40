"""The tiers of the tests. A test's directory is its tier: the first of these that its path begins with.

`pytest -m fast` is for every save, `pytest -m "fast or os"` before a commit, `pytest -m smoke` when something that
serves has changed. `pytest` runs all but the tier *long*, which has its own command: `pytest -m long`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

#: Directory below tests/ -> its markers. The more specific ones come first.
TIERS = {
    "pure": ("fast",),
    "os": ("os",),
    "contract": ("os",),
    "processes/smoke": ("smoke", "processes"),
    "processes/long": ("long",),
    "processes": ("processes",),
}

MEANING = {
    "fast": "decisions and documents; no fork, no socket, no server (30 s)",
    "os": "real pipes, forks and sockets; no server (90 s more)",
    "smoke": "one scene with a real server for each promise and mode (60 s)",
    "processes": "scenes with a real server (the smoke tests are among them)",
    "long": "what takes minutes; runs only when asked for with -m long",
}


@functools.cache
def markers_of(path: Path) -> tuple[str, ...]:
    """Return the markers of a test file.

    >>> markers_of(TESTS / "processes" / "smoke" / "test_promises.py")
    ('smoke', 'processes')

    Raises:
        pytest.UsageError: no tier has that directory.
    """
    inside = path.relative_to(TESTS)
    for directory, markers in TIERS.items():
        if inside.is_relative_to(directory):
            return markers
    raise pytest.UsageError(f"{inside} is in none of the tiers {', '.join(TIERS)}: see tests/helpers/tiers.py")


def is_asked_for(markers: tuple[str, ...], expression: str) -> bool:
    """Whether tests with these markers, and no others, may be selected by `-m expression`.

    >>> is_asked_for(("fast",), "fast or os"), is_asked_for(("smoke", "processes"), "processes and not smoke")
    (True, False)
    >>> is_asked_for(("processes",), ""), is_asked_for(("fast",), "django_db")
    (True, True)

    The long ones run only when they are named:

    >>> [is_asked_for(("long",), expression) for expression in ("", "not smoke", "long")]
    [False, False, True]
    """
    if "long" in markers and "long" not in expression:
        return False
    if not expression:
        return True
    try:
        return bool(eval(expression, {"__builtins__": {}}, {name: name in markers for name in MEANING}))
    except Exception:
        return True  # another marker is named, or it is not an expression: pytest decides, and says why


class Tiers:
    """The plugin that marks each test with its tier, and reads no file of a tier that the run does not ask for."""

    def __init__(self, config: pytest.Config) -> None:
        for name, meaning in MEANING.items():
            config.addinivalue_line("markers", f"{name}: {meaning}")
        named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
        self._names_long = any("long" in each.parts[len(TESTS.parts) :] for each in named)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        for name in markers_of(item.path):
            item.add_marker(name)

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        if not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
            return None
        markers = markers_of(collection_path)
        if self._names_long and "long" in markers:
            return None
        return None if is_asked_for(markers, config.option.markexpr) else True
