"""The systemd units that users copy are valid, and their figures go together with the settings that they make."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zdd_web.settings import ENV_PREFIX, Settings, resolve

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("example_*/deploy/*.service"))


class Unit:
    """A service and its socket."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text()
        self.socket_path = path.with_suffix(".socket")
        self.socket = self.socket_path.read_text()

    def values(self, key: str) -> list[str]:
        return re.findall(rf"^{key}=(.*)$", self.text, re.MULTILINE)

    def value(self, key: str) -> str:
        (value,) = self.values(key)
        return value

    @property
    def environ(self) -> dict[str, str]:
        pairs = [pair.partition("=") for line in self.values("Environment") for pair in line.split()]
        return {name: value for name, _, value in pairs}

    @property
    def settings(self) -> Settings:
        return resolve({}, {name: value for name, value in self.environ.items() if name.startswith(ENV_PREFIX)})

    def changed(self, old: str, new: str) -> Unit:
        assert old in self.text
        other = Unit(self.path)
        other.text = self.text.replace(old, new)
        return other


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def unit(request: pytest.FixtureRequest) -> Unit:
    return Unit(request.param)


def test_both_examples_have_one() -> None:
    assert [path.name for path in FILES] == ["example-django.service", "example-flask.service"]


# --- what each must be; called by SPOILT, too ------------------------------------------------------------------


def test_settings_are_those_of_a_socket_unit(unit: Unit) -> None:
    assert unit.settings.listener == "systemd"
    assert unit.value("Requires") == unit.socket_path.name


def test_systemd_waits_longer_than_a_stop_takes(unit: Unit) -> None:
    assert int(unit.value("TimeoutStopSec")) > unit.settings.grace_period


def test_systemd_waits_longer_than_a_start_or_an_upgrade_takes(unit: Unit) -> None:
    assert int(unit.value("TimeoutStartSec")) > unit.settings.upgrade_timeout


def test_systemd_is_told(unit: Unit) -> None:
    assert unit.value("Type") == "notify"
    assert unit.value("NotifyAccess") == "all"


def test_commands_are_of_one_virtualenv_that_a_flipped_symlink_moves(unit: Unit) -> None:
    commands = {key: unit.value(key) for key in ("ExecStart", "ExecReload")}
    directories = {command.rpartition("/")[0] for command in (each.split()[0] for each in commands.values())}
    assert len(directories) == 1
    release = directories.pop().removesuffix("/.venv/bin")
    assert release.endswith("/current")
    assert unit.value("WorkingDirectory").startswith(release)
    assert commands["ExecReload"].endswith("zdd-web upgrade --pid $MAINPID")


def test_main_process_that_is_no_child_is_waited_for(unit: Unit) -> None:
    drains = any(command.endswith("zdd-web drain --pid $MAINPID") for command in unit.values("ExecStop"))
    assert unit.value("KillMode") == "control-group" or drains


SPOILT: list[tuple[Callable[[Unit], None], str, str]] = [
    (test_settings_are_those_of_a_socket_unit, "LISTENER=systemd", "LISTENER=fd"),
    (test_settings_are_those_of_a_socket_unit, "Requires=example", "Requires=sample"),
    (test_systemd_waits_longer_than_a_stop_takes, "GRACE_PERIOD=30", "GRACE_PERIOD=35"),
    (test_systemd_waits_longer_than_a_start_or_an_upgrade_takes, "TimeoutStartSec=90", "TimeoutStartSec=60"),
    (test_systemd_is_told, "Type=notify", "Type=simple"),
    (test_systemd_is_told, "NotifyAccess=all", "NotifyAccess=main"),
    (
        test_commands_are_of_one_virtualenv_that_a_flipped_symlink_moves,
        "current/.venv/bin/zdd-web u",
        "2/bin/zdd-web u",
    ),
    (test_main_process_that_is_no_child_is_waited_for, "KillMode=control-group", "KillMode=mixed"),
]


@pytest.mark.parametrize(("check", "old", "new"), SPOILT)
def test_spoilt_unit_is_noticed(unit: Unit, check: Callable[[Unit], None], old: str, new: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(unit.changed(old, new))


# --- systemd's own opinion -------------------------------------------------------------------------------------

analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")


def verify(unit: Unit, directory: Path) -> str:
    """Return what systemd says about a unit, whose commands are looked for where they are here."""
    scripts = str(Path(sys.executable).parent)
    text = re.sub(r"/srv/[^ ]*/\.venv/bin", scripts, unit.text)
    (directory / unit.path.name).write_text(text)
    (directory / unit.socket_path.name).write_text(unit.socket)
    # It exits 0 on unknown keys, and says them.
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(directory / unit.path.name)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if unit.path.stem in line]
    assert done.returncode == 0 or said, done.stderr
    return "\n".join(said)


@analyze
def test_systemd_takes_it(unit: Unit, tmp_path: Path) -> None:
    assert verify(unit, tmp_path) == ""


@analyze
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("KillMode=control-group", "KillMode=mild", "Failed to parse kill mode"),
        ("TimeoutStopSec", "TimeoutStop", "Unknown key"),
        ("bin/gunicorn", "bin/gunicorn-2", "is not executable"),
    ],
)
def test_misspelt_key_or_command_is_noticed_by_systemd(
    unit: Unit, tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert said in verify(unit.changed(old, new), tmp_path)


# --- the page about them ---------------------------------------------------------------------------------------


def test_page_shows_what_stands_in_the_files() -> None:
    page = (ROOT / "docs" / "how-to" / "systemd.md").read_text()
    shown = {path.name: path.read_text() for path in ROOT.glob("example_flask/deploy/example-flask.*")}
    blocks = re.findall(r"^```ini\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= len(shown)
    for text in shown.values():
        bare = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert any(set(bare) >= set(filter(None, block.splitlines())) for block in blocks)
