"""The Django middleware answers probes before Django has an opinion on the request."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, iscoroutinefunction
from django.apps import apps
from django.conf import settings as django_settings
from django.core.asgi import get_asgi_application
from django.core.management import call_command, find_commands, load_command_class
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings

import zdd_web
import zdd_web.asgi
from zdd_web import errors as zdd_web_errors
from zdd_web import process, watch
from zdd_web.board import Board
from zdd_web.checks import registry
from zdd_web.django import signals
from zdd_web.django.middleware import ProbeMiddleware, _probes
from zdd_web.django.signals import phase_changed
from zdd_web.django.system_checks import MIDDLEWARE
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


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_not_allowed(ask: Ask, method: str) -> None:
    response = ask(method, "/healthz")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


def test_options_is_get_without_the_body(ask: Ask) -> None:
    response = ask("OPTIONS", "/healthz")
    assert (response.status_code, response.content, response.headers["Content-Length"]) == (200, b"", "0")


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


@pytest.mark.usefixtures("no_handle")
def test_paths_that_something_stronger_has_set_stay(ask: Ask, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (["/ready"], r"\['/ready'\] is not a dictionary"),
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
    assert find_commands(str(Path(config.path) / "management")) == ["zdd"]


# -- the async stack


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Note each call that an async stack hands to a thread."""
    found: list[object] = []
    call = SyncToAsync.__call__

    async def noted(self: SyncToAsync[..., Any], *args: Any, **kwargs: Any) -> Any:
        found.append(self.func)
        return await call(self, *args, **kwargs)

    monkeypatch.setattr(SyncToAsync, "__call__", noted)
    return found


async def over_asgi(app: Any, path: str) -> bytes:
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "path": path, "query_string": b"",
        "headers": [(b"host", b"shop.example")], "client": ("10.0.0.7", 4711),
    }  # fmt: skip
    sent: list[Any] = []
    bodies = [b""]

    async def receive() -> Any:
        if not bodies:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": bodies.pop()}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("path", ["/thread", "/healthz", "/no-such-page"])
def test_middleware_hands_nothing_to_a_thread(settings: Any, hops: list[object], path: str) -> None:
    # Django itself does, for its signals; no request may have one more with the middleware.
    counts = []
    for stack in ([], [MIDDLEWARE]):
        settings.MIDDLEWARE = stack
        app = get_asgi_application()
        hops.clear()
        asyncio.run(over_asgi(app, path))
        counts.append(len(hops))
    # A page that is not there is logged, in a thread.
    without, with_it = counts
    assert with_it < without if path == "/healthz" else with_it == without


def test_async_view_runs_in_the_thread_of_the_loop(settings: Any) -> None:
    settings.MIDDLEWARE = [MIDDLEWARE]
    here = threading.get_ident()
    assert asyncio.run(over_asgi(get_asgi_application(), "/thread")) == str(here).encode()


def test_probe_before_django_needs_no_thread_at_all(hops: list[object]) -> None:
    app = zdd_web.asgi.ProbeMiddleware(get_asgi_application())
    assert asyncio.run(over_asgi(app, "/healthz")) == b"ok\n"
    assert hops == []
    assert asyncio.run(over_asgi(app, "/async")) == b"the async app"


# -- phase_changed


@pytest.fixture
def receivers() -> Iterator[list[Any]]:
    """Whoever is put in here hears `phase_changed`."""
    connected: list[Any] = []

    class Connecting(list[Any]):
        def append(self, receiver: Any) -> None:
            connected.append(receiver)
            phase_changed.connect(receiver, weak=False)

    yield Connecting()
    for each in connected:
        phase_changed.disconnect(each)


def send(*change: object) -> None:
    """Send the signal from a thread, as the watch does: it closes the thread's connections."""
    thread = threading.Thread(target=watch._listeners["django"], args=change)
    thread.start()
    thread.join()


def test_signal_says_what_has_changed(receivers: list[Any]) -> None:
    heard: list[Any] = []
    receivers.append(lambda signal, **said: heard.append(said))
    send(Phase.LAME_DUCK, Phase.SERVING, 3)
    assert heard == [{"sender": Phase, "phase": Phase.LAME_DUCK, "previous": Phase.SERVING, "generation": 3}]


