"""Agents that a launcher brings in by the environment are still there after a deploy by symlink, and of its release.

Each launcher runs from the first release's virtualenv and writes paths of that into the environment. The next
generation has an interpreter of another virtualenv, and an agent that finds itself in the wrong one turns itself off.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.processes.harness import Service, until
from tests.processes.releases import Releases

#: By the command: its words, the package, and variables that keep it from talking to any host.
LAUNCHERS = {
    "newrelic-admin": (
        ["run-program"],
        "newrelic",
        {
            "NEW_RELIC_DEVELOPER_MODE": "true",
            "NEW_RELIC_LOG": "stderr",
            "NEW_RELIC_CONFIG_FILE": "{release}/newrelic.ini",
        },
    ),
    "ddtrace-run": (
        [],
        "ddtrace",
        {
            "DD_TRACE_ENABLED": "false",
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "DD_REMOTE_CONFIGURATION_ENABLED": "false",
            "DD_CRASHTRACKING_ENABLED": "false",
        },
    ),
    "opentelemetry-instrument": (
        [],
        "opentelemetry",
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"},
    ),
}

#: The distributions, as pip knows them.
PACKAGES = {
    "newrelic-admin": "newrelic",
    "ddtrace-run": "ddtrace",
    "opentelemetry-instrument": "opentelemetry-distro",
}

APP = """
    import json, os, sys
    import zdd_web
    from zdd_web.wsgi import ProbeMiddleware

    def agent():
        if "newrelic.config" in sys.modules:
            import newrelic.config
            return newrelic.config.__file__ if newrelic.config._configuration_done else ""
        for name in ("ddtrace.bootstrap.preload", "opentelemetry.instrumentation.auto_instrumentation"):
            if name in sys.modules:
                return sys.modules[name].__file__
        return ""

    def app(environ, start_response):
        told = {"generation": zdd_web.generation(), "agent": agent(), "prefix": sys.prefix}
        body = json.dumps(told).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    app = ProbeMiddleware(app)
"""


def install(release: Path, launcher: str) -> None:
    """Give a release's virtualenv the agent: a directory of its own, as pip would, and the launcher's script."""
    package = LAUNCHERS[launcher][1]
    (packages,) = release.glob("lib/*/site-packages")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    (packages / package).symlink_to(next(iter(spec.submodule_search_locations)))
    source = (Path(sys.executable).parent / launcher).read_text()
    script = release / "bin" / launcher
    script.write_text(f"#!{release}/bin/python\n{source.partition(chr(10))[2]}")
    script.chmod(0o755)
    (release / "newrelic.ini").write_text("[newrelic]\napp_name = test\ndeveloper_mode = true\n")


def agent_of(service: Service, generation: int) -> dict:
    def ask() -> dict | None:
        found = json.loads(service.get().body)
        return found if found["generation"] == generation else None

    return until(f"an answer of generation {generation}", ask, service)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_agent_is_that_of_the_release_after_a_deploy_by_symlink_and_a_rollback(make_service, tmp_path, launcher: str):
    words, package, environ = LAUNCHERS[launcher]
    if importlib.util.find_spec(package) is None or not (Path(sys.executable).parent / launcher).exists():
        pytest.skip(f"{PACKAGES[launcher]} is not installed: pip install {PACKAGES[launcher]}")
    service = make_service(workers=1)
    releases = Releases(tmp_path / "srv", (service.directory / "gunicorn.conf.py").read_text())
    for name in ("r1", "r2"):
        install(releases.add(name), launcher)
    releases.flip("r1")
    service.directory = releases.current
    service.write_app(APP)
    (releases.path("r2") / "app.py").write_text((releases.path("r1") / "app.py").read_text())
    service.environ |= {key: value.format(release=releases.path("r1")) for key, value in environ.items()}
    service.environ["VIRTUAL_ENV"] = str(releases.path("r1"))
    scripts = releases.current / "bin"
    service.launcher = ["env", f"PWD={releases.current}", str(scripts / launcher), *words, str(scripts / "gunicorn")]
    service.start()
    assert agent_of(service, 1)["agent"].startswith(f"{releases.path('r1')}/lib/")
    releases.flip("r2")
    service.upgrade()
    found = agent_of(service, 2)
    assert found["prefix"] == str(releases.path("r2"))
    assert found["agent"].startswith(f"{releases.path('r2')}/lib/")
    assert not service.matches(r"event=upgrade\.left_behind")
    assert service.run("rollback", "--name", service.name).returncode == 0, service.log()
    assert agent_of(service, 3)["agent"].startswith(f"{releases.path('r1')}/lib/")


def test_agent_that_the_new_release_lacks_is_named(make_service, tmp_path):
    service = make_service(workers=1)
    releases = Releases(tmp_path / "srv", (service.directory / "gunicorn.conf.py").read_text())
    for name in ("r1", "r2"):
        releases.add(name)
    (releases.path("r1") / "agent").mkdir()
    releases.flip("r1")
    service.directory = releases.current
    service.launcher = ["env", f"PWD={releases.current}", str(releases.current / "bin" / "gunicorn")]
    service.environ["PYTHONPATH"] = str(releases.path("r1") / "agent")
    service.start()
    releases.flip("r2")
    service.upgrade()
    assert "variables=PYTHONPATH" in service.wait_for(r"event=upgrade\.left_behind")
