"""A release before the packages were rearranged upgrades to this tree, and back, under load.

The older one is tests/data/zdd_web-0.1.0-py3-none-any.whl, built from commit b55aedf.
"""

from __future__ import annotations

import compileall
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import zdd_web
from tests.helpers.ports import free_port
from tests.processes.harness import Service, answered_from

OLDER = Path(__file__).parents[1] / "data" / "zdd_web-0.1.0-py3-none-any.whl"
THIS = Path(str(zdd_web.__file__)).parents[1]

#: Which zdd_web a process has imported, in its log: `package=` with the directory that it is in.
CONF = """
import os, zdd_web
print("package=" + os.path.realpath(os.path.dirname(os.path.dirname(zdd_web.__file__))), flush=True)
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the older release is unpacked, and compiled as an installer would: its masters write no bytecode."""
    directory = tmp_path_factory.mktemp("releases") / "older"
    with zipfile.ZipFile(OLDER) as wheel:
        wheel.extractall(directory)
    compileall.compile_dir(directory, quiet=2)
    return directory


def lead(link: Path, target: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
@pytest.mark.parametrize("listener", ["fd", "reuseport", "systemd"])
def test_upgrades_to_and_from_an_older_release_lose_nothing(
    make_service: Callable[..., Service], tmp_path: Path, older: Path, worker_class: str, listener: str
) -> None:
    # A symlink that leads to the directory of one release or of the other.
    packages, this = tmp_path / "current", THIS
    service = make_service(worker_class, workers=2, listener=listener)
    service.environ["PYTHONPATH"] = str(packages)
    service.configure(CONF)
    lead(packages, older)
    if listener == "systemd":
        if shutil.which("systemd-socket-activate") is None:
            pytest.skip("no systemd-socket-activate")
        service.port, service.bind = free_port(), None
        passed_on = [
            word for name in ("ZDD_TEST_MARKER", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE") for word in ("-E", name)
        ]
        activate = ["systemd-socket-activate", "-l", f"127.0.0.1:{service.port}", *passed_on]
        service.launcher = [*activate, sys.executable, "-m", "gunicorn"]
        service.spawn()
        service.wait_for("Listening on")
        assert service.get().generation == 1
    else:
        service.start()
    with service.under_load(8) as load:
        for generation, release in enumerate((this, older, this, this), 2):
            lead(packages, release)
            service.upgrade()
            answered_from(load, 20)
            assert service.get().generation == generation
    releases = [line.removeprefix("package=") for line in service.matches("package=/")]
    # Each generation reads its configuration once, in its master.
    assert releases == [str(each.resolve()) for each in (older, this, older, this, this)]
    service.stop(status=None)
