"""Which worker class plays which scene.

All five classes in every scene would take far longer than fifteen minutes on two cores. So a scene is played by one of
each family: the one that the CRC of the scene's name falls on, always the same one. With `ZDD_WEB_TEST_CLASSES=all`
every scene is played by all, and the test of the upgrade itself always is.
"""

from __future__ import annotations

import os
import zlib

import pytest

#: The families; a scene takes one of each, as far as it plays them.
CLASSES = ("sync", "gthread")
LOOPS = ("gevent", "asgi", "uvicorn_worker.UvicornWorker")

ALWAYS_ALL = "test_upgrade.py"
VARIABLE = "ZDD_WEB_TEST_CLASSES"
PLAYS_ALL = os.environ.get(VARIABLE) == "all"


def description() -> list[str]:
    """Return what the header of a test run says."""
    if PLAYS_ALL:
        return [f"worker classes: all of {', '.join((*CLASSES, *LOOPS))} in every scene ({VARIABLE}=all)"]
    names = ["|".join(each.rpartition(".")[2] for each in family) for family in (CLASSES, LOOPS)]
    return [
        f"worker classes: a scene is played by one of {names[0]} and one of {names[1]}, by the CRC of its name",
        f"  (its id shows which; {ALWAYS_ALL} plays all); {VARIABLE}=all has every scene played by all",
    ]


def chosen(family: tuple[str, ...], scene: str) -> str:
    """Return the class that plays a scene.

    >>> chosen(CLASSES, "test_stop.py test_nothing_is_lost []")
    'gthread'
    """
    return family[zlib.crc32(scene.encode()) % len(family)]


def is_left_out(item: pytest.Item) -> bool:
    """Whether another worker class plays this scene."""
    call = getattr(item, "callspec", None)
    if call is None:
        return False
    mine = call.params.get("worker_class")
    family = next((each for each in (CLASSES, LOOPS) if mine in each), ())
    if not family or item.path.name == ALWAYS_ALL:
        return False
    if any("worker_class" in mark.args[0] for mark in item.iter_markers("parametrize")):
        return False  # the test has chosen itself
    rest = {name: value for name, value in call.params.items() if name != "worker_class"}
    scene = f"{item.path.name} {getattr(item, 'originalname', item.name)} {sorted(map(str, rest.items()))}"
    return chosen(family, scene) != mine
