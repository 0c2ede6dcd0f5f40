"""The Flask extension answers probes before anything of the app's has a say."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import NoReturn

import flask
import pytest
from click.testing import Result
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

import zdd_web
from zdd_web import process
from zdd_web.board import Board
from zdd_web.checks import registry
from zdd_web.cli import main
from zdd_web.errors import SettingsError
from zdd_web.flask import ZddWeb, registry_of
from zdd_web.flask.commands import zdd as commands
from zdd_web.lifecycle import Phase

Service = Callable[..., Board]


@pytest.fixture
def app(service: Service) -> flask.Flask:
    service()
    app = flask.Flask(__name__)

    @app.get("/")
    def index() -> str:
        return "the app"

    @app.get("/healthz")
    def shadowed() -> str:
        return "the app's own"

    return app


def test_probes_are_answered_and_the_app_still_is(app: flask.Flask) -> None:
    ZddWeb(app)
    client = app.test_client()
    for path in ("/livez", "/readyz", "/healthz", "/livez/", "/readyz/", "/healthz/"):
        response = client.get(path)
        assert (response.status_code, response.text, response.headers["Cache-Control"]) == (200, "ok\n", "no-store")
        assert response.mimetype == "text/plain"
    assert client.get("/").text == "the app"
    assert client.get("/no-such-page").status_code == 404


def test_nothing_is_answered_before_the_extension_is_there(app: flask.Flask) -> None:
    zdd = ZddWeb()
    assert app.test_client().get("/livez").status_code == 404
    zdd.init_app(app)
    assert app.test_client().get("/livez").status_code == 200


def test_authentication_of_the_app_does_not_block_probes(app: flask.Flask) -> None:
    ZddWeb(app)

    @app.before_request
    def log_in() -> NoReturn:
        flask.abort(401)

    client = app.test_client()
    assert [client.get(path).status_code for path in ("/", "/livez", "/readyz", "/healthz")] == [401, 200, 200, 200]


def test_probe_opens_no_request_of_the_apps(app: flask.Flask) -> None:
    ZddWeb(app)
    seen: list[str] = []
    app.before_request(lambda: seen.append("before"))
    app.after_request(lambda response: seen.append("after") or response)  # type: ignore[func-returns-value]
    app.teardown_request(lambda error: seen.append("teardown"))
    client = app.test_client()
    client.get("/healthz")
    assert seen == []
    client.get("/")
    assert seen == ["before", "after", "teardown"]


def test_head_is_get_without_the_body(app: flask.Flask) -> None:
    ZddWeb(app)
    response = app.test_client().head("/healthz")
    assert (response.status_code, response.data, response.headers["Content-Length"]) == (200, b"", "3")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_not_allowed(app: flask.Flask, method: str) -> None:
    ZddWeb(app)
    response = app.test_client().open("/healthz", method=method)
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


def test_options_is_get_without_the_body(app: flask.Flask) -> None:
    ZddWeb(app)
    response = app.test_client().open("/healthz", method="OPTIONS")
    assert (response.status_code, response.data, response.headers["Content-Length"]) == (200, b"", "0")


def test_drain_shows_in_readiness_and_not_in_liveness(app: flask.Flask, service: Service) -> None:
    ZddWeb(app)
    board = service(Phase.SERVING)
    client = app.test_client()
    board.header.phase = Phase.LAME_DUCK
    response = client.get("/healthz")
    assert (response.status_code, response.text, response.headers["Retry-After"]) == (503, "lame_duck\n", "5")
    assert client.get("/livez").status_code == 200
    assert client.get("/").text == "the app"


def test_second_call_for_an_app_changes_nothing(app: flask.Flask) -> None:
    zdd = ZddWeb(app)
    wrapped = app.wsgi_app
    zdd.init_app(app)
    ZddWeb(app)
    assert app.wsgi_app is wrapped
    assert app.test_client().get("/healthz").text == "ok\n"


def test_one_extension_serves_several_apps(app: flask.Flask) -> None:
    other = flask.Flask("other")
    other.add_url_rule("/", view_func=lambda: "the other app")
    zdd = ZddWeb()
    zdd.init_app(app)
    zdd.init_app(other)
    answers = [each.test_client().get(path).text for each in (app, other) for path in ("/", "/livez")]
    assert answers == ["the app", "ok\n", "the other app", "ok\n"]
    assert vars(zdd) == {}
    assert app.extensions["zdd_web"] is not other.extensions["zdd_web"]


def test_two_extensions_for_an_app_are_one(app: flask.Flask) -> None:
    first, second = ZddWeb(), ZddWeb()
    first.init_app(app)
    wrapped = app.wsgi_app
    second.init_app(app)
    first.init_app(app)
    assert app.wsgi_app is wrapped


def test_apps_under_one_server_answer_each_on_its_own_path(app: flask.Flask) -> None:
    app.config["ZDD_WEB"] = {"READINESS_PATH": "/ready"}
    admin = flask.Flask("admin")
    admin.config["ZDD_WEB"] = {"READINESS_PATH": "/admin-ready"}
    zdd = ZddWeb()
    zdd.init_app(app)
    zdd.init_app(admin)
    client = Client(DispatcherMiddleware(app, {"/admin": admin}))
    paths = ["/ready", "/admin-ready", "/admin/ready", "/admin/admin-ready", "/readyz", "/admin/livez"]
    assert [client.get(path).status_code for path in paths] == [200, 404, 404, 200, 404, 200]


def test_app_that_nobody_uses_any_more_is_forgotten(service: Service) -> None:
    service()
    app = flask.Flask("short-lived")
    app.config["ZDD_WEB"] = {"HEALTH_PATH": "/short-lived"}
    ZddWeb(app)
    assert app.test_client().get("/short-lived").status_code == 200
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None


def test_paths_are_those_of_the_settings(app: flask.Flask, service: Service) -> None:
    ZddWeb(app)
    service(health_path="/up", readiness_path="/-/ready")
    client = app.test_client()
    assert [client.get(path).text for path in ("/up", "/-/ready", "/healthz")] == ["ok\n", "ok\n", "the app's own"]


def test_paths_are_those_of_each_apps_config(app: flask.Flask) -> None:
    app.config["ZDD_WEB"] = {"HEALTH_PATH": "/up"}
    other = flask.Flask("other")
    zdd = ZddWeb()
    zdd.init_app(app)
    zdd.init_app(other)
    # Later than init_app(), and before the first request.
    other.config.update(ZDD_WEB={"HEALTH_PATH": "/down", "GRACE_PERIOD": 20})
    paths = ["/up", "/down", "/livez"]
    assert [app.test_client().get(path).status_code for path in paths] == [200, 404, 200]
    assert [other.test_client().get(path).status_code for path in paths] == [404, 200, 200]


def test_path_that_something_stronger_has_set_stays(
    app: flask.Flask, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service(health_path="/environment")
    monkeypatch.setattr(process.current(), "fixed", {"health_path"})
    app.config["ZDD_WEB"] = {"HEALTH_PATH": "/up", "READINESS_PATH": "/ready"}
    ZddWeb(app)
    paths = ["/environment", "/up", "/ready"]
    assert [app.test_client().get(path).status_code for path in paths] == [200, 404, 200]


@pytest.mark.parametrize(
    ("zdd_web", "said"),
    [
        ({"UP": "/up"}, "no such setting 'UP'; known: "),
        ({"HEALTH_PATH": "/up/"}, "HEALTH_PATH = '/up/': must be an absolute path"),
        ("/up", "'/up' is not a dictionary"),
    ],
)
def test_config_that_cannot_work_is_an_error_of_the_extension(app: flask.Flask, zdd_web: object, said: str) -> None:
    app.config["ZDD_WEB"] = zdd_web
    with pytest.raises(SettingsError) as caught:
        ZddWeb(app)
    assert str(caught.value).startswith(f"app.config['ZDD_WEB'] of Flask app {app.name!r}: {said}")


def test_apps_are_noted_with_what_they_bring(app: flask.Flask) -> None:
    ZddWeb(app)
    app.config["ZDD_WEB"] = {"HEALTH_PATH": "/noted"}
    assert [each.said for each in process.app_settings() if each.said == {"health_path": "/noted"}] != []


def test_app_made_by_a_factory_is_reached_under_its_own_wsgi_app(app: flask.Flask) -> None:
    # `app.wsgi_app` is wrapped and not the app: what a factory returns is still a Flask app.
    ZddWeb(app)
    assert isinstance(app, flask.Flask)
    with app.test_request_context("/"):
        assert flask.url_for("index") == "/"


# -- flask zdd


def made_by_a_factory(database_is_up: bool, *, own: bool) -> flask.Flask:
    app, zdd = flask.Flask("shop"), ZddWeb()
    zdd.init_app(app)

    def database() -> bool:
        return database_is_up

    (zdd.check(app, "database") if own else zdd_web.check("database"))(database)
    return app


def readiness(app: flask.Flask) -> int:
    return app.test_client().get("/readyz").status_code


def test_a_check_that_is_registered_again_is_the_new_one(no_checks: None) -> None:
    broken = made_by_a_factory(False, own=False)
    assert readiness(broken) == 503
    healthy = made_by_a_factory(True, own=False)
    assert (readiness(healthy), readiness(broken)) == (200, 200)


def test_each_app_of_a_factory_has_checks_of_its_own(no_checks: None) -> None:
    broken, healthy = made_by_a_factory(False, own=True), made_by_a_factory(True, own=True)
    without = flask.Flask("without")
    ZddWeb(without)
    assert [readiness(app) for app in (broken, healthy, without, broken)] == [503, 200, 200, 503]
    paths = [app.test_client().get("/readyz/database").status_code for app in (broken, healthy, without)]
    assert paths == [503, 200, 404]
    # What is registered for all is asked in each.
    zdd_web.check("cache")(lambda: False)
    assert [readiness(app) for app in (healthy, without)] == [503, 503]
    assert list(registry_of(broken).kinds()) == ["cache", "database"]


def test_checks_that_one_app_s_config_names_are_not_those_of_another(no_checks: None) -> None:
    one, other = flask.Flask("one"), flask.Flask("other")
    one.config["ZDD_WEB"] = {"CHECKS": [("tests.pure.test_flask.fails", {"name": "database"})]}
    for app in (one, other):
        ZddWeb(app)
    assert (readiness(one), readiness(other)) == (503, 200)


def fails() -> bool:
    return False


def test_a_check_needs_an_app_that_has_the_extension() -> None:
    with pytest.raises(SettingsError, match=r"Flask app 'bare' was not given to ZddWeb: write ZddWeb\(app\)"):
        ZddWeb().check(flask.Flask("bare"), "database")


def test_apps_that_are_gone_leave_no_checks_running(no_checks: None) -> None:
    for _ in range(20):
        readiness(made_by_a_factory(True, own=True))
    process.current().stop_checks()
    deadline = time.monotonic() + 20
    while any(thread.name == "zdd_web-checks" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
    gc.collect()
    assert "database" not in registry.kinds()


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "shared", registry.Registry())
    # The app of the test before is part of a cycle, and its checks count for as long as it is there.
    gc.collect()
    yield
    process.current().stop_checks()


def zdd(app: flask.Flask, *arguments: str) -> Result:
    return app.test_cli_runner().invoke(commands, arguments, prog_name="flask zdd")


def test_flask_finds_the_command_by_its_entry_point() -> None:
    (found,) = entry_points(group="flask.commands", name="zdd")
    assert found.load() is commands


def test_commands_for_a_service_that_runs_are_those_of_zdd_web_itself() -> None:
    """A command that `zdd-web` gets is here too, unless it is named here."""
    own = {name: each for name, each in main.commands.items() if name not in ("rehearse", "man")}
    assert {name: each for name, each in commands.commands.items() if name != "check"} == own


@pytest.mark.parametrize("name", ["status", "history", "upgrade", "rollback", "cancel", "drain"])
def test_command_is_that_of_zdd_web(app: flask.Flask, name: str) -> None:
    result = zdd(app, name, "--name", "no-such-service")
    assert result.exit_code == 2
    assert result.output.startswith("Error: no service named 'no-such-service': ")


def test_check_passes_an_app_that_works(app: flask.Flask, no_checks: None) -> None:
    app.config["ZDD_WEB"] = {"CHECKS": ["platform.node"], "READINESS_PATH": "/ready"}
    ZddWeb(app)
    result = zdd(app, "check")
    assert (result.exit_code, result.output) == (0, "ok: check 'node'\nnothing serious was found\n")


def test_check_runs_the_checks_of_the_app_once(app: flask.Flask, no_checks: None) -> None:
    ZddWeb(app)
    calls: list[int] = []

    @zdd_web.check("queue")
    def queue() -> bool:
        calls.append(1)
        return False

    result = zdd(app, "check")
    assert (result.exit_code, result.output) == (1, "error: check 'queue': it returned False\n")
    assert calls == [1]


def test_check_says_that_the_extension_is_missing(app: flask.Flask, no_checks: None) -> None:
    result = zdd(app, "check")
    assert result.exit_code == 1
    assert f"error: Flask app {app.name!r} was not given to ZddWeb: write ZddWeb(app)" in result.output


@pytest.mark.parametrize(
    ("later", "said"),
    [
        ({"GRACE_PERIOD": "soon"}, "GRACE_PERIOD = 'soon': must be a number of seconds"),
        ({"HEALTH_PATH": "/livez"}, "HEALTH_PATH = '/livez' is LIVENESS_PATH too"),
        ({"CHECKS": ["no_such.module"]}, "no_such.module: there is no module 'no_such'"),
    ],
)
def test_check_says_what_cannot_work(app: flask.Flask, no_checks: None, later: dict[str, object], said: str) -> None:
    ZddWeb(app)
    app.config["ZDD_WEB"] = later
    result = zdd(app, "check")
    assert result.exit_code == 1
    assert said in result.output
