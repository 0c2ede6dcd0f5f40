"""install() and what must end a start: the reason on stderr, status 1, no traceback, no pid file."""

from __future__ import annotations

import pytest

from tests.processes.harness import Service, until

INSTALL = "from zdd_web.gunicorn import install\n"

REFUSED = {
    "unknown setting": (
        INSTALL + "install(globals(), upgrade_timout=5)",
        ["install(upgrade_timout=...)", "did you mean upgrade_timeout"],
    ),
    "wrong type": (INSTALL + "install(globals(), grace_period='soon')", ["grace_period='soon'", "number of seconds"]),
    "impossible value": (INSTALL + "install(globals(), grace_period=-1)", ["grace_period=-1", "between"]),
    "contradiction": (
        INSTALL + "install(globals(), grace_period=10, drain_delay=10)",
        ["DRAIN_DELAY = 10", "GRACE_PERIOD = 10", "raise GRACE_PERIOD"],
    ),
    "systemd without systemd": (INSTALL + "install(globals(), listener='systemd')", ["LISTEN_FDS", "socket unit"]),
    "systemd's names without systemd": (
        INSTALL + "install(globals(), systemd_names={'web': 'app'})",
        ["SYSTEMD_NAMES = {'web': 'app'}", "systemd has passed no sockets"],
    ),
    "two installs": (
        INSTALL + "install(globals())\ninstall(globals())",
        ["install() was called twice", "keep the last"],
    ),
    "a hook after install": (
        INSTALL + "install(globals())\ndef post_fork(server, worker):\n    pass",
        ["post_fork was set after install()", "before install()"],
    ),
    "on_starting after install": (
        INSTALL + "install(globals())\ndef on_starting(server):\n    pass",
        ["on_starting was set after install()"],
    ),
    "nworkers_changed after install": (
        INSTALL + "install(globals())\ndef nworkers_changed(server, new, old):\n    pass",
        ["nworkers_changed was set after install()"],
    ),
    "reuse_port": ("reuse_port = True\n" + INSTALL + "install(globals())", ["reuse_port = True", "remove it"]),
    "a gunicorn whose method takes another argument": (
        "from gunicorn.arbiter import Arbiter\n"
        "def manage_workers(self, extra):\n    pass\n"
        "Arbiter.manage_workers = manage_workers\n" + INSTALL + "install(globals())",
        [
            "zdd_web: gunicorn ",
            " changed Arbiter.manage_workers(self, extra): zdd_web replaces it as (self)",
            "install another release of gunicorn>=23,<28, or a newer zdd_web",
        ],
    ),
    "a gunicorn without a method": (
        "from gunicorn.arbiter import Arbiter\ndel Arbiter.reap_workers\n" + INSTALL + "install(globals())",
        [" has no Arbiter.reap_workers(self), which zdd_web replaces"],
    ),
    "a worker class that is changed": (
        "from gunicorn.workers.gthread import ThreadWorker\nworker_class = 'gthread'\n"
        "ThreadWorker.finish_request = lambda self, conn, fs, more: None\n" + INSTALL + "install(globals())",
        [" changed ThreadWorker.finish_request(self, conn, fs, more): zdd_web replaces it as (self, fs) or "],
    ),
    "a worker class": (
        "worker_class = 'gevent_pywsgi'\n" + INSTALL + "install(globals())",
        ["worker_class", "gevent_pywsgi"],
    ),
    "tornado": (
        "class W:\n    pass\nworker_class = 'gunicorn.workers.base.Worker'\n" + INSTALL + "install(globals())",
        ["worker_class = 'gunicorn.workers.base.Worker'", "use one of sync, gthread"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_ends_the_start(make_service, case: str):
    text, said = REFUSED[case]
    if case == "a worker class":
        pytest.importorskip("gevent")
    service = make_service("")
    service.write_conf(text)
    end_of_start(service, said)


def test_changed_gunicorn_ends_the_start_with_one_line(make_service):
    service = make_service("")
    service.write_conf(REFUSED["a gunicorn whose method takes another argument"][0])
    assert service.spawn().wait(timeout=30) == 1
    assert len(service.log().splitlines()) == 1


def end_of_start(service: Service, said: list[str]) -> None:
    assert service.spawn().wait(timeout=30) == 1
    for words in said:
        assert words in service.log()
    assert "Traceback" not in service.log()
    assert not service.pid_file.exists()
    assert service.processes() == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "ZDD_WEB_GRACE_PERIODE",
            "5",
            ["environment variable ZDD_WEB_GRACE_PERIODE", "did you mean ZDD_WEB_GRACE_PERIOD"],
        ),
        ("ZDD_WEB_UPGRADE_TIMEOUT", "soon", ["ZDD_WEB_UPGRADE_TIMEOUT=soon", "number of seconds"]),
        ("ZDD_WEB_LISTENER", "tcp", ["ZDD_WEB_LISTENER=tcp", "'reuseport'"]),
        ("ZDD_WEB_HANDOVER", "{}", ["ZDD_WEB_HANDOVER={}", "unset the variable"]),
    ],
)
def test_a_bad_variable_ends_the_start(make_service, variable: str, value: str, said: list[str]):
    service = make_service("gthread")
    service.environ[variable] = value
    end_of_start(service, said)


def test_the_reuse_port_option_of_the_command_line_is_found_too(make_service):
    service = make_service("gthread")
    service.arguments = ["--reuse-port"]
    end_of_start(service, ["reuse_port = True"])


