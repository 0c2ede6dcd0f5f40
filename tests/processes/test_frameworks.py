"""Under a real gunicorn: the signal `phase_changed`, access logs without probes, and the frameworks' commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from tests.processes.harness import CONF, Held, Service, settled, skip_unless_installed, until

MakeService = Callable[..., Service]

#: A project in one module: its settings, its app, and whoever hears `phase_changed`.
PROJECT = """
    import os, sys
    import django
    from django.conf import settings
    from django.apps import AppConfig

    SECRET_KEY = "only for the tests"
    ALLOWED_HOSTS = ["127.0.0.1"]
    ROOT_URLCONF = "project"
    INSTALLED_APPS = ["zdd_web", "project.Receivers"]
    MIDDLEWARE = ["zdd_web.django.middleware.ProbeMiddleware"]
    urlpatterns = []

    def note(*words):
        with open("heard", "a") as file:
            print(*words, file=file)

    def told(sender, *, phase, previous, generation, **kwargs):
        note("phase_changed", previous.label, phase.label, generation, os.getpid())

    def broken(**kwargs):
        raise ValueError("no such queue")

    class Receivers(AppConfig):
        name = "project"
        path = os.path.dirname(__file__)

        def ready(self):
            from zdd_web.django.signals import phase_changed
            phase_changed.connect(broken)
            phase_changed.connect(told)
"""

DJANGO_WSGI = """
    import os
    os.environ["DJANGO_SETTINGS_MODULE"] = "project"
    from django.core.wsgi import get_wsgi_application
    app = get_wsgi_application()
