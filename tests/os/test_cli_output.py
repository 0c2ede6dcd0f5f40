"""What commands print steers no terminal, and what they do does not depend on whether it can be printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import zdd
from tests.helpers.masters import Masters
from zdd_web.board import Board, UpgradeState
from zdd_web.system import boot_log
from zdd_web.system.escaping import CONTROL

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

HOSTILE = "it broke\n\x1b[2J\x9b31m\x85\u2028generation 2 serves postgres://shop:hunter2@db/shop"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"unit-{os.getpid()}-{abs(hash(request.node.nodeid))}"


def fails(board: Board) -> None:
    board.header.boot_log_fd = fd = boot_log.create()
    os.write(fd, HOSTILE.encode())
    board.header.upgrade_reason = HOSTILE
    board.header.upgrade_state = UpgradeState.FAILED


def succeeds(board: Board) -> None:
    board.header.upgrade_state = UpgradeState.DONE


def controls(text: str) -> set[str]:
    return set(CONTROL.findall(text)) - {"\n"}


def test_a_release_that_fails_steers_no_terminal(masters: Masters, name: str) -> None:
    masters.start(name, on_usr2=fails)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    assert controls(result.output) == set()
    assert "hunter2" not in result.output
    assert [line for line in result.output.splitlines() if line.startswith("generation 2 serves")] == []
    assert "upgrade failed: it broke\\n\\x1b[2J" in result.output
    assert "  | \\x1b[2J" in result.output
    status = zdd("status", "--name", name)
    assert controls(status.output) == set()
    assert "hunter2" not in status.output


@pytest.mark.parametrize(("on_usr2", "status"), [(succeeds, 0), (fails, 1)])
@pytest.mark.parametrize("stdout", ["/dev/full", "a pipe without a reader", "closed"])
def test_upgrade_goes_on_though_nothing_can_be_printed(
    masters: Masters, name: str, stdout: str, on_usr2: object, status: int
) -> None:
    masters.start(name, on_usr2=on_usr2)  # type: ignore[arg-type]
    assert run(stdout, "upgrade", "--name", name) == status


@pytest.mark.parametrize(("stdout", "status"), [("/dev/full", 2), ("a pipe without a reader", 0), ("closed", 0)])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_status_that_cannot_be_written_is_an_error_unless_the_reader_left(
    masters: Masters, name: str, stdout: str, status: int, options: tuple[str, ...]
) -> None:
    masters.start(name)
    assert run(stdout, "status", "--name", name, *options) == status


@pytest.mark.parametrize("stdout", ["/dev/full", "a pipe without a reader", "closed"])
def test_refusal_that_cannot_be_printed_keeps_its_status(name: str, stdout: str) -> None:
    assert run(stdout, "upgrade", "--name", name) == 2


def run(output: str, *arguments: str) -> int:
    """Run `zdd-web` with stdout and stderr as named; return its exit status."""
    command = [sys.executable, "-m", "zdd_web.cli", *arguments]
    if output == "closed":
        return subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], timeout=60, check=False
        ).returncode
    if output == "a pipe without a reader":
        reader, fd = os.pipe()
        os.close(reader)
    else:
        fd = os.open(output, os.O_WRONLY)
    try:
        return subprocess.run(command, stdout=fd, stderr=fd, timeout=60, check=False).returncode
    finally:
        os.close(fd)


def test_status_is_read_in_part_without_a_word_of_python(masters: Masters, name: str) -> None:
    masters.start(name)
    shell = f"set -o pipefail; {sys.executable} -m zdd_web.cli status --name {name} | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{name}\n"


def test_json_is_data_and_stays_whole(masters: Masters, name: str, tmp_path: Path) -> None:
    masters.start(name, on_usr2=fails)
    zdd("upgrade", "--name", name)
    found = json.loads(zdd("status", "--name", name, "--json").output)
    assert found["generations"][0]["upgrade_reason"].startswith("it broke\n\x1b[2J")
