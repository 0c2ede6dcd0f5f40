"""The next generation is started as this one was: command line, directory, virtualenv, environment, user."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.harness import (
    PATIENCE,
    Service,
    answered_from,
    ask_unix,
    serving,
    until,
)  # fmt: skip
from tests.processes.releases import TELLING, Releases, by_module, by_script, runs, told


@pytest.fixture
def releases(make_service, tmp_path) -> tuple[Service, Releases]:
    service = make_service(workers=1)
    releases = Releases(tmp_path / "srv", (service.directory / "gunicorn.conf.py").read_text())
    releases.add("r1")
    releases.add("r2")
    releases.flip("r1")
    service.directory = releases.current
    return service, releases


@pytest.mark.parametrize("pwd", [True, False], ids=["PWD", "no PWD"])
@pytest.mark.parametrize("launched", [by_script, by_module])
def test_flipped_symlink_is_followed_by_code_and_virtualenv(releases, launched, pwd: bool):
    service, releases = releases
    service.launcher = [*(["env", f"PWD={releases.current}"] if pwd else []), *launched(releases.current)]
    service.start()
    runs(service, releases, "r1", 1)
    releases.flip("r2")
    service.upgrade()
    runs(service, releases, "r2", 2)
    # Back again, as after a deploy that was a mistake: nothing of r2 may stick.
    releases.flip("r1")
    service.upgrade()
    runs(service, releases, "r1", 3)
    service.stop()


@pytest.mark.parametrize("launched", [by_script, by_module])
def test_flipped_symlink_is_followed_by_relative_paths(releases, launched):
    service, releases = releases
    service.directory = releases.base
    service.launcher = launched(Path("current"))
    service.arguments = ["-c", "current/gunicorn.conf.py", "--chdir", "current"]
    service.start()
    runs(service, releases, "r1", 1)
    releases.flip("r2")
    service.upgrade()
    runs(service, releases, "r2", 2)


def test_upgrade_works_after_the_old_release_was_deleted(releases):
    service, releases = releases
    service.launcher = ["env", f"PWD={releases.current}", *by_script(releases.current)]
    service.start()
    releases.flip("r2")
    shutil.rmtree(releases.path("r1"))
    service.upgrade()
    runs(service, releases, "r2", 2)


@pytest.mark.parametrize("launched", [by_script, by_module])
def test_release_dir_is_followed_where_the_launcher_resolved_the_symlink(releases, launched):
    service, releases = releases
    service.directory = releases.path("r1")
    service.environ["ZDD_WEB_RELEASE_DIR"] = str(releases.current)
    service.launcher = launched(releases.path("r1"))
    service.arguments = ["-c", str(releases.path("r1") / "gunicorn.conf.py")]
    service.start()
    runs(service, releases, "r1", 1)
    releases.flip("r2")
    service.upgrade()
    runs(service, releases, "r2", 2)
    releases.add("r3")
    releases.flip("r3")
    service.upgrade()
    runs(service, releases, "r3", 3)


def test_release_that_is_gone_is_a_reason_to_refuse(releases):
    service, releases = releases
    service.directory = releases.path("r1")
    service.launcher = [sys.executable, "-m", "gunicorn"]
    service.start()
    moved = releases.base / "moved"
    releases.path("r1").rename(moved)
    service.signal(signal.SIGUSR2)
    line = service.wait_for(r"event=(?:refused|upgrade\.started)")
    assert f"the directory it is started in is gone: {releases.path('r1')}" in line
    assert told(service)["generation"] == 1


def test_release_without_install_costs_nothing(releases):
    service, releases = releases
    service.launcher = ["env", f"PWD={releases.current}", *by_script(releases.current)]
    service.start()
    (releases.path("r2") / "gunicorn.conf.py").write_text("timeout = 30\n")
    releases.flip("r2")
    with service.under_load(clients=4) as load:
        service.upgrade(expect="upgrade.failed")
        answered_from(load, 50)
    runs(service, releases, "r1", 1)
    assert len(service.processes()) == 1 + service.workers


def test_release_without_install_leaves_the_unix_socket_to_the_old_one(make_service, tmp_path):
    service = make_service()
    path = tmp_path / "s.sock"
    service.bind = f"unix:{path}"
    service.spawn()
    serving(service)
    conf = service.directory / "gunicorn.conf.py"
    good = conf.read_text()
    conf.write_text("timeout = 30\n")
    inode = path.stat().st_ino
    service.upgrade(expect="upgrade.failed")
    assert path.stat().st_ino == inode
    assert ask_unix(path).generation == 1
    conf.write_text(good)
    service.upgrade()
    until("generation 2", lambda: ask_unix(path).generation == 2, service)


# -- the environment


def telling(service: Service) -> Service:
    service.write_app(f"RELEASE = 'r1'\n{textwrap.dedent(TELLING)}")
    return service


@pytest.fixture
def with_env_file(make_service, tmp_path) -> tuple[Service, Path]:
    """A service with an environment file, started with what it says, as systemd's EnvironmentFile does."""
    path = tmp_path / "shop.env"
    path.write_text("# the shop\nCHANGED=one\nREMOVED=here\nexport QUOTED='two words'\n")
    service = telling(make_service(workers=1, env_file=str(path)))
    service.environ.update(CHANGED="one", REMOVED="here", QUOTED="two words", UNTOUCHED="from the unit")
    return service, path


