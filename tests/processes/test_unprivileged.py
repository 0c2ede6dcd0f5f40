"""`reuseport` mode without any privilege: twenty deploys in a row by masters that know nothing of each other.

Each time V2 starts on V1's port, and as soon as it serves V1 is told to stop. Clients that never repeat a request wait
in the queues all the while, and none may miss an answer. Every process of every master is nobody's and has no
capability: what a stop does for those who wait, steering and all, it does as anybody may.

It takes an interpreter that nobody can execute, and nobody's copy of the packages: the tests' own may lie below /root.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.processes.harness import PATIENCE, Service, answered_from, generations_of, until
from zdd_web.cli.rehearse.load import Load, LoadThread
from zdd_web.cli.rehearse.report import Outcome, Sample

NOBODY = 65534
REPLACEMENTS = 20

#: Starts a command as nobody. What setpriv executes it still looks up with root's capabilities, and would start half an
#: interpreter below /root, which takes its libraries from elsewhere; `env` has none of them left.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
             "--bounding-set=-all", "--inh-caps=-all", "--", "env"]  # fmt: skip

#: What /proc says of a process that may do nothing that not everybody may.
UNPRIVILEGED = {
    "Uid": [str(NOBODY)] * 4,
    "Gid": [str(NOBODY)] * 4,
    "Groups": [],
    **{name: ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
}

#: All that a master and its workers import and that is not in the standard library; each is pure Python.
PACKAGES = ("zdd_web", "gunicorn", "packaging")

#: The last two are for where the tests' own interpreter is out of nobody's reach.
INTERPRETERS = (sys.executable, os.path.realpath(sys.executable), "/usr/local/bin/python3", "/usr/bin/python3")

#: Says what is wrong, if anything is: with the directory, or with the version.
TRIAL = "import os, sys; os.listdir(sys.argv[1]); sys.exit(sys.version_info < (3, 10) and 'older than Python 3.10')"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed"),
]


@dataclass(frozen=True)
class Python:
    """An interpreter that nobody can execute, and where nobody can read what gunicorn imports."""

    path: str
    packages: Path


def give_to_nobody(directory: Path) -> None:
    """Make nobody the owner of a directory and of all in it, whatever the umask has made of their modes."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Stand in for pytest's own, in which `make_service` puts its services: that one is for its user alone."""
    with tempfile.TemporaryDirectory(prefix="zdd-web-test-") as directory:
        give_to_nobody(Path(directory))
        yield Path(directory)


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    """Find an interpreter, and copy the packages under test to where it can read them as nobody."""
    with tempfile.TemporaryDirectory(prefix="zdd-web-test-") as name:
        packages = Path(name)
        give_to_nobody(packages)
        path = interpreter(packages)
        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            assert spec is not None and spec.origin is not None, f"{package} is not installed"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(Path(spec.origin).parent, packages / package, ignore=ignored)
        # The harness has nobody write bytecode: forty masters would compile every file anew.
        subprocess.run([path, "-I", "-m", "compileall", "-q", name], timeout=PATIENCE, check=True)
        give_to_nobody(packages)
        yield Python(path, packages)


def interpreter(directory: Path) -> str:
    """Return an interpreter that nobody can execute and that finds the directory; skip the test without one."""
    said = []
    for path in dict.fromkeys(INTERPRETERS):
        command = [*AS_NOBODY, path, "-I", "-c", TRIAL, str(directory)]
        trial = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=PATIENCE, check=False)
        if trial.returncode == 0:
            return path
        said.append(f"{path}: {trial.stderr.strip().rpartition(chr(10))[2]}")
    pytest.skip(f"needs a Python that user {NOBODY} can execute ({'; '.join(said)})")


def privileges(pid: int) -> dict[str, list[str]]:
    """Return whose a process is and what it may do, as /proc/<pid>/status has it."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.split() for name, _, value in lines if name in UNPRIVILEGED}


def has_met_somebody(service: Service) -> None:
    """Wait until a service has accepted a connection."""
    until("a connection", lambda: sum(each.accepted for each in service.snapshot().listeners), service)


def unanswered(load: LoadThread) -> list[Sample]:
    """Return what a client went without, be it for want of a descriptor: that would hide what becomes of the rest."""
    return [sample for sample in load.samples if sample.outcome not in (Outcome.OK, Outcome.STALE)]


@pytest.mark.begins_first
def test_twenty_unrelated_masters_without_privileges_replace_each_other_and_lose_nothing(
    make_service: Callable[..., Service], python: Python, worker_class: str
) -> None:
    port = free_port()

    def another(number: int) -> Service:
        service = make_service(worker_class, workers=2 + number % 2)
        service.bind = f"127.0.0.1:{port}"
        service.launcher = [*AS_NOBODY, python.path, "-m", "gunicorn"]
        service.environ["PYTHONPATH"] = str(python.packages)
        service.configure(listener="reuseport", generation_header="X-Zdd-Generation")
        give_to_nobody(service.directory)
        service.start()
        found = {pid: privileges(pid) for pid in service.processes()}
        assert len(found) == 1 + service.workers, found
        assert all(each == UNPRIVILEGED for each in found.values()), found
        return service

    old = another(0)
    # More clients than there are places, and a view that takes a while: somebody waits in the queues at any moment.
    load = LoadThread(Load("127.0.0.1", port, ("/slow?seconds=0.02",), 24, 0.5, 0.02, 20.0))
    with load:
        answered_from(load, 50)
        for number in range(1, REPLACEMENTS + 1):
            new = another(number)
            old.stop()
            assert old.matches("event=listener.steered"), old.log()
            has_met_somebody(new)
            answered_from(load, 50)
            # At once: what happened is in the logs of these two.
            assert unanswered(load) == [], (number, unanswered(load))
            old = new
    outcomes = Counter(sample.outcome.value for sample in load.samples)
    print(f"{worker_class}: {REPLACEMENTS} replacements, {len(load.samples)} requests, "
          f"{len(unanswered(load))} lost, {dict(outcomes)}")  # fmt: skip
    assert unanswered(load) == []
    assert generations_of(load) == {1}
    old.stop()
    old.leaves_no_trace()
