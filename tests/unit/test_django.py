"""The Django middleware answers probes before Django has an opinion on the request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.apps import apps
from django.conf import settings as django_settings
from django.core.management import find_commands
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings

import zdd_web
from zdd_web import errors as zdd_web_errors
from zdd_web import process
from zdd_web.board import Board
from zdd_web.django.middleware import ProbeMiddleware, _probes
from zdd_web.lifecycle import Phase

Service = Callable[..., Board]
Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, client: Client, async_client: AsyncClient) -> Ask:
    """Ask over WSGI or ASGI: `ask("GET", "/healthz")`."""
    if request.param == "sync":
        return lambda method, path, **kwargs: client.generic(method, path, **kwargs)

    async def ask(method: str, path: str, **kwargs: Any) -> Any:
        return await async_client.generic(method, path, **kwargs)

    return async_to_sync(ask)


@pytest.fixture(autouse=True)
def serving(service: Service) -> Board:
    return service()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/livez/", "/readyz/", "/healthz/"])
def test_probe_is_answered(ask: Ask, path: str) -> None:
    response = ask("GET", path)
    assert (response.status_code, response.content) == (200, b"ok\n")
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert (response.headers["Content-Length"], response.headers["Cache-Control"]) == ("3", "no-store")


def test_app_is_still_answered(ask: Ask) -> None:
    assert ask("GET", "/").content == b"the app"
    assert ask("GET", "/async").content == b"the async app"
    assert ask("GET", "/no-such-page").status_code == 404


def test_probe_is_answered_under_a_host_that_the_app_refuses(ask: Ask, settings: Any) -> None:
    # As the settings say, without the "testserver" that the test runner adds.
    settings.ALLOWED_HOSTS = ["shop.example"]
    assert ask("GET", "/").status_code == 400
    assert ask("GET", "/healthz").status_code == 200


def test_probe_is_answered_under_the_address_of_the_pod(client: Client) -> None:
    pod = {"host": "10.1.2.3:8000"}
    assert client.get("/", headers=pod).status_code == 400
    assert client.get("/healthz", headers=pod).status_code == 200


def test_probe_is_not_sent_to_https(ask: Ask, settings: Any) -> None:
    settings.SECURE_SSL_REDIRECT = True
    assert ask("GET", "/").status_code == 301
    assert ask("GET", "/healthz").status_code == 200


def test_probe_touches_no_session(client: Client) -> None:
    client.cookies["sessionid"] = "x" * 32
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        client.get("/")
    response = client.get("/healthz")
    assert response.status_code == 200
    assert "Set-Cookie" not in response.headers
    assert "Vary" not in response.headers


def test_probe_is_answered_while_the_urlconf_is_broken(ask: Ask, settings: Any) -> None:
    settings.ROOT_URLCONF = "no.such.urlconf"
    assert ask("GET", "/healthz").status_code == 200


def test_head_is_get_without_the_body(ask: Ask) -> None:
    response = ask("HEAD", "/healthz")
    assert (response.status_code, response.content, response.headers["Content-Length"]) == (200, b"", "3")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_not_allowed(ask: Ask, method: str) -> None:
    response = ask(method, "/healthz")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD")


def test_drain_shows_in_readiness_and_not_in_liveness(ask: Ask, serving: Board) -> None:
    serving.header.phase = Phase.LAME_DUCK
    response = ask("GET", "/readyz")
    assert (response.status_code, response.reason_phrase) == (503, "Service Unavailable")
    assert (response.content, response.headers["Retry-After"]) == (b"lame_duck\n", "5")
    assert ask("GET", "/livez").status_code == 200
    assert ask("GET", "/").content == b"the app"


def test_paths_are_those_of_the_settings(ask: Ask, service: Service) -> None:
    service(health_path="/up")
    assert [ask("GET", path).status_code for path in ("/up", "/up/", "/healthz")] == [200, 200, 404]


def test_paths_are_those_of_djangos_settings(ask: Ask, settings: Any) -> None:
    paths = ["/ready", "/ready/", "/readyz", "/livez"]
    assert [ask("GET", path).status_code for path in paths] == [404, 404, 200, 200]
    settings.ZDD_WEB = {"READINESS_PATH": "/ready"}
    assert [ask("GET", path).status_code for path in paths] == [200, 200, 404, 200]
    with override_settings(ZDD_WEB={"LIVENESS_PATH": "/ready"}):
        assert [ask("GET", path).status_code for path in paths] == [200, 200, 200, 404]
    assert [ask("GET", path).status_code for path in paths] == [200, 200, 404, 200]


def test_override_is_taken_back_after_it(ask: Ask) -> None:
    with override_settings(ZDD_WEB={"READINESS_PATH": "/ready"}):
        assert ask("GET", "/ready").status_code == 200
    assert (ask("GET", "/ready").status_code, ask("GET", "/readyz").status_code) == (404, 200)


def test_paths_that_something_stronger_has_set_stay(ask: Ask, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_current", None)
    monkeypatch.setenv("ZDD_WEB_READINESS_PATH", "/environment")
    settings.ZDD_WEB = {"READINESS_PATH": "/ready", "HEALTH_PATH": "/health", "GRACE_PERIOD": 20}
    paths = ["/environment", "/ready", "/health"]
    assert [ask("GET", path).status_code for path in paths] == [200, 404, 200]
    process.current().board.close()


@pytest.mark.parametrize(
    ("zdd_web", "said"),
    [
        ({"READYNESS_PATH": "/ready"}, "no such setting 'READYNESS_PATH'; did you mean READINESS_PATH?"),
        ({"READINESS_PATH": "ready"}, "READINESS_PATH = 'ready': must be an absolute path"),
        (["/ready"], r"\['/ready'\] is no dictionary"),
    ],
)
def test_settings_that_cannot_work_are_an_error_of_the_start(settings: Any, zdd_web: object, said: str) -> None:
    settings.ZDD_WEB = zdd_web
    with pytest.raises(zdd_web_errors.SettingsError, match=f"^ZDD_WEB in Django's settings: {said}"):
        get_wsgi_application()


def test_request_of_the_app_reads_no_settings(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/healthz").status_code == 200
    monkeypatch.setattr(_probes, "_brought", None)
    monkeypatch.setattr(_probes, "_make", None)
    assert client.get("/healthz").status_code == 200
    assert client.get("/").content == b"the app"


def test_query_does_not_hide_a_probe(ask: Ask) -> None:
    assert ask("GET", "/healthz?full=1").content == b"ok\n"


def test_middleware_is_of_the_kind_that_it_wraps() -> None:
    async def asynchronous(request: HttpRequest) -> HttpResponse:
        return HttpResponse("never")

    def synchronous(request: HttpRequest) -> HttpResponse:
        return HttpResponse("never")

    assert iscoroutinefunction(ProbeMiddleware(asynchronous))
    assert not iscoroutinefunction(ProbeMiddleware(synchronous))


def test_installed_app_is_found_under_the_name_of_the_package() -> None:
    assert django_settings.INSTALLED_APPS[0] == "zdd_web"
    config = apps.get_app_config("zdd_web")
    assert (config.label, config.name, config.verbose_name) == ("zdd_web", "zdd_web.django", "zdd_web")
    assert Path(config.path) == Path(str(zdd_web.__file__)).parent / "django"


def test_management_commands_are_looked_for_beside_the_middleware() -> None:
    config = apps.get_app_config("zdd_web")
    assert Path(config.path).samefile(Path(str(ProbeMiddleware.__init__.__code__.co_filename)).parent)
    # Django looks there by itself once there are any.
    assert find_commands(str(Path(config.path) / "management")) == []