def seen(service: Service, generation: int) -> dict[str, str]:
    names = ("CHANGED", "REMOVED", "QUOTED", "ADDED", "UNTOUCHED")
    return {name: value for name, value in told(service, generation)["environ"].items() if name in names}


def test_changed_added_and_removed_variables_are_seen_by_the_next_generation(with_env_file):
    service, path = with_env_file
    service.start()
    start = {"CHANGED": "one", "REMOVED": "here", "QUOTED": "two words", "UNTOUCHED": "from the unit"}
    assert seen(service, 1) == start
    path.write_text("CHANGED=two\nADDED=new # a comment\nQUOTED='two words'\n")
    service.upgrade()
    assert seen(service, 2) == {"CHANGED": "two", "ADDED": "new", "QUOTED": "two words", "UNTOUCHED": "from the unit"}
    path.write_text("CHANGED=three\nREMOVED=back\n")
    service.upgrade()
    assert seen(service, 3) == {"CHANGED": "three", "REMOVED": "back", "UNTOUCHED": "from the unit"}


def test_broken_environment_file_is_a_reason_to_refuse_that_names_file_and_line(with_env_file):
    service, path = with_env_file
    service.start()
    good = path.read_text()
    path.write_text("CHANGED=two\nREMOVED here\n")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 1
    assert f"{path}, line 2: no name before a '='" in done.stderr
    assert "must be KEY=VALUE" in done.stderr
    assert "line 2: " in service.wait_for("event=refused")
    assert seen(service, 1)["CHANGED"] == "one"
    path.write_text(good)
    service.upgrade()
    assert seen(service, 2)["CHANGED"] == "one"


def test_nothing_that_was_said_to_one_master_alone_reaches_the_app(make_service):
    service = telling(make_service(workers=1))
    service.start()
    for generation in (1, 2, 3):
        environ = told(service, generation)["environ"]
        assert not [name for name in environ if name.startswith(("GUNICORN_", "LISTEN_", "ZDD_WEB_"))]
        if generation < 3:
            service.upgrade()


# -- daemon, user and group, preload


def test_daemon_is_upgraded_and_stopped(make_service):
    service = make_service()
    service.arguments = ["--daemon", "--error-logfile", str(service.log_file)]
    assert service.spawn().wait(timeout=PATIENCE) == 0
    first = serving(service)
    assert service.pid_file.read_text() == f"{first}\n"
    line = service.wait_for("Listening at: http://127.0.0.1:")
    service.port = int(line.rpartition(":")[2].split()[0])
    assert service.get().generation == 1
    with service.under_load(clients=4) as load:
        for number in (2, 3):
            service.deploy(str(number))
            service.upgrade()
            answered_from(load, 50)
            assert service.pid_file.read_text() == f"{serving(service, number)}\n"
    until("version 3", lambda: service.get().version == "3", service)
    service.deploy("4", at_import="raise RuntimeError('boom')")
    assert "boom" in service.upgrade(expect="upgrade.failed")
    assert service.get().version == "3"
    service.stop(status=None)
    assert not service.pid_file.exists()
    assert not service.is_open()


@pytest.fixture
def unprivileged() -> Iterator[Service]:
    """A service whose workers are nobody's; its files lie where nobody may read them."""
    if os.getuid() != 0:
        pytest.skip("only root can give its workers to somebody else")
    directory = Path(tempfile.mkdtemp(prefix="zdd-web-test-", dir="/tmp"))
    directory.chmod(0o755)
    service = telling(Service(directory, "gthread"))
    service.arguments = ["--user", "nobody", "--group", "nogroup"]
    yield service
    service.clean_up()
    shutil.rmtree(directory)


