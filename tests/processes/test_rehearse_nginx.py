"""`rehearse --url --do` through nginx, while the app behind it is deployed and nginx itself is reloaded."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ports import free_port
from tests.processes.harness import Service, until
from tests.processes.systemd_box import Box
from tests.processes.test_nginx import NGINX
from tests.processes.test_real_systemd import Unit, box, make_unit

__all__ = ["box", "make_unit"]

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")

ROOT = Path(__file__).parents[2]

CLIENTS = 8
#: Of the clients that keep their connections.
SHARE = 0.5

#: Debian's, but for where the files are.
UNIT = """
[Service]
Type=forking
PIDFile={directory}/nginx.pid
ExecStart={nginx} -g 'daemon on; master_process on;'
ExecReload={nginx} -g 'daemon on; master_process on;' -s reload
ExecStop=-/sbin/start-stop-daemon --quiet --stop --retry QUIT/5 --pidfile {directory}/nginx.pid
TimeoutStopSec=5
KillMode=mixed
"""


def write_configuration(directory: Path, upstream: int, daemon: str) -> tuple[int, str]:
    """Write nginx's configuration, with a master; return the port and how nginx is started."""
    directory.mkdir()
    port = free_port()
    text = NGINX.format(directory=directory, upstream=f"127.0.0.1:{upstream}", port=port)
    text = text.replace("daemon off; master_process off; worker_processes 1;", f"{daemon} worker_processes 2;")
    (directory / "nginx.conf").write_text(text)
    words = [shutil.which("nginx") or "nginx", "-p", directory, "-c", directory / "nginx.conf", "-e",
             directory / "error.log"]  # fmt: skip
    return port, shlex.join(map(str, words))


@contextlib.contextmanager
def nginx(directory: Path, upstream: int) -> Iterator[tuple[int, str]]:
    """Run nginx in front of a port; yields its own, and how it is reloaded."""
    port, command = write_configuration(directory, upstream, "daemon off;")
    process = subprocess.Popen(shlex.split(command))
    try:
        until("nginx's pid file", lambda: (directory / "nginx.pid").exists() or process.poll() is not None)
        assert process.poll() is None, (directory / "error.log").read_text()
        yield port, f"{command} -s reload"
    finally:
        process.terminate()
        process.wait()


def measure(port: int, deploy: str, directory: Path, *options: str) -> None:
    """Require that a command ends well amid a load, that it brings generation 2, and that no request is lost."""
    report = directory / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", "--url", f"http://127.0.0.1:{port}/", "--do", deploy,
         "--clients", str(CLIENTS), "--rate", "100", "--json", str(report), *options],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["scenarios"][0]["ok"], done.stdout + done.stderr
    assert {"1", "2"} <= set(found["generations"])
    # Of a worker that a reload replaces, nginx closes idle connections at once. A request that is on its way then is
    # nginx's to lose, and rehearse's to report: no app can save it. Nothing else may be lost.
    races = found["outcomes"]["keepalive_race"]
    assert found["lost"] == races, done.stdout
    assert races <= (0 if "0" in options else int(SHARE * CLIENTS)), done.stdout


@pytest.mark.parametrize("share", ["0", f"{SHARE:g}"])
def test_a_deploy_and_a_reload_of_nginx(make_service: Callable[..., Service], tmp_path: Path, share: str):
    service = make_service("gthread", workers=1, generation_header="X-Zdd-Generation")
    service.start()
    with nginx(tmp_path / "nginx", service.port) as (port, reload):
        deploy = f"{sys.executable} -m zdd_web.cli upgrade --pid {service.pid} && {reload}"
        measure(port, deploy, tmp_path, "--keepalive", share)
    service.stop()


@pytest.mark.parametrize("share", ["0", f"{SHARE:g}"])
def test_systemctl_reload_of_the_app_and_of_nginx(make_unit: Callable[..., Unit], box: Box, tmp_path: Path, share: str):
    unit = make_unit()
    conf = unit.directory / "gunicorn.conf.py"
    own = "install(globals(), "
    conf.write_text(conf.read_text().replace(own, f"{own}generation_header='X-Zdd-Generation', "))
    assert unit.get()[1] == "1"
    port, command = write_configuration(unit.directory / "nginx", unit.port, "")
    name = f"{unit.name}-nginx.service"
    box.write_unit(name, UNIT.format(directory=unit.directory / "nginx", nginx=command))
    box.systemctl("daemon-reload")
    try:
        started = box.systemctl("start", name)
        assert started.returncode == 0, box.journal(name)
        deploy = shlex.join(box.words("systemctl", "reload", unit.service, name))
        measure(port, deploy, tmp_path, "--keepalive", share)
    finally:
        box.systemctl("stop", name)
