"""Django's system checks say what will not work before it does not."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.core.checks import ERROR, WARNING, registry, run_checks
from django.core.management import call_command
from django.http import HttpResponse
from django.test import override_settings

from zdd_web.apps import ZddWebConfig
from zdd_web.board import Board
from zdd_web.checks import Registry
from zdd_web.django import system_checks
from zdd_web.django.middleware import ProbeMiddleware
from zdd_web.django.system_checks import COMMON, MIDDLEWARE, SECURITY

Service = Callable[..., Board]

SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "django-checks.md"


@pytest.fixture(autouse=True)
def serving(service: Service) -> None:
    service()


def found(*, deploy: bool = False, **settings: Any) -> dict[str, str]:
    """Return the ids of what `manage.py check` says under these settings, with the text."""
    with override_settings(**settings):
        said = run_checks(tags=["zdd_web"], include_deployment_checks=deploy)
    for message in said:
        assert message.hint, message
        assert message.level == (ERROR if message.id[8] == "E" else WARNING), message
    return {message.id.removeprefix("zdd_web."): message.msg for message in said}


def test_nothing_is_said_of_a_project_that_works() -> None:
    assert found(deploy=True) == {}


def test_manage_py_check_runs_them() -> None:
    call_command("check", "--deploy", "--tag", "zdd_web", "--fail-level", "WARNING")
    assert system_checks.check_settings in registry.registry.get_checks()
    assert system_checks.check_hosts not in registry.registry.get_checks()


@pytest.mark.parametrize(
    ("zdd_web", "said"),
    [
        ({"GRACE_PERIODE": 5}, "no such setting 'GRACE_PERIODE'; did you mean GRACE_PERIOD?"),
        ({"GRACE_PERIOD": "soon"}, "GRACE_PERIOD = 'soon': must be a number of seconds"),
        ([30], "[30] is not a dictionary: write ZDD_WEB = {'GRACE_PERIOD': 30}"),
    ],
)
def test_value_that_cannot_work_is_e001(zdd_web: object, said: str) -> None:
    messages = found(ZDD_WEB=zdd_web)
    assert set(messages) == {"E001"}
    assert said in messages["E001"]


def test_value_of_the_environment_is_e001_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZDD_WEB_DRAIN_DELAY", "long")
    assert "ZDD_WEB_DRAIN_DELAY=long: must be a number" in found()["E001"]


@pytest.mark.parametrize(
    ("zdd_web", "said"),
    [
        ({"GRACE_PERIOD": 10, "DRAIN_DELAY": 10}, "DRAIN_DELAY = 10 and 1 to exit leave no time"),
        ({"READINESS_PATH": "/livez"}, "two probes share the path '/livez'"),
        ({"HEALTH_PATH": "/livez"}, "HEALTH_PATH = '/livez' is LIVENESS_PATH too"),
    ],
)
def test_values_that_contradict_each_other_are_e002(zdd_web: dict[str, Any], said: str) -> None:
    messages = found(ZDD_WEB=zdd_web)
    assert set(messages) == {"E002"}
    assert messages["E002"].startswith(said)


def test_budget_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZDD_WEB_GRACE_PERIOD", "5")
    assert set(found(ZDD_WEB={"DRAIN_DELAY": 10})) == {"E002"}
    monkeypatch.setenv("ZDD_WEB_GRACE_PERIOD", "50")
    assert found(ZDD_WEB={"DRAIN_DELAY": 40}) == {}


def test_budget_that_gunicorns_configuration_may_mend_is_w004() -> None:
    messages = found(ZDD_WEB={"DRAIN_DELAY": 40})
    assert set(messages) == {"W004"}
    assert messages["W004"].startswith("DRAIN_DELAY = 40 and 2 to exit leave no time for requests in GRACE_PERIOD = 30")


def test_middleware_that_is_missing_is_w001() -> None:
    assert set(found(MIDDLEWARE=[SECURITY, COMMON])) == {"W001"}


def test_middleware_that_is_not_first_is_w002_with_those_before() -> None:
    messages = found(MIDDLEWARE=[SECURITY, SESSIONS, MIDDLEWARE, COMMON])
    assert messages == {
        "W002": f"ProbeMiddleware is number 3 in MIDDLEWARE: every probe passes {SECURITY}, {SESSIONS}."
    }


def test_app_that_is_not_installed_is_w003() -> None:
    assert found(INSTALLED_APPS=[]) == {
        "W003": "ProbeMiddleware is used and the app is not installed: no system checks, no phase_changed, "
        "no manage.py zdd."
    }
    # Django takes it for an app without a configuration.
    assert set(found(INSTALLED_APPS=["zdd_web.django"])) == {"W003"}


WITHOUT_THE_APP = """
import django, sys
from django.conf import settings
from django.core.checks import run_checks

