"""What a `ZDD_WEB` dictionary may say, and what happens when it says something else than the master knows."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_settings import NAMES, ONE_OF_EACH, ONE_OF_EACH_TYPE, VALUES
from zdd_web import process
from zdd_web.errors import NeedsUpgrade, SettingsError
from zdd_web.gunicorn import read_django_settings, settings_in_force
from zdd_web.gunicorn.read_django_settings import read_django
from zdd_web.gunicorn.settings_in_force import join
from zdd_web.settings import APP_SETTINGS, FrameworkSettings, Settings, Sourced, merge, of_app, resolve

PLACE = "app.config['ZDD_WEB']"


def flask(name: str = "shop", **values: Any) -> FrameworkSettings:
    raw = {key.upper(): value for key, value in values.items()}
    return FrameworkSettings.read(f"{PLACE} of Flask app {name!r}", raw)


def django(module: str = "mysite.settings", **values: Any) -> FrameworkSettings:
    raw = {key.upper(): value for key, value in values.items()}
    return FrameworkSettings.of_django(SimpleNamespace(SETTINGS_MODULE=module, ZDD_WEB=raw))


# -- one dictionary


@pytest.mark.parametrize(("key", "value", "remedy"), ONE_OF_EACH + ONE_OF_EACH_TYPE)
def test_value_that_cannot_work_is_refused(key: str, value: Any, remedy: str) -> None:
    with pytest.raises(SettingsError) as caught:
        FrameworkSettings.read(PLACE, {key.upper(): value})
    assert str(caught.value).startswith(f"{PLACE}: {key.upper()} = {value!r}: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"GRACE_PERIODE": 5}, "no such setting 'GRACE_PERIODE'; did you mean GRACE_PERIOD?"),
        ({"grace_period": 5}, "no such setting 'grace_period'; did you mean GRACE_PERIOD?"),
        ({5: 5}, "no such setting 5; known: ABANDON_STATUS, "),
        ([("NAME", "shop")], "[('NAME', 'shop')] is not a dictionary: write ZDD_WEB = {'GRACE_PERIOD': 30}"),
        (None, "None is not a dictionary"),
    ],
)
def test_what_is_no_dictionary_of_settings_is_refused(raw: object, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        FrameworkSettings.read(PLACE, raw)
    assert str(caught.value).startswith(f"{PLACE}: {message}")


@given(raw=st.dictionaries(NAMES.map(str.upper) | st.text() | st.integers(), VALUES) | VALUES)
def test_nothing_but_settings_errors_comes_out_of_a_dictionary(raw: Any) -> None:
    try:
        found = FrameworkSettings.read(PLACE, raw)
    except SettingsError as error:
        assert str(error).startswith(PLACE)
        return
    assert {key.upper() for key in found.values} == set(raw)


def test_values_become_the_types_of_their_settings() -> None:
    assert flask(grace_period=20, warmup=["/"]).values == {"grace_period": 20.0, "warmup": ("/",)}


def test_django_without_the_dictionary_says_nothing() -> None:
    found = FrameworkSettings.of_django(SimpleNamespace(SETTINGS_MODULE="mysite.settings"))
    assert (found.values, found.module) == ({}, "mysite.settings")


def test_django_that_was_configured_by_hand_has_no_module_to_name() -> None:
    with pytest.raises(SettingsError, match=r"^ZDD_WEB in Django's settings: no such setting 'X'"):
        FrameworkSettings.of_django(SimpleNamespace(SETTINGS_MODULE=None, ZDD_WEB={"X": 1}))


def test_app_settings_are_settings() -> None:
    assert {field.name for field in dataclasses.fields(Settings)} > APP_SETTINGS


# -- the master's order


def test_django_is_weaker_than_install_and_install_than_the_environment() -> None:
    brought = django(name="django", grace_period=20, drain_delay=3)
    settings = resolve({"name": "install", "grace_period": 40}, {"ZDD_WEB_NAME": "environment"}, brought)
    assert settings == Settings(name="environment", grace_period=40, drain_delay=3)


def test_sources_that_contradict_each_other_are_all_named() -> None:
    with pytest.raises(SettingsError) as caught:
        merge({"grace_period": 30}, {}, django(drain_delay=29))
    assert str(caught.value).endswith(
        "(set by: ZDD_WEB in Django's settings module mysite.settings: DRAIN_DELAY = 29; install(grace_period=30))"
    )


def test_only_what_is_stronger_than_an_app_is_fixed() -> None:
    found = merge({"name": "shop"}, {"ZDD_WEB_GRACE_PERIOD": "20"}, django(drain_delay=1, name="other"))
    assert found.fixed == {"name", "grace_period"}
    assert found.text("grace_period") == "ZDD_WEB_GRACE_PERIOD=20"
    assert found.text("recycle_timeout") == "the default RECYCLE_TIMEOUT = 10"


# -- one app, outside gunicorn


def test_app_settings_of_an_app_are_taken_and_the_others_left() -> None:
    brought = flask(readiness_path="/up", grace_period=5, liveness_path="/alive")
    found = of_app(Settings(liveness_path="/fixed"), {"liveness_path"}, brought)
    assert found == Settings(liveness_path="/fixed", readiness_path="/up")


def test_app_without_app_settings_has_those_of_the_process() -> None:
    settings = Settings()
    assert of_app(settings, (), flask(grace_period=5)) is settings


def test_app_settings_that_cannot_work_together_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"^app.config\['ZDD_WEB'\] of Flask app 'shop': two probes share the path"):
        of_app(Settings(), (), flask(readiness_path="/livez"))


# -- a worker and its master


def test_app_settings_win_over_the_defaults() -> None:
    joined = join(merge({"grace_period": 20}, {}), [flask(readiness_path="/up"), flask("two", health_path="/health")])
    assert joined == Settings(grace_period=20, readiness_path="/up", health_path="/health")


def test_what_agrees_is_no_contradiction() -> None:
    master = merge({"grace_period": 20, "readiness_path": "/up"}, {})
    brought = [django(grace_period="20", readiness_path="/up"), flask(grace_period=20.0, recycle_timeout=10)]
    assert join(master, brought) == master.settings


@pytest.mark.parametrize(
    ("master", "app", "message"),
    [
        (
            merge({}, {}),
            django(grace_period=20),
            "contradicts the default GRACE_PERIOD = 30, which gunicorn's master runs with: write install(globals(), "
            "grace_period=20), or export DJANGO_SETTINGS_MODULE=mysite.settings for gunicorn's master",
        ),
        (
            merge({}, {}),
            flask(grace_period=20),
            "contradicts the default GRACE_PERIOD = 30, which gunicorn's master runs with: write install(globals(), "
            "grace_period=20)",
        ),
        (
            merge({"grace_period": 25}, {}),
            flask(grace_period=20),
            "contradicts install(grace_period=25), which gunicorn's master runs with: write install(globals(), "
            "grace_period=20), or take GRACE_PERIOD out of ZDD_WEB",
        ),
        (
            merge({}, {"ZDD_WEB_WARMUP": "/"}),
            flask(warmup=["/a", "/b"]),
            "contradicts ZDD_WEB_WARMUP=/, which gunicorn's master runs with: export ZDD_WEB_WARMUP=/a,/b, "
            "or take WARMUP out of ZDD_WEB",
        ),
        (
            merge({"health_path": "/up"}, {}),
            flask(health_path="/down"),
            "contradicts install(health_path='/up'), which gunicorn's master runs with: write install(globals(), "
            "health_path='/down'), or take HEALTH_PATH out of ZDD_WEB",
        ),
        (
            merge({}, {}, django(grace_period=20)),
            flask(grace_period=25),
            "contradicts ZDD_WEB in Django's settings module mysite.settings: GRACE_PERIOD = 20, which gunicorn's "
            "master runs with: take GRACE_PERIOD out of ZDD_WEB in one of the two",
        ),
        (
            merge({}, {}, django()),
            django(grace_period=25),
            "contradicts the default GRACE_PERIOD = 30, which gunicorn's master runs with: it has changed since the "
            "master read it; take GRACE_PERIOD out of ZDD_WEB, or upgrade (SIGUSR2), which reads it again",
        ),
    ],
)
def test_contradiction_names_both_values_their_places_and_the_remedy(
    master: Sourced, app: FrameworkSettings, message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        join(master, [app])
    (name,) = app.values
    assert str(caught.value) == f"{app.source}: {name.upper()} = {app.said[name]!r} {message}"


def test_value_that_the_master_has_read_and_overruled_is_no_contradiction() -> None:
    brought = django(grace_period=20, readiness_path="/django")
    master = merge({"grace_period": 25}, {"ZDD_WEB_READINESS_PATH": "/up"}, brought)
    assert join(master, [brought]) == Settings(grace_period=25, readiness_path="/up")


def test_app_setting_that_was_taken_out_of_django_is_the_default_again() -> None:
    master = merge({}, {}, django(readiness_path="/old", health_path="/old"))
    assert join(master, [django(health_path="/new")]) == Settings(health_path="/new")


def test_app_settings_that_the_master_has_read_stand_while_the_app_has_no_django() -> None:
    master = merge({}, {}, django(readiness_path="/up"))
    assert join(master, []) == Settings(readiness_path="/up")


def test_apps_that_disagree_are_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        join(merge({}, {}), [flask("a", health_path="/a"), flask("b", health_path="/b")])
    assert str(caught.value) == (
        "app.config['ZDD_WEB'] of Flask app 'b': HEALTH_PATH = '/b' contradicts "
        "app.config['ZDD_WEB'] of Flask app 'a': HEALTH_PATH = '/a': "
        "the apps of one worker share its settings; give both the same value"
    )


def test_paths_of_two_apps_that_cannot_work_together_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"two probes .*app 'a': LIVENESS_PATH.*app 'b': READINESS_PATH = '/up'\)$"):
        join(merge({}, {}), [flask("a", liveness_path="/up"), flask("b", readiness_path="/up", grace_period=30)])


def test_app_that_is_gone_brings_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class App:
        pass

    monkeypatch.setattr(process, "_apps", type(process._apps)())
    app, other = App(), App()
    process.register_app_settings(app, lambda app: flask("one"))
    process.register_app_settings(other, lambda app: flask("two"))
    del other
    gc.collect()
    assert process.app_settings() == [flask("one")]


# -- the child process that reads Django's settings


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    yield tmp_path
    assert "site_settings" not in sys.modules


def read(text: str, timeout: float = 60.0) -> FrameworkSettings | None:
    Path("lib/site_settings.py").write_text(textwrap.dedent(text))
    return read_django({**os.environ, "DJANGO_SETTINGS_MODULE": "site_settings"}, timeout)


@pytest.mark.usefixtures("project")
def test_dictionary_is_read_from_where_the_path_leads() -> None:
    found = read("import sys\nZDD_WEB = {'GRACE_PERIOD': 20, 'WARMUP': ('/',), 'NAME': str(len(sys.argv))}")
    assert found is not None
    assert found.values == {"grace_period": 20.0, "warmup": ("/",), "name": str(len(sys.argv))}
    assert found.source == "ZDD_WEB in Django's settings module site_settings"


@pytest.mark.usefixtures("project")
def test_module_without_the_dictionary_says_nothing() -> None:
    found = read("print('{}')")
    assert found is not None
    assert found.values == {}


def test_no_module_is_no_question() -> None:
    assert read_django({}, 60.0) is None
    assert read_django({"DJANGO_SETTINGS_MODULE": ""}, 60.0) is None


@pytest.mark.usefixtures("project")
def test_value_of_which_there_is_no_json_is_refused_by_name() -> None:
    with pytest.raises(SettingsError) as caught:
        read("from pathlib import Path\nZDD_WEB = {'GRACE_PERIOD': 20, 'RELEASE_DIR': Path('/srv')}")
    assert str(caught.value) == (
        "ZDD_WEB in Django's settings module site_settings: RELEASE_DIR = PosixPath('/srv'): must be text, "
        "a number, True, False, None, or a list or dictionary of these"
    )


def test_module_that_cannot_be_imported_is_named_with_its_error_and_the_remedy(project: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read("import no_such_module")
    assert str(caught.value) == (
        "DJANGO_SETTINGS_MODULE=site_settings cannot be read for ZDD_WEB: ModuleNotFoundError: No module named "
        f"'no_such_module': fix it (python -c 'import site_settings' in {project} shows where), "
        "or unset the variable for gunicorn's master"
    )


def test_module_that_is_not_imported_in_time_is_left_out_with_a_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_django_settings, "SLOW_AFTER", 0.05)
    assert read("import time\ntime.sleep(1000)", timeout=0.2) is None
    slow, unread = caplog.records
    assert slow.levelname == unread.levelname == "WARNING"
    assert slow.getMessage().startswith("event=settings.slow module=site_settings seconds=0.")
    assert unread.getMessage() == (
        'event=settings.unread module=site_settings seconds=0.2 remedy="the start goes on without its ZDD_WEB, if it '
        "has one: pass those settings to install(), unset DJANGO_SETTINGS_MODULE for gunicorn's master, or find out "
        f"what is slow (python -X importtime -c 'import site_settings' in {project})\""
    )


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("environ", "installed", "seconds"),
    [
        ({}, {}, 60.0),
        ({}, {"upgrade_timeout": 90}, 90.0),
        ({"ZDD_WEB_UPGRADE_TIMEOUT": "120"}, {"upgrade_timeout": 90}, 120.0),
    ],
)
def test_a_start_waits_for_the_module_as_long_as_an_upgrade_may_take(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], installed: dict[str, float], seconds: float
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(settings_in_force, "_installed", installed)
    monkeypatch.setattr(settings_in_force, "_settled", False)
    monkeypatch.setattr(settings_in_force, "_in_force", None)
    monkeypatch.setattr(settings_in_force, "read_django", lambda environ, timeout: waited.append(timeout))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings_in_force.settle(SimpleNamespace(env={}))
    assert waited == [seconds]


@pytest.mark.usefixtures("project")
def test_reload_that_cannot_read_the_module_in_time_keeps_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = merge({}, {}, FrameworkSettings.read("Django", {"GRACE_PERIOD": 20}, "site_settings"))
    monkeypatch.setattr(settings_in_force, "_installed", {})
    monkeypatch.setattr(settings_in_force, "_settled", True)
    monkeypatch.setattr(settings_in_force, "_in_force", before)
    monkeypatch.setattr(settings_in_force, "read_django", lambda environ, timeout: None)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "site_settings")
    settings_in_force.refuse_changes(SimpleNamespace(env={}))
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    with pytest.raises(NeedsUpgrade, match="GRACE_PERIOD changed from 20"):
        settings_in_force.refuse_changes(SimpleNamespace(env={}))


@pytest.mark.usefixtures("project")
def test_interrupted_master_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not started:
            started.append(child)
            raise KeyboardInterrupt
        return wait(child, timeout)

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read("import time\ntime.sleep(1000)")
    assert started[0].returncode == -9
