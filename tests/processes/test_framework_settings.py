"""`ZDD_WEB` in Django's settings and in Flask's config: who reads it, which source wins, and what is refused."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes.harness import Service, until

MakeService = Callable[..., Service]

SETTINGS = """
    SECRET_KEY = "only for the tests"
    ALLOWED_HOSTS = ["127.0.0.1"]
    ROOT_URLCONF = "mysite.urls"
    MIDDLEWARE = ["zdd_web.django.middleware.ProbeMiddleware"]
    ZDD_WEB = {zdd_web}
"""

URLS = """
    import os
    import zdd_web
    from django.http import HttpResponse
    from django.urls import path

    def hello(request):
        return HttpResponse(f"1 {zdd_web.generation()} {os.getpid()}")

    urlpatterns = [path("", hello)]
"""

WSGI = """
    import os
    from django.core.wsgi import get_wsgi_application
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
    application = get_wsgi_application()
"""

FLASK = """
    import flask
    from zdd_web.flask import ZddWeb

    def make(name, zdd_web):
        app = flask.Flask(name)
        app.config["ZDD_WEB"] = zdd_web
        ZddWeb(app)
        return app

    one = app = make("one", {one})
    two = make("two", {two})
"""

#: Settings that only the process hangs in that reads them for the master, with a grandchild that holds what it has
#: inherited.
SLOW_FOR_THE_MASTER = """
import subprocess, sys
if "gunicorn.arbiter" not in sys.modules:
    subprocess.run(["sleep", "1000"])