def is_of(pid: int, uid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid == uid
    return False


def test_workers_of_another_user_are_upgraded_and_stopped(unprivileged):
    service = unprivileged
    service.start()
    nobody = told(service)["uid"]
    assert nobody not in (0, None)
    with service.under_load(clients=4) as load:
        for _ in (2, 3):
            service.upgrade()
            answered_from(load, 50)
    assert told(service, 3)["uid"] == nobody
    assert is_of(service.pid, 0)
    assert [is_of(worker.pid, nobody) for worker in service.snapshot().workers] == [True, True]
    service.stop()
    assert not service.is_open()
    assert not service.pid_file.exists()


def test_workers_of_another_user_that_hang_at_import_are_cleaned_up(unprivileged):
    service = unprivileged
    service.configure(upgrade_timeout=5).start()
    before = sorted(service.processes())
    service.deploy("2", at_import="time.sleep(600)")
    assert "UPGRADE_TIMEOUT" in service.upgrade(expect="upgrade.failed")
    until("the hung workers' end", lambda: sorted(service.processes()) == before, service)
    service.stop()
    assert not service.is_open()


def test_workers_of_another_user_end_with_a_killed_master(unprivileged):
    service = unprivileged
    service.start()
    service.signal(signal.SIGKILL)
    service.ends(status=None)
    assert not service.is_open()


def test_hung_worker_of_another_user_ends_with_a_killed_master(unprivileged):
    service = unprivileged
    service.start()
    service.deploy("2", at_import="time.sleep(600)")
    service.signal(signal.SIGUSR2)
    service.wait_for("generation=2 event=boot.started")
    until("the new workers", lambda: len(service.processes()) == 2 + 2 * service.workers, service)
    for generation in service.generations():
        service.signal(signal.SIGKILL, generation.pid)
    service.ends(status=None)


@pytest.fixture
def preloading(make_service) -> Service:
    service = make_service()
    service.arguments = ["--preload"]
    return service


def test_preloaded_app_is_upgraded_without_a_loss(preloading):
    service = preloading
    service.start()
    with service.under_load(clients=4) as load:
        for number in (2, 3):
            service.deploy(str(number))
            service.upgrade()
            answered_from(load, 50)
    until("version 3", lambda: service.get().version == "3", service)
    service.stop()


def test_broken_code_under_preload_fails_the_upgrade_with_reason_and_traceback(preloading):
    service = preloading
    service.start()
    service.deploy("2", at_import="raise ImportError('boom at import')")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 1
    # The reason stands last, at the bottom of the screen.
    assert "ImportError: boom at import" in done.stderr.splitlines()[-1]
    assert "Traceback (most recent call last)" in done.stderr
    assert "app.py" in done.stderr
    assert service.get().version == "1"
    assert len(service.processes()) == 1 + service.workers
    service.deploy("3")
    service.upgrade()
    until("version 3", lambda: service.get().version == "3", service)


def test_code_that_hangs_under_preload_is_given_up(preloading):
    service = preloading
    service.configure(upgrade_timeout=5).start()
    service.deploy("2", at_import="time.sleep(600)")
    assert "UPGRADE_TIMEOUT" in service.upgrade(expect="upgrade.failed")
    assert service.get().version == "1"
    assert len(service.processes()) == 1 + service.workers


def test_reload_with_preload_loses_nothing_and_does_not_claim_new_code(preloading):
    service = preloading
    service.start()
    service.deploy("2")
    with service.under_load(clients=4) as load:
        service.signal(signal.SIGHUP)
        line = service.wait_for(r"event=(?:reload\.done|refused)")
        answered_from(load, 100)
        until("settled workers", lambda: {w.state.label for w in service.snapshot().workers} == {"serving"}, service)
    assert service.get().generation == 1
    # The master has imported the code, and forks its workers with it: it must not be said to be the new one.
    assert service.get().version == "2" or "preload" in line
    service.stop()


def test_broken_code_under_preload_costs_nothing_at_a_reload(preloading):
    service = preloading
    service.start()
    service.deploy("2", at_import="raise RuntimeError('boom')")
    with service.under_load(clients=4) as load:
        service.signal(signal.SIGHUP)
        service.wait_for(r"event=(?:reload\.done|refused)")
        answered_from(load, 100)
        until("settled workers", lambda: {w.state.label for w in service.snapshot().workers} == {"serving"}, service)
    assert service.get().version == "1"
    service.stop()