"""


def heard(service: Service) -> list[list[str]]:
    """Return what the receivers have noted: previous, phase, generation and pid."""
    path = service.directory / "heard"
    return [line.split()[1:] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_each_worker_hears_of_each_phase_and_no_master_does(make_service: MakeService, worker_class: str) -> None:
    skip_unless_installed(worker_class)
    service = make_service(worker_class, drain_delay=10, grace_period=20)
    (service.directory / "project.py").write_text(textwrap.dedent(PROJECT))
    service.write_app(DJANGO_WSGI)
    # gevent patches in the worker, after the master would have loaded everything.
    service.arguments = ["--preload"] if worker_class == "gthread" else []
    service.start()
    workers = {str(worker.pid) for worker in service.snapshot().workers}

    def have_heard(*change: str) -> bool:
        return {pid for *said, pid in heard(service) if said == [*change, "1"]} == workers

    until("the phase after the gate", lambda: have_heard("booting", "serving"), service)
    service.signal(signal.SIGTERM)
    until("the lame duck", lambda: have_heard("serving", "lame_duck"), service)
    service.stop()  # ends the lame duck: a worker that leaves looks once more
    assert have_heard("lame_duck", "draining")
    assert {pid for *_, pid in heard(service)} == workers
    errors = service.matches(r"event=internal\.error where=phase_changed:broken")
    assert len(errors) == 3 * len(workers)
    assert "ValueError: no such queue" in service.log()


def test_worker_that_leaves_looks_once_more(make_service: MakeService) -> None:
    service = make_service("gthread", workers=1)
    (service.directory / "project.py").write_text(textwrap.dedent(PROJECT))
    service.write_app(DJANGO_WSGI)
    service.write_conf("from zdd_web import watch\nwatch.LOOK = 60\n" + CONF)
    service.start().stop()
    assert [said[:3] for said in heard(service)] == [["booting", "draining", "1"]]


def test_upgrade_is_heard_as_retiring(make_service: MakeService) -> None:
    service = make_service("gthread", workers=1)
    (service.directory / "project.py").write_text(textwrap.dedent(PROJECT))
    service.write_app(DJANGO_WSGI)
    service.start()
    service.upgrade()
    service.until_one_generation()
    changes = [said[:3] for said in heard(service)]
    assert ["serving", "retiring", "1"] in changes
    assert ["booting", "serving", "2"] in changes
    service.stop()


ASGI = """
    from zdd_web.asgi import ProbeMiddleware

    async def app(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    app = ProbeMiddleware(app)
"""


@pytest.mark.parametrize("worker_class", ["gthread", "asgi", "uvicorn_worker.UvicornWorker"])
def test_access_log_is_without_probes_that_are_well(make_service: MakeService, worker_class: str) -> None:
    skip_unless_installed(worker_class)
    service = make_service(worker_class, workers=1, drain_delay=10, grace_period=20, log_probes=False)
    service.arguments = ["--access-logfile", "-"]
    if worker_class != "gthread":
        service.write_app(ASGI)
    service.start()
    assert [service.get(path).status for path in ("/livez", "/readyz?verbose", "/healthz/", "/")] == [200] * 4
    service.signal(signal.SIGTERM)
    service.wait_for(r"event=phase\.lame_duck")
    assert [service.get(path).status for path in ("/livez", "/readyz")] == [200, 503]
    service.stop()
    requests = re.findall(r'"GET (\S+) HTTP/1.1" (\d+)', service.log())
    assert requests == [("/", "200"), ("/readyz", "503")]


COMMANDS = {
    "zdd-web": ["-m", "zdd_web.cli"],
    "manage.py zdd": ["-m", "django", "zdd"],
    "flask zdd": ["-m", "flask", "zdd"],
}


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.django_settings"}
    words = [sys.executable, *COMMANDS[command], *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environ, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_drain_follows_a_stop_to_its_end(make_service: MakeService, command: str) -> None:
    service = make_service("gthread", drain_delay=0.5).start()
    assert "serving" in run(command, "status", "--name", service.name).stdout
    done = run(command, "drain", "--name", service.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  lame_duck: readiness is 503", done.stdout, re.MULTILINE)
    assert re.search(r"^generation 1 has ended, after [\d.]+ s; nothing was cut off$", done.stdout, re.MULTILINE)
    service.ends(0)


def test_drain_says_what_was_cut_off(make_service: MakeService) -> None:
    service = make_service("gthread", grace_period=1).start()
    with Held(service):
        service.get("/job?seconds=60")
        done = service.run("drain", "--name", service.name)
    assert done.returncode == 1, done
    assert "cut off: 1 request and 1 background task: see event=background.abandoned" in done.stderr
    service.ends(1)


def test_drain_without_waiting_leaves_the_stop_to_itself(make_service: MakeService) -> None:
    service = make_service("gthread", drain_delay=20, grace_period=30).start()
    done = service.run("drain", "--no-wait", "--name", service.name)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    service.wait_for(r"event=phase\.lame_duck")
    # Asked again, it does not end the lame duck.
    assert "which stops already" in service.run("drain", "--no-wait", "--name", service.name).stdout
    assert not service.matches(r"event=phase\.draining")
    service.stop()


def test_app_may_say_it_and_a_reload_takes_it(make_service: MakeService) -> None:
    service = make_service("gthread", workers=1)
    service.arguments = ["--access-logfile", "-"]
    app = """
        import flask
        from zdd_web.flask import ZddWeb

        app = flask.Flask("app")
        app.config["ZDD_WEB"] = {settings}
        ZddWeb(app)
    """
    service.write_app(app.replace("{settings}", "{}"))
    service.start()
    service.get("/livez?before")
    before = service.snapshot().workers[0].pid
    service.write_app(app.replace("{settings}", "{'LOG_PROBES': False}"))
    service.signal(signal.SIGHUP)
    service.wait_for(r"event=reload\.done")
    settled(service, 1, without=[before])
    service.get("/livez?after")
    service.stop()
    assert re.findall(r'"GET (\S+) HTTP/1.1" 200', service.log()) == ["/livez?before"]


ASGI_PROJECT = """
    import os
    os.environ["DJANGO_SETTINGS_MODULE"] = "project"
    from django.core.asgi import get_asgi_application
    app = get_asgi_application()
"""

ASYNC_PROJECT = """
    import asyncio
    from django.http import HttpResponse
    from django.urls import path

    async def view(request):
        await asyncio.sleep(0.05)
        return HttpResponse("ok")

    SECRET_KEY = "only for the test"
    ALLOWED_HOSTS = ["*"]
    INSTALLED_APPS = ["zdd_web"]
    MIDDLEWARE = ["zdd_web.django.middleware.ProbeMiddleware"]
    ROOT_URLCONF = "project"
    ZDD_WEB = {"READINESS_PATH": "/ready"}
    urlpatterns = [path("", view)]
"""


@pytest.mark.parametrize("worker_class", ["asgi", "uvicorn_worker.UvicornWorker"])
def test_an_async_view_of_django_can_be_warmed_up(make_service: MakeService, worker_class: str) -> None:
    service = make_service(skip_unless_installed(worker_class), workers=1, warmup=["/"])
    (service.directory / "project.py").write_text(textwrap.dedent(ASYNC_PROJECT))
    service.write_app(ASGI_PROJECT)
    service.start()
    assert service.get().status == 200
    assert service.get("/ready").status == 200
    service.stop()


def test_a_probe_port_does_not_say_something_else_than_the_app(make_service: MakeService) -> None:
    # Only the app knows its paths: the master, whose process answers on the probe port, would not have them.
    service = make_service("gthread", workers=1, probe_bind="127.0.0.1:0")
    (service.directory / "project.py").write_text(textwrap.dedent(ASYNC_PROJECT))
    service.write_app(DJANGO_WSGI)
    process = service.spawn()
    assert process.wait(30) == 3
    assert service.matches("READINESS_PATH = '/ready' contradicts the default READINESS_PATH = '/readyz'")
    service.environ["DJANGO_SETTINGS_MODULE"] = "project"
    service.log_file.write_text("")
    service.start()
    assert service.get("/ready").status == 200
    service.stop()