settings.configure(MIDDLEWARE=["zdd_web.django.middleware.ProbeMiddleware"])
django.setup()
assert run_checks(tags=["zdd_web"]) == []
import zdd_web.django.middleware
print(*(message.id for message in run_checks(tags=["zdd_web"])))
"""


def test_import_of_the_middleware_registers_what_the_app_cannot() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_APP], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("zdd_web.W003\n", "")


def test_start_says_that_the_app_is_not_installed(caplog: pytest.LogCaptureFixture) -> None:
    def view(request: Any) -> HttpResponse:
        return HttpResponse()

    with caplog.at_level(logging.WARNING, logger="zdd_web"):
        ProbeMiddleware(view)
        assert caplog.messages == []
        with override_settings(INSTALLED_APPS=[], SILENCED_SYSTEM_CHECKS=["zdd_web.W003"]):
            ProbeMiddleware(view)
        assert caplog.messages == []
        with override_settings(INSTALLED_APPS=[]):
            ProbeMiddleware(view)
    (line,) = caplog.messages
    assert line.startswith("zdd_web.W003: ProbeMiddleware is used and the app is not installed")
    assert line.endswith("Put 'zdd_web' into INSTALLED_APPS.")


# -- for production


@pytest.mark.parametrize("before", [[SECURITY, MIDDLEWARE], [SECURITY]])
def test_probes_that_are_sent_to_https_are_w005(before: list[str]) -> None:
    messages = found(deploy=True, SECURE_SSL_REDIRECT=True, MIDDLEWARE=before, ZDD_WEB={"READINESS_PATH": "/ready"})
    assert messages["W005"].startswith("SECURE_SSL_REDIRECT = True sends probes over http to https: ")
    assert {"/livez", "/ready", "/healthz"} <= set(re.findall(r"/\w+", messages["W005"]))
    assert "W005" not in found(SECURE_SSL_REDIRECT=True, MIDDLEWARE=before)


@pytest.mark.parametrize(
    "settings",
    [
        {"SECURE_SSL_REDIRECT": False, "MIDDLEWARE": [SECURITY, MIDDLEWARE]},
        {"SECURE_SSL_REDIRECT": True, "MIDDLEWARE": [MIDDLEWARE, SECURITY]},
        {"SECURE_SSL_REDIRECT": True, "MIDDLEWARE": [SESSIONS, MIDDLEWARE, SECURITY]},
        {
            "SECURE_SSL_REDIRECT": True,
            "MIDDLEWARE": [SECURITY, MIDDLEWARE],
            "SECURE_REDIRECT_EXEMPT": [r"^(live|ready|health|startup)z/?$"],
        },
    ],
)
def test_probes_that_are_not_redirected_are_no_w005(settings: dict[str, Any]) -> None:
    assert "W005" not in found(deploy=True, **settings)


def test_exempt_paths_are_those_of_the_settings() -> None:
    settings = {"SECURE_SSL_REDIRECT": True, "MIDDLEWARE": [SECURITY], "SECURE_REDIRECT_EXEMPT": ["z$"]}
    messages = found(deploy=True, ZDD_WEB={"HEALTH_PATH": "/up"}, **settings)
    assert messages["W005"].endswith("sends probes over http to https: /up.")
    assert "/healthz" in found(deploy=True, ZDD_WEB={"NO": 1}, **{**settings, "SECURE_REDIRECT_EXEMPT": []})["W005"]


@pytest.mark.parametrize("before", [[COMMON, MIDDLEWARE], [SECURITY, COMMON]])
def test_probes_that_are_refused_for_their_host_are_w006(before: list[str]) -> None:
    messages = found(deploy=True, MIDDLEWARE=before)
    assert messages["W006"].startswith("ALLOWED_HOSTS = ['shop.example'")
    assert "W006" not in found(MIDDLEWARE=before)


@pytest.mark.parametrize(
    "settings", [{"ALLOWED_HOSTS": ["*"], "MIDDLEWARE": [COMMON]}, {"MIDDLEWARE": [MIDDLEWARE, COMMON]}]
)
def test_probes_that_are_not_refused_are_no_w006(settings: dict[str, Any]) -> None:
    assert "W006" not in found(deploy=True, **settings)


# -- registration and docs


@pytest.fixture
def anew() -> Iterator[None]:
    before = set(registry.registry.registered_checks), set(registry.registry.deployment_checks)
    yield
    registry.registry.registered_checks, registry.registry.deployment_checks = before


def test_second_ready_registers_nothing_twice(anew: None) -> None:
    before = len(registry.registry.registered_checks), len(registry.registry.deployment_checks)
    config = apps.get_app_config("zdd_web")
    assert isinstance(config, ZddWebConfig)
    config.ready()
    assert (len(registry.registry.registered_checks), len(registry.registry.deployment_checks)) == before


def test_every_id_is_documented_and_no_other() -> None:
    known = re.findall(r'id="zdd_web\.([EW]\d{3})"', inspect.getsource(system_checks))
    rows = re.findall(r"^\| `zdd_web\.([EW]\d{3})` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == rows
    assert sorted(known) == rows
    text = PAGE.read_text()
    for each in ("check_redirect", "check_hosts"):
        for number in re.findall(r'id="(zdd_web\.\w+)"', inspect.getsource(getattr(system_checks, each))):
            assert re.search(rf"`{number}` \| `--deploy` \|", text), number


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        (["nowhere.database"], "there is no module 'nowhere'"),
        (["zdd_web.django.checks.databse"], "has no 'databse'"),
        ([("zdd_web.django.checks.database", {"alais": "x"})], "alais"),
        ([("zdd_web.django.checks.database", {"kind": "readyness"})], "must be one of"),
    ],
)
def test_checks_that_cannot_be_are_found(checks: list[Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zdd_web.checks.registry.shared", Registry())
    messages = found(ZDD_WEB={"CHECKS": checks})
    assert set(messages) == {"E003"}
    assert said in messages["E003"]
    assert found(ZDD_WEB={"CHECKS": ["zdd_web.django.checks.database"]}) == {}
