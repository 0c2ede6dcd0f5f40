"""`zdd-web upgrade --to DIR` and `zdd-web rollback`: which release serves, and how it is started again."""

from __future__ import annotations

import shutil
import signal

import pytest

from tests.processes.harness import Service, answered_from, until
from tests.processes.releases import Releases, by_module, by_script, runs, standing, told
from tests.processes.test_frameworks import run
from zdd_web.deploy_request import DeployRequest


@pytest.fixture
def releases(make_service, tmp_path) -> tuple[Service, Releases]:
    """A service that was started by the symlink `current`, which leads to the first of three releases."""
    service = make_service(workers=1)
    releases = Releases(tmp_path / "srv", (service.directory / "gunicorn.conf.py").read_text())
    for name in ("r1", "r2", "r3"):
        releases.add(name)
    releases.flip("r1")
    service.directory = releases.current
    service.launcher = ["env", f"PWD={releases.current}", *by_script(releases.current)]
    return service, releases


def deploy(service: Service, releases: Releases, name: str) -> None:
    releases.flip(name)
    service.upgrade()


def order(service: Service, *words: str, status: int = 0) -> str:
    """Run a command; return what it printed."""
    done = service.run(*words, "--name", service.name)
    assert done.returncode == status, done.stdout + done.stderr + service.log()
    return done.stdout + done.stderr


@pytest.mark.parametrize("launched", [by_script, by_module])
def test_rollback_goes_back_after_two_deploys_by_symlink_under_load(releases, launched):
    service, releases = releases
    service.launcher = ["env", f"PWD={releases.current}", *launched(releases.current)]
    service.start()
    deploy(service, releases, "r2")
    deploy(service, releases, "r3")
    runs(service, releases, "r3", 3)
    with service.under_load(clients=4) as load:
        printed = order(service, "rollback")
        answered_from(load, 50)
    runs(service, releases, "r2", 4)
    # A restart would bring back what was left: that must be known.
    assert f"{releases.current} still leads to {releases.path('r3').resolve()}" in printed
    assert f"point it to {releases.path('r2').resolve()}" in printed
    # Further back, and not to the release that the first one has left.
    order(service, "rollback")
    runs(service, releases, "r1", 5)
    assert "no other release has served" in order(service, "rollback", status=1)
    # The next upgrade follows the symlink again.
    releases.flip("r3")
    service.upgrade()
    runs(service, releases, "r3", 6)
    order(service, "rollback")
    runs(service, releases, "r1", 7)


@pytest.mark.parametrize("command", ["manage.py zdd", "flask zdd"])
def test_rollback_and_history_by_a_framework(releases, command: str):
    service, releases = releases
    service.start()
    deploy(service, releases, "r2")
    done = run(command, "rollback", "--name", service.name)
    assert done.returncode == 0, done.stdout + done.stderr + service.log()
    runs(service, releases, "r1", 3)
    done = run(command, "cancel", "--name", service.name)
    assert (done.returncode, "generation 3 serves on" in done.stdout) == (1, True), done
    done = run(command, "history", "--name", service.name)
    assert done.returncode == 0, done
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("20")] == [
        "start", "deploy", "rollback",
    ]  # fmt: skip


def test_rollback_has_the_environment_as_it_was(releases):
    service, releases = releases
    env_file = releases.base / "shop.env"
    env_file.write_text("COLOUR=blue\n")
    service.environ |= {"ZDD_WEB_ENV_FILE": str(env_file), "COLOUR": "blue", "AGENT": f"{releases.current}/lib"}
    service.start()
    env_file.write_text("COLOUR=green\nZDD_WEB_RELEASE=2.0\n")
    deploy(service, releases, "r2")
    found = told(service, 2)["environ"]
    assert found["COLOUR"] == "green"
    assert service.snapshot().release == "2.0"
    order(service, "rollback")
    found = told(service, 3)["environ"]
    assert found["COLOUR"] == "blue"
    assert found["AGENT"] == f"{releases.path('r1')}/lib"
    assert service.snapshot().release == str(releases.path("r1").resolve())
    # The next upgrade goes by the file again: what it does not have any more is gone, wherever it came from.
    env_file.write_text("OTHER=1\n")
    service.upgrade()
    found = told(service, 4)["environ"]
    assert (found.get("COLOUR"), found["OTHER"]) == (None, "1")


def test_rollback_of_a_release_that_is_gone_is_refused(releases):
    service, releases = releases
    service.start()
    deploy(service, releases, "r2")
    shutil.rmtree(releases.path("r1"))
    printed = order(service, "rollback", status=1)
    assert f"the release that served before is gone: {releases.path('r1').resolve()}" in printed
    assert "upgrade --to DIR" in printed
    assert "generation 2 serves on" in printed
    runs(service, releases, "r2", 2)


def test_rollback_passes_the_same_gate(releases):
    service, releases = releases
    service.start()
    deploy(service, releases, "r2")
    (releases.path("r1") / "app.py").write_text("raise RuntimeError('broken meanwhile')\n")
    with service.under_load(clients=4) as load:
        assert "broken meanwhile" in order(service, "rollback", status=1)
        answered_from(load, 50)
    runs(service, releases, "r2", 2)
    # A failed one changes nothing: the same release is the one before.
    (releases.path("r1") / "app.py").write_text((releases.path("r2") / "app.py").read_text().replace("'r2'", "'r1'"))
    order(service, "rollback")
    runs(service, releases, "r1", 3)


def test_upgrade_from_a_named_release_under_load(releases):
    service, releases = releases
    service.start()
    with service.under_load(clients=4) as load:
        printed = order(service, "upgrade", "--to", str(releases.path("r3")))
        answered_from(load, 50)
    runs(service, releases, "r3", 2)
    assert f"{releases.current} still leads to {releases.path('r1').resolve()}" in printed
    order(service, "rollback")
    runs(service, releases, "r1", 3)
    order(service, "upgrade", "--to", str(releases.path("r2")))
    deploy(service, releases, "r3")
    runs(service, releases, "r3", 5)
    assert "does not exist" in order(service, "upgrade", "--to", str(releases.base / "r9"), status=2)


@pytest.mark.parametrize("chdir", ["current", "{base}/current"])
def test_release_that_chdir_names(releases, chdir: str):
    service, releases = releases
    service.directory = releases.base
    service.launcher = by_script(releases.current)
    service.arguments = ["-c", "current/gunicorn.conf.py", "--chdir", chdir.format(base=releases.base)]
    service.start()
    deploy(service, releases, "r2")
    runs(service, releases, "r2", 2)
    order(service, "rollback")
    runs(service, releases, "r1", 3)
    order(service, "upgrade", "--to", str(releases.path("r3")))
    runs(service, releases, "r3", 4)


def test_two_commands_at_a_time_exclude_each_other(releases):
    service, releases = releases
    service.start()
    generation = service.is_active()
    with standing(generation, DeployRequest(to=str(releases.path("r3")))):
        assert "another command has" in order(service, "rollback", status=2)
        service.signal(signal.SIGUSR2)
        service.wait_for(r"event=upgrade\.committed")
    runs(service, releases, "r3", 2)


def test_history_of_deploys_and_rollbacks(releases):
    service, releases = releases
    service.start()
    deploy(service, releases, "r2")
    order(service, "rollback")
    until("the old ones' end", lambda: len(service.generations()) == 1, service)
    printed = order(service, "history")
    whats = [line.split()[2] for line in printed.splitlines()[1:] if line.startswith("20")]
    assert whats == ["start", "deploy", "rollback"]
    assert "still leads to" in printed
