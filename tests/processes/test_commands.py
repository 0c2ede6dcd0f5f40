"""`zdd-web upgrade`, `status` and `rehearse` against real services."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.masters import NOBODY_UID, Masters
from tests.processes.harness import Held, Service
from zdd_web.system import proc

ROOT = Path(__file__).parents[2]


def test_upgrade_succeeds_and_the_old_code_answers_no_more(service: Service):
    service.start()
    for number, by in ((2, ["--name", service.name]), (3, ["--pid-file", str(service.pid_file)]), (4, [])):
        service.deploy(str(number))
        done = service.run("upgrade", *(by or ["--pid", str(service.pid)]))
        assert done.returncode == 0, done
        assert f"generation {number} serves" in done.stdout
        assert {service.get().version for _ in range(10)} == {str(number)}
    service.stop()


def test_upgrade_to_broken_code_fails_with_the_reason_and_the_log(service: Service):
    service.start()
    service.deploy("2", at_import="raise ImportError('boom at import')")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 1
    assert "ImportError: boom at import" in done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "generation 1 serves on" in done.stderr
    service.stop()


def test_upgrade_to_a_broken_configuration_shows_what_it_printed(service: Service):
    service.start()
    (service.directory / "gunicorn.conf.py").write_text("workers = (\n")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr
    assert "Failed to read config file" in done.stderr
    service.stop()


def test_upgrade_is_refused_with_the_reason_when_the_service_is_stopping(service: Service):
    service.configure(drain_delay=20, grace_period=30).start()
    service.signal(signal.SIGTERM)
    service.wait_for("event=phase.lame_duck")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 1
    assert "the generation is lame_duck" in done.stderr
    service.signal(signal.SIGTERM)


def test_status_shows_generations_and_workers(service: Service):
    service.start()
    service.upgrade()
    service.until_one_generation()
    shown = json.loads(service.run("status", "--name", service.name, "--json").stdout)
    (generation,) = shown["generations"]
    assert generation["generation"] == 2
    assert generation["phase"] == "serving"
    assert [worker["state"] for worker in generation["workers"]] == ["serving"] * 2
    table = service.run("status", "--name", service.name).stdout
    assert service.name in table
    assert "2 of 2" in table
    for worker in generation["workers"]:
        assert str(worker["pid"]) in table
    service.stop()


def test_two_masters_of_one_name_on_one_port_are_told_apart_by_their_pids(make_service):
    first = make_service("gthread", workers=1, listener="reuseport").start()
    second = make_service("gthread", workers=1, listener="reuseport")
    second.name, second.bind = first.name, f"127.0.0.1:{first.port}"
    second.configure().start()
    pids = [each.process.pid for each in (first, second)]
    for command in ("upgrade", "drain"):
        done = first.run(command, "--name", first.name)
        assert done.returncode == 2, done
        assert f"2 services named '{first.name}' run here, of the masters {pids[0]}, {pids[1]}: " in done.stderr
    assert first.run("upgrade", "--pid-file", str(first.pid_file)).returncode == 0
    shown = json.loads(first.run("status", "--name", first.name, "--json").stdout)
    assert {each["generation"] for each in shown["generations"] if each["master_pid"] != pids[1]} >= {2}
    shown = json.loads(first.run("status", "--pid", str(pids[1]), "--json").stdout)
    assert [each["master_pid"] for each in shown["generations"]] == [pids[1]]
    done = first.run("drain", "--pid", str(pids[1]))
    assert done.returncode == 0, done
    second.ends(0)
    # It alone is left, and its name is enough again.
    first.until_one_generation()
    assert first.snapshot().generation == 2
    done = first.run("drain", "--name", first.name)
    assert done.returncode == 0, done
    first.ends(0)


def test_two_masters_of_which_one_has_taken_over_from_the_other_are_one_service(make_service):
    old = make_service("gthread", workers=1, takeover=True).start()
    new = make_service("gthread", workers=1, takeover=True)
    new.name, new.bind = old.name, f"127.0.0.1:{old.port}"
    new.configure()
    with Held(old) as held:
        new.start()
        old.wait_for("event=phase.retiring|event=upgrade.committed")
        assert len(old.generations()) == 2
        done = new.run("upgrade", "--name", old.name)
        assert done.returncode == 0, done
        assert "generation 3 serves" in done.stdout
        shown = json.loads(new.run("status", "--pid", str(new.pid), "--json").stdout)
        assert shown["generations"][0]["generation"] == 1
        assert held.is_answered()
    old.ends(0)
    new.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_board_neither_blocks_nor_becomes_the_service(service: Service):
    service.start()
    masters = Masters()
    try:
        # Beside it, before it, and after it.
        for generation, predecessor in ((1, 0), (0, 0), (2, service.pid)):
            masters.start(service.name, generation, uid=NOBODY_UID, predecessor=predecessor, successor=service.pid)
        done = service.run("upgrade", "--name", service.name, "-v")
        assert done.returncode == 0, done
        assert f"skipped: process {masters.pids[0]} (user nobody): this user's own services come first" in done.stderr
        assert service.get().generation == 2
        done = service.run("drain", "--name", service.name)
        assert done.returncode == 0, done
        service.ends(0)
        assert all(proc.state(pid) == "S" for pid in masters.pids)
    finally:
        masters.stop()


def test_a_stale_pid_file_is_said_to_be_no_service(tmp_path: Path, service: Service):
    service.start()
    (tmp_path / "stale").write_text(f"{os.getpid()}\n")
    done = service.run("upgrade", "--pid-file", str(tmp_path / "stale"))
    assert done.returncode == 2
    assert "is not a gunicorn master with zdd_web" in done.stderr
    service.stop()


def rehearse(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "rehearse", *arguments],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, **environ}, check=False,
    )  # fmt: skip


#: Each mode once, and the app's own.
MODES = {
    ("example_flask", "gthread"): ["--listener", "reuseport"],
    ("example_django", "sync"): ["--listener", "systemd"],
    ("example_django", "gthread"): ["--listener", "fd"],
}


@pytest.mark.parametrize("example", ["example_flask", "example_django"])
@pytest.mark.begins_first
def test_rehearsal_of_an_example_loses_nothing(tmp_path: Path, example: str, worker_class: str):
    report = tmp_path / "report.json"
    database = {"DATABASE_PATH": str(tmp_path / "db.sqlite3"), "WORKER_CLASS": worker_class}
    paths = ["--path", "/", "--path", "/items", *MODES.get((example, worker_class), [])]
    # At a rate, because in a closed loop the clients take whatever CPU the other tests leave.
    load = ["--upgrades", "2", "--clients", "16", "--rate", "100"]
    done = rehearse(example, *load, "--json", str(report), *paths, **database)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = json.loads(report.read_text())
    assert shown["lost"] == 0
    assert shown["early_answers"] == 0
    assert set(shown["generations"]) == {"1", "2", "3"}
    assert shown["stop"]["exit_status"] == 0
    assert "0 of " in done.stdout


def test_rehearsal_touches_nothing_of_a_service_in_production(tmp_path: Path, make_service):
    production = make_service("gthread")
    conf = production.directory / "gunicorn.conf.py"
    own = "bind = '127.0.0.1:{port}'\npidfile = {pid!r}\naccesslog = {log!r}\nerrorlog = {log!r}\nchdir = {here!r}\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = str(production.directory / "own.log")
    text = own.format(port=port, pid=str(production.pid_file), log=log, here=str(production.directory))
    conf.write_text(text + conf.read_text())
    production.arguments = ["--bind", f"127.0.0.1:{port}", "--error-logfile", "-"]
    production.bind = None
    production.start()
    pid, size = production.pid_file.read_text(), os.path.getsize(log) if os.path.exists(log) else 0
    done = rehearse(str(conf), "--upgrades", "1", "--clients", "4", "--", "app:app")
    assert done.returncode == 0, done.stdout + done.stderr
    assert production.pid_file.read_text() == pid
    assert (os.path.getsize(log) if os.path.exists(log) else 0) == size
    assert production.snapshot().generation == 1
    assert "settings overridden" in done.stdout
    production.stop()


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("daemon = True", [], "sets daemon = True"),
        ("reload = True", [], "sets reload = True"),
        ("", ["--daemon"], "daemon is the rehearsal's own to set"),
        ("", ["--bind", "0.0.0.0:80"], "bind is the rehearsal's own to set"),
        ("", ["--no-such-option"], "--no-such-option"),
        (None, [], "does not call zdd_web.gunicorn.install"),
    ],
)
def test_what_a_rehearsal_cannot_hold_is_refused(make_service, text: str | None, arguments: list[str], said: str):
    service = make_service("gthread")
    conf = service.directory / "gunicorn.conf.py"
    conf.write_text("" if text is None else f"{text}\n{conf.read_text()}")
    done = rehearse(str(service.directory), "--", "app:app", *arguments)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr


def test_rehearsal_of_a_release_that_answers_404_is_not_ok(make_service):
    service = make_service("gthread")
    conf = service.directory / "gunicorn.conf.py"
    conf.write_text(f"chdir = {str(service.directory)!r}\n{conf.read_text()}")
    app = (service.directory / "app.py").read_text()
    answer = 'start_response("404 Not Found" if zdd_web.generation() > 1 else "200 OK", [("Content-Length"'
    (service.directory / "app.py").write_text(app.replace('start_response("200 OK", [("Content-Length"', answer))
    done = rehearse(str(service.directory), "--upgrades", "1", "--clients", "4", "--", "app:app")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r"^0 of [\d,]+ requests lost, [\d,]+ replies DIFFERENT, in 1 upgrade and a stop$", done.stdout, re.M
    )
    assert "from generation 2: status 404, before the first upgrade 2xx" in done.stdout


def test_rehearsal_reports_losses_with_status_1(make_service):
    # A service that drops what it has in hand: each worker kills itself at some request.
    service = make_service("gthread")
    conf = service.directory / "gunicorn.conf.py"
    conf.write_text(f"chdir = {str(service.directory)!r}\n{conf.read_text()}")
    app = (service.directory / "app.py").read_text()
    crash = "count = 0\ndef crash_now():\n    global count\n    count += 1\n    return count > 200\n"
    app = app.replace("def app(environ", crash + "\ndef app(environ").replace(
        'if path == "/slow":', 'if crash_now():\n        os.kill(os.getpid(), signal.SIGKILL)\n    if path == "/slow":'
    )
    (service.directory / "app.py").write_text(app)
    done = rehearse(str(service.directory), "--upgrades", "1", "--clients", "8", "--", "app:app")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "LOST" in done.stdout