def test_hooks_of_the_user_run_beside_ours(make_service):
    service = make_service("gthread", workers=1)
    service.write_conf(
        """
        import sys
        def said(*words):
            print("user:", *words, file=sys.stderr, flush=True)
        def on_starting(server): said("on_starting")
        def nworkers_changed(server, new, old): said("nworkers_changed", new, old)
        def pre_fork(server, worker): said("pre_fork")
        def post_fork(server, worker): said("post_fork")
        def post_worker_init(worker): said("post_worker_init")
        def pre_request(worker, req): said("pre_request", req.path)
        def post_request(worker, req): said("post_request with two arguments", req.path)
        def worker_exit(server, worker): said("worker_exit")
        def when_ready(server): said("when_ready")
        def on_exit(server): said("on_exit")
        from zdd_web.gunicorn import install
        install(globals(), {settings})
        """
    )
    service.start()
    service.get("/seen")
    until("the hook after the request", lambda: service.matches("post_request with two arguments /seen"), service)
    service.stop()
    said = [line.partition("user: ")[2] for line in service.matches("user: ")]
    assert said == [
        "nworkers_changed 1 None", "on_starting", "when_ready", "pre_fork", "post_fork", "post_worker_init",
        "pre_request /seen", "post_request with two arguments /seen", "worker_exit", "on_exit",
    ]  # fmt: skip


def test_a_hook_that_is_a_dotted_string_runs(make_service):
    service = make_service("gthread", workers=1)
    (service.directory / "hooks.py").write_text("import sys\ndef ready(worker): print('dotted', file=sys.stderr)\n")
    service.write_conf(
        "post_worker_init = 'hooks.ready'\nfrom zdd_web.gunicorn import install\ninstall(globals(), {settings})"
    )
    service.start()
    service.wait_for("dotted")
    service.stop()


def test_an_on_starting_that_raises_leaves_no_pid_file(make_service):
    service = make_service("gthread")
    service.write_conf(
        """
        def on_starting(server):
            raise ValueError("no database")
        from zdd_web.gunicorn import install
        install(globals(), {settings})
        """
    )
    assert service.spawn().wait(timeout=30) != 0
    assert "no database" in service.log()
    assert not service.pid_file.exists()


def test_a_first_start_with_broken_code_ends_as_gunicorn_ends_it(make_service):
    service = make_service("gthread")
    service.deploy("1", at_import="raise RuntimeError('boom at import')")
    assert service.spawn().wait(timeout=30) == 3
    assert 'error="RuntimeError: boom at import"' in service.log()
    service.ends(status=None)
    assert not service.pid_file.exists()


def test_a_warmup_path_that_fails_keeps_the_worker_from_serving(make_service):
    service = make_service("gthread", workers=1, warmup=["/"])
    service.start()
    service.write_app(
        "def app(environ, start_response):\n    start_response('500 no', [])\n    return [b'']\n",
    )
    line = service.upgrade(expect="upgrade.failed")
    assert "WARMUP path '/' answered '500 no'" in line
    assert service.get().version == "1"
    service.stop()


#: What a start refuses as well, but only by what systemd, or the app, brings.
CHECKED = [case for case in REFUSED if "systemd" not in case]

MORE_CHECKED = {
    "a bind of reuseport": ("bind = 'unix:app.sock'\n", {"listener": "reuseport"}, "", "shares TCP ports"),
    "workers": ("", {}, "", "workers = 600: the board has 512 slots"),
    "an environment file": ("", {"env_file": "/nowhere/env"}, "", "ENV_FILE = '/nowhere/env'"),
    "a certificate": ("certfile = '/nowhere/cert'\n", {}, "", "certfile = '/nowhere/cert'"),
    "a check": ("", {"checks": ["app.database"]}, "", "CHECKS: "),
    "an app": (
        "", {},
        "import flask\nfrom zdd_web.flask import ZddWeb\napp = flask.Flask('shop')\n"
        "app.config['ZDD_WEB'] = {'GRACE_PERIOD': 20}\nZddWeb(app)\n",
        "GRACE_PERIOD = 20 contradicts the default GRACE_PERIOD = 30",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKED)
def test_check_config_refuses_what_a_start_refuses(make_service, case: str):
    text, said = REFUSED[case]
    if case == "a worker class":
        pytest.importorskip("gevent")
    service = make_service("")
    service.write_conf(text)
    service.arguments = ["--check-config"]
    end_of_start(service, said)


@pytest.mark.parametrize("case", MORE_CHECKED)
def test_check_config_finds_what_only_the_whole_configuration_or_the_app_tells(make_service, case: str):
    before, settings, app, said = MORE_CHECKED[case]
    service = make_service("")
    service.bind = None
    service.workers = 600 if case == "workers" else 1
    service.configure(before, **settings)
    if app:
        pytest.importorskip("flask")
        service.write_app(app)
    service.arguments = ["--check-config"]
    end_of_start(service, [said])


def test_check_config_of_what_works_ends_with_0_and_leaves_the_termination_message(make_service, tmp_path):
    message = tmp_path / "message"
    message.write_text("that of the service that runs")
    service = make_service("gthread", termination_log=str(message))
    service.arguments = ["--check-config"]
    assert service.spawn().wait(timeout=30) == 0, service.log()
    service.configure("reuse_port = True\n", termination_log=str(message))
    end_of_start(service, ["reuse_port = True"])
    assert message.read_text() == "that of the service that runs"