def test_thread_keeps_no_connection_of_the_receivers(receivers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Connections:
        def close_all(self) -> None:
            done.append("closed")

    monkeypatch.setattr(signals, "connections", Connections())
    receivers.append(lambda **said: done.append("told"))
    send(Phase.DRAINING, Phase.LAME_DUCK, 1)
    assert done == ["told", "closed"]


def test_receiver_may_be_async(receivers: list[Any]) -> None:
    heard: list[Any] = []

    async def told(**said: Any) -> None:
        heard.append(said["phase"])

    receivers.append(told)
    send(Phase.DRAINING, Phase.LAME_DUCK, 1)
    assert heard == [Phase.DRAINING]


def test_receiver_that_raises_is_logged_and_the_others_hear(
    receivers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Any] = []

    def broken(**said: Any) -> None:
        raise ValueError("no such queue")

    receivers.append(broken)
    receivers.append(lambda **said: heard.append(said["phase"]))
    with caplog.at_level(logging.ERROR, logger="zdd_web"):
        send(Phase.DRAINING, Phase.LAME_DUCK, 1)
    assert heard == [Phase.DRAINING]
    (record,) = (each for each in caplog.records if each.name == "zdd_web")
    assert record.message.startswith("event=internal.error where=")
    assert "broken" in record.message
    assert "ValueError: no such queue" in caplog.text


# -- manage.py zdd


def zdd(*arguments: str) -> tuple[int, str, str]:
    """Run `manage.py zdd ...`; return its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command("zdd", *arguments, stdout=out, stderr=err)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "shared", registry.Registry())


def test_command_needs_no_database_and_no_other_checks() -> None:
    command = load_command_class("zdd_web.django", "zdd")
    assert list(command.requires_system_checks) == []
    assert not command.requires_migrations_checks


@pytest.mark.parametrize("name", ["status", "history", "upgrade", "rollback", "cancel", "drain"])
def test_command_is_that_of_zdd_web(name: str) -> None:
    status, out, err = zdd(name, "--name", "no-such-service")
    assert (status, out) == (2, "")
    assert err.startswith("Error: no service named 'no-such-service': ")
    status, out, _ = zdd(name, "--help")
    assert (status, out.splitlines()[0]) == (0, f"Usage: manage.py zdd {name} [OPTIONS]")


def test_command_that_is_none_is_bad_usage() -> None:
    status, _, err = zdd("rehearse")
    assert status == 2
    assert "No such command 'rehearse'" in err


def test_options_of_manage_py_may_stand_behind_the_command() -> None:
    status, _, err = zdd("status", "--settings=mysite.settings", "--name", "nobody", "--pythonpath", ".", "--traceback")
    assert status == 2
    assert err.startswith("Error: no service named 'nobody'")


def test_check_passes_a_project_that_works(no_checks: None) -> None:
    assert zdd("check") == (0, "nothing serious was found; the app has no checks\n", "")


def test_check_runs_the_checks_of_the_app_once(no_checks: None) -> None:
    calls = []
    zdd_web.check("queue")(lambda: calls.append(1))
    zdd_web.check("mail", critical=False)(lambda: False)
    assert zdd("check") == (
        0,
        "ok: check 'queue'\nnothing serious was found\n",
        "warning: check 'mail': it returned False\n",
    )
    assert calls == [1]


def test_check_fails_with_a_critical_check(no_checks: None) -> None:
    @zdd_web.check("queue")
    def queue() -> None:
        raise ConnectionError("refused")

    assert zdd("check") == (1, "", "error: check 'queue': ConnectionError: refused\n")


def test_check_loads_the_checks_that_the_settings_name(no_checks: None) -> None:
    with override_settings(ZDD_WEB={"CHECKS": ["platform.node"]}):
        assert zdd("check") == (0, "ok: check 'node'\nnothing serious was found\n", "")
    with override_settings(ZDD_WEB={"CHECKS": ["platform.no_such"]}):
        status, _, err = zdd("check")
    assert status == 1
    assert "platform.no_such" in err


def test_check_fails_with_an_error_of_the_settings_and_says_it_once(no_checks: None) -> None:
    with override_settings(ZDD_WEB={"GRACE_PERIOD": "soon"}):
        status, out, err = zdd("check")
    assert (status, out) == (1, "")
    assert err.count("GRACE_PERIOD = 'soon'") == 1
    assert err.startswith("error: (zdd_web.E001) ")


def test_check_prints_warnings_that_are_not_silenced(no_checks: None) -> None:
    with override_settings(MIDDLEWARE=["django.middleware.common.CommonMiddleware"]):
        status, _, err = zdd("check")
        assert (status, err.split()[1]) == (0, "(zdd_web.W001)")
        assert "zdd_web.W006" not in err
        assert "zdd_web.W006" in zdd("check", "--deploy")[2]
        with override_settings(SILENCED_SYSTEM_CHECKS=["zdd_web.W001"]):
            assert zdd("check")[2] == ""