"""


def write(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


def set_django(service: Service, zdd_web: str, more: str = "") -> None:
    write(service.directory, "mysite/settings.py", textwrap.dedent(SETTINGS).replace("{zdd_web}", zdd_web) + more)


@pytest.fixture
def make_django(make_service: MakeService) -> Callable[..., Service]:
    """Make a service of a Django project; `master` tells whether its master knows the settings module."""

    def make(zdd_web: str, *, master: bool, **settings: Any) -> Service:
        service = make_service("gthread", workers=1, **settings)
        set_django(service, zdd_web)
        write(service.directory, "mysite/__init__.py", "")
        write(service.directory, "mysite/urls.py", URLS)
        write(service.directory, "mysite/wsgi.py", WSGI)
        service.target = ["mysite.wsgi"]
        if master:
            service.environ["DJANGO_SETTINGS_MODULE"] = "mysite.settings"
        return service

    return make


@pytest.fixture
def make_flask(make_service: MakeService) -> Callable[..., Service]:
    """Make a service of a module with two Flask apps, of which the first serves."""

    def make(one: object, two: object = None, **settings: Any) -> Service:
        service = make_service("gthread", workers=1, **settings)
        service.write_app(FLASK.replace("{one}", repr(one)).replace("{two}", repr(two or {})))
        return service

    return make


def statuses(service: Service, *paths: str) -> list[int]:
    return [service.get(path).status for path in paths]


def end_of_start(service: Service, status: int = 1) -> str:
    """Start what must not start; return its log."""
    process = service.spawn()
    assert process.wait(timeout=30) == status, service.log()
    service.ends(status=None)
    assert not service.pid_file.exists()
    return service.log()


def refused_start(service: Service) -> str:
    """Start what the master must refuse; return the one line that says why."""
    log = end_of_start(service)
    assert "Traceback" not in log
    assert "Booting worker" not in log
    (line,) = service.matches(r"event=settings\.invalid")
    return line.replace('\\"', '"')


# -- Django, read by the master


def test_master_setting_of_django_is_in_force(make_django: Callable[..., Service]) -> None:
    service = make_django("{}", master=True)
    # In install() the name would win, also an empty one.
    service.write_conf("from zdd_web.gunicorn import install\ninstall(globals())")
    set_django(service, f"{{'NAME': {service.name!r}}}")
    service.start()
    assert service.is_active().board.header.name == service.name
    service.stop()


@pytest.mark.parametrize("how", ["raw_env", "chdir", "pythonpath"])
def test_settings_module_is_found_as_a_worker_finds_it(make_django: Callable[..., Service], how: str) -> None:
    service = make_django("{'GENERATION_HEADER': 'X-Generation'}", master=how != "raw_env")
    if how == "raw_env":
        service.arguments = ["--env", "DJANGO_SETTINGS_MODULE=mysite.settings"]
    else:
        elsewhere = service.directory / "elsewhere"
        elsewhere.mkdir()
        (service.directory / "mysite").rename(elsewhere / "mysite")
        conf = service.directory / "gunicorn.conf.py"
        service.arguments = ["-c", str(conf), f"--{how}", str(elsewhere)]
    service.start()
    assert service.get().headers["X-Generation"] == "1"
    service.stop()


def test_master_imports_no_django(make_django: Callable[..., Service]) -> None:
    service = make_django("{'GENERATION_HEADER': 'X-G'}", master=True)
    service.write_conf(
        """
        import sys
        def when_ready(server):
            print("loaded:", sorted({"django", "mysite"} & set(sys.modules)), file=sys.stderr, flush=True)
        from zdd_web.gunicorn import install
        install(globals(), {settings})
        """
    )
    service.start()
    assert service.matches(r"loaded: \[\]")
    service.stop()


def test_preloaded_app_is_read_before_it_is_loaded_and_heard_in_the_worker(
    make_django: Callable[..., Service],
) -> None:
    service = make_django("{'GENERATION_HEADER': 'X-G', 'READINESS_PATH': '/ready'}", master=True)
    service.arguments = ["--preload"]
    service.start()
    assert "X-G" in service.get().headers
    assert statuses(service, "/ready", "/readyz") == [200, 404]
    service.stop()


def test_install_wins_over_django_and_the_environment_over_both(make_django: Callable[..., Service]) -> None:
    service = make_django(
        "{'GENERATION_HEADER': 'X-Django', 'READINESS_PATH': '/django', 'HEALTH_PATH': '/health'}",
        master=True,
        generation_header="X-Install",
        readiness_path="/install",
    )
    service.environ["ZDD_WEB_READINESS_PATH"] = "/environment"
    service.start()
    assert "X-Install" in service.get().headers
    assert statuses(service, "/environment", "/install", "/django", "/health") == [200, 404, 404, 200]
    service.stop()


@pytest.mark.parametrize(
    ("zdd_web", "said"),
    [
        ("{'GRACE_PERIOD': 'soon'}", "GRACE_PERIOD = 'soon': must be a number of seconds"),
        ("{'GRACE_PERIODE': 5}", "no such setting 'GRACE_PERIODE'; did you mean GRACE_PERIOD?"),
        ("{'grace_period': 5}", "no such setting 'grace_period'; did you mean GRACE_PERIOD?"),
        ("[5]", "[5] is not a dictionary: write ZDD_WEB = {'GRACE_PERIOD': 30}"),
        ("None", "None is not a dictionary"),
        ("{'WARMUP': {'/'}}", "WARMUP = {'/'}: must be text, a number"),
        ("{'GRACE_PERIOD': 5, 'DRAIN_DELAY': 9}", "DRAIN_DELAY = 9 and 0.5 to exit leave no time"),
    ],
)
def test_value_that_cannot_work_ends_the_start(make_django: Callable[..., Service], zdd_web: str, said: str) -> None:
    line = refused_start(make_django(zdd_web, master=True))
    assert "ZDD_WEB in Django's settings module mysite.settings: " in line
    assert said in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("raise ValueError('no\\ndatabase')", "ValueError: no database"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = (", "SyntaxError: '(' was never closed (settings.py, line"),
        ("raise SystemExit('set SECRET')", "SystemExit: set SECRET"),
        ("import os; os.write(2, b'bye\\n'); os._exit(7)", "the process that tried it ended with status 7; bye"),
    ],
)
def test_settings_module_that_raises_ends_the_start(make_django: Callable[..., Service], more: str, said: str) -> None:
    service = make_django("{}", master=True)
    set_django(service, "{}", more)
    line = refused_start(service)
    assert f"DJANGO_SETTINGS_MODULE=mysite.settings cannot be read for ZDD_WEB: {said}" in line
    assert f"(python -c 'import mysite.settings' in {service.directory} shows where), or unset the variable" in line


def test_settings_module_that_is_slow_does_not_end_the_start(make_django: Callable[..., Service]) -> None:
    service = make_django("{}", master=True, upgrade_timeout=1)
    set_django(service, "{}", SLOW_FOR_THE_MASTER)
    service.start()
    assert "module=mysite.settings seconds=1 " in service.wait_for("event=settings.unread")
    service.until_alone()
    service.stop()


def test_slow_settings_module_that_contradicts_the_master_ends_the_start(make_django: Callable[..., Service]) -> None:
    service = make_django("{}", master=True, upgrade_timeout=1)
    set_django(service, "{'GRACE_PERIOD': 20}", SLOW_FOR_THE_MASTER)
    assert "GRACE_PERIOD = 20 contradicts the default GRACE_PERIOD = 30" in end_of_start(service, status=3)


def test_settings_module_may_print_and_leave_threads(make_django: Callable[..., Service]) -> None:
    service = make_django("{'GENERATION_HEADER': 'X-G'}", master=True)
    more = "import threading, time\nprint('{hello')\nif __import__('sys').argv[0].endswith('gunicorn/__main__.py'):\n"
    more += "    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\nelse:\n    raise ValueError\n"
    set_django(service, "{'GENERATION_HEADER': 'X-G'}", more)
    service.start()
    assert "X-G" in service.get().headers
    service.stop()


# -- Django, heard in the worker


def test_app_settings_of_django_need_nothing_of_the_master(make_django: Callable[..., Service]) -> None:
    service = make_django("{'READINESS_PATH': '/ready', 'LIVENESS_PATH': '/alive'}", master=False).start()
    assert statuses(service, "/ready", "/alive", "/healthz", "/readyz", "/livez") == [200, 200, 200, 404, 404]
    service.stop()


def test_master_setting_that_the_master_does_not_know_ends_the_start(make_django: Callable[..., Service]) -> None:
    service = make_django("{'GRACE_PERIOD': 20}", master=False)
    end_of_start(service, status=3)
    (line,) = service.matches(r"event=boot\.failed")
    assert (
        "SettingsError: ZDD_WEB in Django's settings module mysite.settings: GRACE_PERIOD = 20 contradicts the default "
        "GRACE_PERIOD = 30, which gunicorn's master runs with: write install(globals(), grace_period=20), "
        "or export DJANGO_SETTINGS_MODULE=mysite.settings for gunicorn's master"
    ) in line


def test_same_value_in_two_places_is_no_contradiction(make_django: Callable[..., Service]) -> None:
    service = make_django("{'GRACE_PERIOD': 20, 'READINESS_PATH': '/up'}", master=False, grace_period=20.0)
    service.environ["ZDD_WEB_READINESS_PATH"] = "/up"
    service.start()
    assert statuses(service, "/up") == [200]
    service.stop()


@pytest.mark.parametrize(
    ("settings", "environ", "said"),
    [
        (
            {"readiness_path": "/up"},
            {},
            "contradicts install(readiness_path='/up'), which gunicorn's master runs with: "
            "write install(globals(), readiness_path='/ready'), or take READINESS_PATH out of ZDD_WEB",
        ),
        (
            {},
            {"ZDD_WEB_READINESS_PATH": "/up"},
            "contradicts ZDD_WEB_READINESS_PATH=/up, which gunicorn's master runs with: "
            "export ZDD_WEB_READINESS_PATH=/ready, or take READINESS_PATH out of ZDD_WEB",
        ),
    ],
)
def test_app_setting_that_somebody_else_has_set_is_a_contradiction(
    make_django: Callable[..., Service], settings: dict[str, str], environ: dict[str, str], said: str
) -> None:
    service = make_django("{'READINESS_PATH': '/ready'}", master=False, **settings)
    service.environ.update(environ)
    assert f"READINESS_PATH = '/ready' {said}" in end_of_start(service, status=3)


# -- Flask


def test_app_settings_of_flask_are_taken(make_flask: Callable[..., Service]) -> None:
    service = make_flask({"READINESS_PATH": "/ready"}, {"READINESS_PATH": "/ready", "LIVENESS_PATH": "/alive"}).start()
    assert statuses(service, "/ready", "/alive", "/readyz", "/livez") == [200, 200, 404, 404]
    service.stop()


def test_master_setting_of_flask_that_contradicts_install_ends_the_start(make_flask: Callable[..., Service]) -> None:
    log = end_of_start(make_flask({"GRACE_PERIOD": 20}, grace_period=25), status=3)
    assert (
        "app.config['ZDD_WEB'] of Flask app 'one': GRACE_PERIOD = 20 contradicts install(grace_period=25), "
        "which gunicorn's master runs with: write install(globals(), grace_period=20), "
        "or take GRACE_PERIOD out of ZDD_WEB"
    ) in log


def test_apps_of_one_worker_that_disagree_end_the_start(make_flask: Callable[..., Service]) -> None:
    log = end_of_start(make_flask({"HEALTH_PATH": "/a"}, {"HEALTH_PATH": "/b"}), status=3)
    assert "app.config['ZDD_WEB'] of Flask app 'two': HEALTH_PATH = '/b' contradicts" in log
    assert "of Flask app 'one': HEALTH_PATH = '/a': the apps of one worker share its settings" in log


# -- upgrade and reload


@pytest.mark.parametrize("master", [True, False])
def test_upgrade_to_code_with_a_bad_value_fails_and_costs_nothing(
    make_django: Callable[..., Service], master: bool
) -> None:
    service = make_django("{}", master=master).start()
    set_django(service, "{'GRACE_PERIOD': 'soon'}")
    line = service.upgrade(expect="upgrade.failed")
    assert "ZDD_WEB in Django's settings module mysite.settings: GRACE_PERIOD = 'soon': must be a number" in line
    assert service.get().generation == 1
    service.stop()


def test_upgrade_to_a_contradiction_fails_with_both_values(make_django: Callable[..., Service]) -> None:
    service = make_django("{}", master=False).start()
    set_django(service, "{'GRACE_PERIOD': 20}")
    line = service.upgrade(expect="upgrade.failed")
    assert "GRACE_PERIOD = 20 contradicts the default GRACE_PERIOD = 30" in line
    assert service.get().generation == 1
    service.stop()


def test_successor_reads_its_own(make_django: Callable[..., Service]) -> None:
    service = make_django("{'GENERATION_HEADER': 'X-Old', 'READINESS_PATH': '/old'}", master=True).start()
    set_django(service, "{'GENERATION_HEADER': 'X-New', 'READINESS_PATH': '/new'}")
    service.upgrade()
    service.wait_for(r"generation=1 event=phase\.stopped")
    reply = service.get()
    assert (reply.generation, reply.headers["X-New"]) == (2, "2")
    assert statuses(service, "/new", "/old") == [200, 404]
    service.stop()


def test_hanging_settings_module_fails_the_upgrade_and_leaves_no_process(make_django: Callable[..., Service]) -> None:
    service = make_django("{}", master=True, upgrade_timeout=3).start()
    set_django(service, "{}", "import time\ntime.sleep(1000)\n")
    before = len(service.processes())
    assert "not ready within UPGRADE_TIMEOUT = 3 s" in service.upgrade(expect="upgrade.failed")
    until("the end of what was tried", lambda: len(service.processes()) == before, service)
    service.stop()


@pytest.mark.parametrize("master", [True, False])
def test_reload_takes_new_app_settings(make_django: Callable[..., Service], master: bool) -> None:
    service = make_django("{'READINESS_PATH': '/old'}", master=master).start()
    assert statuses(service, "/old") == [200]
    set_django(service, "{'HEALTH_PATH': '/new'}")
    service.signal(signal.SIGHUP)
    service.wait_for(r"event=reload\.done")
    until("the new worker", lambda: statuses(service, "/new", "/old", "/readyz") == [200, 404, 200], service)
    service.stop()


def test_reload_takes_new_app_settings_of_install(make_service: MakeService) -> None:
    service = make_service("gthread", workers=1, readiness_path="/old").start()
    service.configure(readiness_path="/new")
    service.signal(signal.SIGHUP)
    service.wait_for(r"event=reload\.done")
    until("the new worker", lambda: service.get("/new").body == "ok\n", service)
    service.stop()


@pytest.mark.parametrize("source", ["django", "install"])
def test_reload_with_a_changed_master_setting_is_refused(make_django: Callable[..., Service], source: str) -> None:
    service = make_django("{}", master=True).start()
    if source == "django":
        set_django(service, "{'GRACE_PERIOD': 20}")
        place = "ZDD_WEB in Django's settings module mysite.settings: GRACE_PERIOD = 20"
    else:
        service.configure(grace_period=20)
        place = "install(grace_period=20)"
    service.signal(signal.SIGHUP)
    line = service.wait_for("event=refused")
    assert "GRACE_PERIOD changed from 30 (the default GRACE_PERIOD = 30) to 20 (" + place in line
    assert "use an upgrade (SIGUSR2), which takes it over" in line
    assert 'reason="GRACE_PERIOD changed' in line
    assert 'remedy="use an upgrade; the old workers serve on"' in line
    assert service.upgrade()
    service.stop()


def test_reload_notices_a_variable_of_raw_env_that_is_gone(make_service: MakeService) -> None:
    service = make_service("gthread", workers=1)
    service.configure("raw_env = ['ZDD_WEB_GRACE_PERIOD=20']\n").start()
    service.configure()
    service.signal(signal.SIGHUP)
    line = service.wait_for("event=refused")
    assert "GRACE_PERIOD changed from 20 (ZDD_WEB_GRACE_PERIOD=20) to 30 (the default GRACE_PERIOD = 30)" in line
    service.stop()


def test_reload_to_a_contradiction_is_refused_before_a_worker_meets_it(make_django: Callable[..., Service]) -> None:
    service = make_django("{}", master=False).start()
    set_django(service, "{'GRACE_PERIOD': 20}")
    service.signal(signal.SIGHUP)
    line = service.wait_for("event=refused")
    assert "GRACE_PERIOD = 20 contradicts the default GRACE_PERIOD = 30" in line
    assert not service.matches(r"event=(boot\.failed|worker\.boot_failed)")
    service.stop()
