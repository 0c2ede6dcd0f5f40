"""A rehearsal stays away from what the app shares with a service in production, and runs as that would be started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes.harness import Service
from zdd_web.cli.rehearse import server
from zdd_web.cli.rehearse.server import RehearsalError

ROOT = Path(__file__).parents[2]

MakeService = Callable[..., Service]


def rehearse(target: Path, *options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Rehearse the harness's app with a single upgrade, from a directory that is not the app's."""
    return subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", str(target), "--upgrades", "1", "--clients", "2", *options,
         "--", "app:app"],
        capture_output=True, text=True, timeout=120, cwd=cwd, check=False,
    )  # fmt: skip


def overrides(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of " in done.stdout
    lines = (line[2:].partition(" = ") for line in done.stdout.splitlines() if line.startswith("  "))
    return {name: value for name, equals, value in lines if equals}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_rehearsal_leaves_a_service_that_can_be_taken_over_alone(make_service: MakeService) -> None:
    production = make_service("gthread", workers=1)
    shared = {
        "takeover": True,
        "takeover_socket": str(production.directory / "takeover"),
        "probe_bind": f"127.0.0.1:{free_port()}",
    }
    # Which is stronger than what install() is given.
    production.configure(f"raw_env = {[f'ZDD_WEB_{name.upper()}={value}' for name, value in shared.items()]!r}\n")
    production.start()
    changed = overrides(rehearse(production.directory))
    assert changed["ZDD_WEB_PROBE_BIND"] == "127.0.0.1:0"
    assert (changed["ZDD_WEB_TAKEOVER"], changed["ZDD_WEB_TAKEOVER_SOCKET"]) == ("no", "")
    assert production.snapshot().generation == 1
    assert not production.matches(r"event=(refused|takeover\.rejected|upgrade\.)")
    production.stop()


@pytest.mark.parametrize("listener", [None, "fd"])
def test_rehearsal_passes_a_socket_for_each_of_systemds_names(make_service: MakeService, listener: str | None) -> None:
    names = {"health": "probe", "we=b,": "app", "more": "app"}
    service = make_service("gthread", workers=1, listener="systemd", systemd_names=names)
    changed = overrides(rehearse(service.directory, *(["--listener", listener] if listener else [])))
    if listener is None:
        # It is the app's own mode, and systemd's part is played.
        assert not {"ZDD_WEB_LISTENER", "ZDD_WEB_SYSTEMD_NAMES", "bind"} & changed.keys()
        assert "ZDD_WEB_PROBE_BIND" not in changed
    else:
        assert changed["ZDD_WEB_SYSTEMD_NAMES"] == ""
        # systemd would have passed one.
        assert changed["ZDD_WEB_PROBE_BIND"] == "127.0.0.1:0"


def test_rehearsal_of_a_file_runs_where_gunicorn_would_find_the_app(make_service: MakeService) -> None:
    service = make_service("gthread", workers=1)
    conf = service.directory / "deploy" / "production.py"
    conf.parent.mkdir()
    (service.directory / "gunicorn.conf.py").rename(conf)
    done = rehearse(Path("deploy/production.py"), cwd=service.directory)
    assert f"$ cd {service.directory} && " in done.stdout
    # There is none in the app's configuration.
    assert "ZDD_WEB_PROBE_BIND" not in overrides(done)


def test_configuration_that_does_not_load_is_no_rehearsal(make_service: MakeService) -> None:
    service = make_service("gthread").configure(takeover_socket="/run/nowhere")
    done = rehearse(service.directory)
    assert done.returncode == 2
    assert "the app did not start (exit status 1):" in done.stderr
    assert "TAKEOVER_SOCKET = '/run/nowhere', and TAKEOVER = False" in done.stderr
    assert "install(takeover_socket='/run/nowhere')" in done.stderr


def test_configuration_that_hangs_is_given_up(make_service: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service("gthread").configure("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(server, "STARTS_WITHIN", 0.5)
    rehearsal = server.Server(str(service.directory))
    with pytest.raises(RehearsalError, match=r"gunicorn\.conf\.py did not load within 0\.5 s"):
        rehearsal.__enter__()
    assert not os.path.exists(rehearsal.log_path)
