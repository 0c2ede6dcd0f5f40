"""A rehearsal stays away from what the app shares with a service in production, and runs as that would be started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.certificates import self_signed
from tests.helpers.ports import free_port
from tests.processes.harness import Service, until
from tests.processes.test_listeners import bound_to, start
from zdd_web.cli.rehearse import server
from zdd_web.cli.rehearse.server import RehearsalError
from zdd_web.service import Generation, generations

ROOT = Path(__file__).parents[2]

MakeService = Callable[..., Service]


def rehearse(target: Path, *options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Rehearse the harness's app with a single upgrade, from a directory that is not the app's."""
    return subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", str(target), "--upgrades", "1", "--clients", "2",
         "--verbose", *options,
         "--", "app:app"],
        capture_output=True, text=True, timeout=120, cwd=cwd, check=False,
    )  # fmt: skip


def overrides(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of " in done.stdout
    lines = (line[2:].partition(" = ") for line in done.stdout.splitlines() if line.startswith("  "))
    return {name: value for name, equals, value in lines if equals}


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


@pytest.mark.begins_first
def test_every_scenario_is_rehearsed_and_nothing_is_lost_that_could_be_saved(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service("gthread", workers=2)
    report, page, junit = tmp_path / "report.json", tmp_path / "page.html", tmp_path / "junit.xml"
    done = subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", str(service.directory), "--upgrades", "1", "--scenario",
         "all", "--json", str(report), "--html", str(page), "--junit", str(junit), "--clients", "8", "--", "app:app",
         "--workers", "2", "--worker-class", "gthread", "--threads", "4"],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shown = json.loads(report.read_text())
    assert [each["name"] for each in shown["scenarios"]] == [
        "failed-upgrade", "rollback", "reload", "recycle", "kill-worker",
    ]  # fmt: skip
    assert all(each["ok"] for each in shown["scenarios"])
    by_name = {each["name"]: each for each in shown["scenarios"]}
    assert "broken on purpose by `zdd-web rehearse`: app" in by_name["failed-upgrade"]["detail"]
    # The one that failed was generation 3, and answered nothing; the other release had the number after it.
    assert {"1", "2", "3", "4"} <= set(shown["generations"]) <= {"1", "2", "3", "4", "unknown"}
    rolled_back = by_name["rollback"]
    assert re.fullmatch(
        r"generation 3 of b sent [\d,]+ replies; generation 4 of a sent [\d,]+ replies", rolled_back["detail"]
    )
    assert (rolled_back["requests"] > 0, rolled_back["lost"]) == (True, 0)
    assert shown["lost"] == shown["excused"] == by_name["kill-worker"]["lost"]
    assert {"booting", "serving", "retiring", "stopped"} - {"stopped"} <= {each["phase"] for each in shown["phases"]}
    assert shown["overrides"]["max-requests"] == "500"
    assert "settings overridden" in done.stdout
    assert "\n  ZDD_WEB_NAME = " not in done.stdout
    assert page.read_text().count("<svg") == 3 + 4
    assert 'failures="0"' in junit.read_text()
    # In its own copy of the configuration: the app's files are as they were.
    assert "broken" not in (service.directory / "gunicorn.conf.py").read_text()


@pytest.mark.parametrize(
    ("chdir", "reason"),
    [
        # By the configuration's own path, which a release has a copy of: links in it would lead back to the app.
        ("os.path.dirname(os.path.realpath(__file__))", ""),
        ("'src'", ""),
        ("{app!r}", "failed: generation 2 was started in "),
    ],
    ids=["its own", "below", "fixed"],
)
def test_rollback_of_an_app_with_chdir(make_service: MakeService, chdir: str, reason: str, tmp_path: Path) -> None:
    service, report = make_service("gthread", workers=1), tmp_path / "report.json"
    conf = service.directory / "gunicorn.conf.py"
    conf.write_text(f"import os\nchdir = {chdir.format(app=str(service.directory))}\n{conf.read_text()}")
    if "src" in chdir:
        (service.directory / "src").mkdir()
        (service.directory / "app.py").rename(service.directory / "src" / "app.py")
    done = subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", str(service.directory), "--upgrades", "0", "--scenario",
         "rollback", "--json", str(report), "--clients", "2", "--", "app:app"],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    shown = json.loads(report.read_text())
    (scenario,) = shown["scenarios"]
    assert (done.returncode, shown["lost"]) == (bool(reason), 0), done.stdout + done.stderr
    assert bool(reason) == (reason in scenario["reason"] and not scenario["ok"]), scenario


def test_sigterm_prints_what_was_measured_and_leaves_no_process(make_service: MakeService, tmp_path: Path) -> None:
    service = make_service("gthread", workers=1)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "zdd_web.cli", "rehearse", str(service.directory), "--upgrades", "100"]
    command += ["--clients", "2", "--json", str(report), "--", "app:app"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        name = f"rehearsal-{process.pid}"

        def ours() -> list[Generation]:
            return [each for each in generations(os.geteuid()) if each.header.name == name]

        until("an upgrade", lambda: any(each.header.generation >= 2 and each.header.ready_at for each in ours()))
        process.terminate()
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1, out + errors
    assert re.search(r"^0 of [\d,]+ requests lost in \d upgrades?$", out, re.M), out
    assert re.search(r"^INTERRUPTED: by SIGTERM after \d of 100 upgrades; this is what was measured$", out, re.M), out
    assert json.loads(report.read_text())["requests"] > 0
    assert ours() == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_deploy_by_any_command_is_measured_from_outside(make_service: MakeService, scheme: str, tmp_path: Path) -> None:
    service = make_service("gthread", workers=1, generation_header="X-Zdd-Generation")
    trust = []
    if scheme == "https":
        signed = self_signed(tmp_path)
        service.arguments = ["--certfile", str(signed.certificate), "--keyfile", str(signed.key)]
        trust = ["--cacert", str(signed.certificate)]
        start(bound_to(service, f"127.0.0.1:{free_port()}"))
    else:
        service.start()
    report = tmp_path / "report.json"
    deploy = f"{sys.executable} -m zdd_web.cli upgrade --pid {service.pid}"
    done = subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", "--url", f"{scheme}://127.0.0.1:{service.port}/",
         "--do", deploy, *trust, "--clients", "4", "--rate", "40", "--json", str(report)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^0 of [\d,]+ requests lost in a command$", done.stdout, re.M)
    shown = json.loads(report.read_text())
    assert set(shown["generations"]) == {"1", "2"}
    assert shown["scenarios"][0]["ok"]
    service.stop()
