"""Every setting that cannot work is refused in words that name its source, its value and the remedy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zdd_web.errors import SettingsError
from zdd_web.settings import ENV_PREFIX, Settings, StopBudget, merge, resolve

SECONDS = "must be a number of seconds"
PATH = "must be an absolute path without query and without a slash at its end"

# Values that are as wrong in a configuration file as in an environment variable.
IMPOSSIBLE: list[Any] = [
    ("listener", "tcp", "must be one of 'fd', 'reuseport', 'systemd'"),
    ("listener", "", "must be one of 'fd', 'reuseport', 'systemd'"),
    ("systemd_names", "web", "must be NAME=app or NAME=probe, each name once, separated by commas"),
    ("systemd_names", "web=app,web=probe", "must be NAME=app or NAME=probe, each name once"),
    ("systemd_names", "web=both", "'web' is for 'both': must be one of 'app', 'probe'"),
    ("systemd_names", "=app", "'' is not a FileDescriptorName"),
    ("systemd_names", "a:b=app", "'a:b' is not a FileDescriptorName"),
    ("systemd_names", "health=probe", "no socket is the app's: add NAME=app"),
    ("systemd_names", "web=app,a=probe,b=probe", "more than one socket is the probe port's"),
    ("upgrade_timeout", "soon", SECONDS),
    ("upgrade_timeout", "", SECONDS),
    ("upgrade_timeout", "60s", SECONDS),
    ("upgrade_timeout", "0", "must be between 1 and 86400 seconds"),
    ("grace_period", "0.5", "must be between 1 and 86400 seconds"),
    ("grace_period", "86401", "must be between 1 and 86400 seconds"),
    ("grace_period", "nan", "must be between 1 and 86400 seconds"),
    ("grace_period", "inf", "must be between 1 and 86400 seconds"),
    ("drain_delay", "-1", "must be between 0 and 86400 seconds"),
    ("recycle_timeout", "-0.1", "must be between 0 and 86400 seconds"),
    ("max_generations", "1", "must be a whole number between 2 (the old and the new) and 100"),
    ("max_generations", "101", "must be a whole number between 2"),
    ("max_generations", "-2", "must be a whole number between 2"),
    ("max_generations", "2.5", "must be a whole number between 2"),
    ("max_generations", "\N{SUPERSCRIPT TWO}", "must be a whole number between 2"),
    ("max_generations", "", "must be a whole number between 2"),
    ("keep_pid", "maybe", "must be True or False"),
    ("keep_pid", "", "must be True or False"),
    ("takeover", "please", "must be True or False"),
    ("takeover_socket", "takeover.sock", "must be an absolute path, or empty for none"),
    ("takeover_socket", "/run/" + "x" * 103, "must be at most 107 bytes long"),
    ("release_dir", "current", "must be an absolute path, or empty for none"),
    ("env_file", "./env", "must be an absolute path, or empty for none"),
    ("liveness_path", "livez", PATH),
    ("liveness_path", "", PATH),
    ("liveness_path", "/", PATH),
    ("readiness_path", "/readyz/", PATH),
    ("readiness_path", "/ready z", PATH),
    ("readiness_path", "/readyz\n", PATH),
    ("health_path", "/healthz?full=1", PATH),
    ("health_path", "/healthz#top", PATH),
    ("warmup", "index", "'index' is not a path: each must begin with '/'"),
    ("warmup", "/,search", "'search' is not a path: each must begin with '/'"),
    ("warmup", "/a b", "'/a b' is not a path: each must begin with '/' or http(s)://HOST/ and hold no space"),
    ("generation_header", "X Generation", "must be a header name of letters, digits and '-'"),
    ("generation_header", "X-Generation:", "must be a header name of letters, digits and '-'"),
    ("name", "my shop", "must be at most 100 letters, digits or any of"),
    ("name", "x" * 101, "must be at most 100 letters, digits or any of"),
]

# Values that only Python code can give.
WRONG_TYPE: list[Any] = [
    ("listener", 5, "must be one of"),
    ("listener", None, "must be one of"),
    ("systemd_names", None, "must map names of sockets to 'app' or 'probe'"),
    ("systemd_names", ["web"], "must map names of sockets"),
    ("systemd_names", {"web": ["app"]}, "'web' is for ['app']: must be one of"),
    ("systemd_names", {5: "app"}, "5 is not a FileDescriptorName"),
    ("grace_period", None, SECONDS),
    ("grace_period", True, SECONDS),
    ("grace_period", [30], SECONDS),
    pytest.param("grace_period", 10**400, SECONDS, id="grace_period-huge"),
    ("drain_delay", False, SECONDS),
    ("max_generations", True, "must be a whole number between 2"),
    ("max_generations", None, "must be a whole number between 2"),
    ("max_generations", 3.0, "must be a whole number between 2"),
    ("keep_pid", None, "must be True or False"),
    ("keep_pid", 2, "must be True or False"),
    ("release_dir", None, "must be an absolute path"),
    ("env_file", b"/etc/shop.env", "must be an absolute path"),
    ("liveness_path", None, PATH),
    ("readiness_path", 5, PATH),
    ("health_path", b"/healthz", PATH),
    ("warmup", 5, "must be a list of paths, such as ['/', '/search?q=warm']"),
    ("warmup", {"/": 1}, "must be a list of paths"),
    ("warmup", None, "must be a list of paths"),
    ("warmup", ["/", 5], "5 is not a path"),
    ("generation_header", None, "must be a header name"),
    ("name", 5, "must be at most 100 letters"),
]


def one_of_each(rows: list[Any]) -> list[Any]:
    """Return one row for each setting. All sources share one normaliser for a setting: which value it is fed is tested
    once, by `install()`, and that a source feeds it and is named in the error once for each setting.
    """
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row.values[0] if hasattr(row, "values") else row[0], row)
    return list(found.values())


ONE_OF_EACH, ONE_OF_EACH_TYPE = one_of_each(IMPOSSIBLE), one_of_each(WRONG_TYPE)


@pytest.mark.parametrize(("key", "value", "remedy"), IMPOSSIBLE + WRONG_TYPE)
def test_argument_of_install_that_cannot_work_is_refused(key: str, value: Any, remedy: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({key: value}, {})
    assert str(caught.value).startswith(f"install({key}={value!r}): ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("installed", "environ", "place"),
    [
        ({"takeover_socket": "/run/t"}, {}, "install(takeover_socket='/run/t')"),
        (
            {"takeover": False},
            {"ZDD_WEB_TAKEOVER_SOCKET": "/run/t"},
            "install(takeover=False); ZDD_WEB_TAKEOVER_SOCKET=/run/t",
        ),
    ],
)
def test_place_of_a_takeover_that_is_off_is_refused(
    installed: dict[str, Any], environ: dict[str, str], place: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(installed, environ)
    assert str(caught.value) == (
        f"TAKEOVER_SOCKET = '/run/t', and TAKEOVER = False: no process would connect to it; set "
        f"TAKEOVER = True, or remove TAKEOVER_SOCKET (set by: {place})"
    )
    assert resolve({**installed, "takeover": True}, environ).takeover_socket == "/run/t"


def test_handover_of_a_predecessor_is_no_setting() -> None:
    assert resolve({}, {"ZDD_WEB_HANDOVER": "{}"}) == Settings()


@pytest.mark.parametrize(("key", "value", "remedy"), ONE_OF_EACH)
def test_environment_variable_that_cannot_work_is_refused(key: str, value: str, remedy: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({}, {f"ZDD_WEB_{key.upper()}": value})
    assert str(caught.value).startswith(f"ZDD_WEB_{key.upper()}={value}: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("key", "value", "remedy"), ONE_OF_EACH + ONE_OF_EACH_TYPE)
def test_settings_made_directly_are_as_strict(key: str, value: Any, remedy: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**{key: value})
    assert str(caught.value).startswith(f"{key.upper()} = {value!r}: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("installed", "environ", "message"),
    [
        ({"LISTENER": "fd"}, {}, "install(LISTENER=...): no such setting 'LISTENER'; did you mean listener?"),
        (
            {"Grace_Perod": 30},
            {},
            "install(Grace_Perod=...): no such setting 'Grace_Perod'; did you mean grace_period?",
        ),
        (
            {"grace_perod": 30},
            {},
            "install(grace_perod=...): no such setting 'grace_perod'; did you mean grace_period?",
        ),
        (
            {},
            {"ZDD_WEB_HEALTHPATH": "/up"},
            "environment variable ZDD_WEB_HEALTHPATH: no such setting 'healthpath'; did you mean ZDD_WEB_HEALTH_PATH?",
        ),
    ],
)
def test_misspelt_name_is_refused_with_the_right_one(
    installed: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(installed, environ)
    assert str(caught.value) == message


def test_name_like_no_other_is_refused_with_all_there_are() -> None:
    with pytest.raises(SettingsError, match="no such setting 'zzz'; known: ") as caught:
        resolve({"zzz": 1}, {})
    for field in dataclasses.fields(Settings):
        assert field.name in str(caught.value)


@pytest.mark.parametrize(
    ("installed", "environ", "sources"),
    [
        ({"drain_delay": 28, "grace_period": 30}, {}, "install(drain_delay=28); install(grace_period=30)"),
        ({"drain_delay": 28}, {"ZDD_WEB_GRACE_PERIOD": "30"}, "install(drain_delay=28); ZDD_WEB_GRACE_PERIOD=30"),
        ({"drain_delay": 28}, {}, "install(drain_delay=28)"),
    ],
)
def test_drain_delay_that_eats_the_grace_period_is_refused_with_the_sum(
    installed: dict[str, Any], environ: dict[str, str], sources: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(installed, environ)
    assert str(caught.value) == (
        "DRAIN_DELAY = 28 and 2 to exit leave no time for requests in GRACE_PERIOD = 30 (28 + 2 >= 30): "
        f"raise GRACE_PERIOD (and Kubernetes' terminationGracePeriodSeconds) or lower DRAIN_DELAY (set by: {sources})"
    )


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ({"liveness_path": "/up", "readiness_path": "/up"}, "two probes share the path '/up'"),
        ({"liveness_path": "/readyz"}, "two probes share the path '/readyz'"),
        ({"liveness_path": "/healthz"}, "HEALTH_PATH = '/healthz' is LIVENESS_PATH too"),
        ({"liveness_path": "/up", "readiness_path": "/up", "health_path": "/up"}, "is LIVENESS_PATH too"),
    ],
)
def test_probes_that_cannot_be_told_apart_are_refused(paths: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(paths, {})
    assert said in str(caught.value)
    for key, value in paths.items():
        assert f"install({key}={value!r})" in str(caught.value)


def test_health_and_readiness_may_share_a_path() -> None:
    assert resolve({"readiness_path": "/up", "health_path": "/up"}, {}).readiness_path == "/up"


def test_environment_wins_over_install() -> None:
    settings = resolve({"grace_period": 20, "name": "shop"}, {"ZDD_WEB_GRACE_PERIOD": "25", "GRACE_PERIOD": "99"})
    assert settings == Settings(grace_period=25, name="shop")


def test_environment_mends_what_install_got_wrong() -> None:
    assert resolve({"grace_period": "soon"}, {"ZDD_WEB_GRACE_PERIOD": "25"}).grace_period == 25


def test_nothing_said_means_the_defaults() -> None:
    assert resolve({}, {"PATH": "/bin", "XZDD_WEB_NAME": "not ours"}) == Settings()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("upgrade_timeout", "90.5", 90.5),
        ("grace_period", " 20 ", 20.0),
        ("drain_delay", "0", 0.0),
        ("warmup", "/, /search?q=warm,", ("/", "/search?q=warm")),
        ("warmup", "", ()),
        ("generation_header", "X-Generation", "X-Generation"),
        ("name", "[::1]:8000", "[::1]:8000"),
        ("listener", "fd", "fd"),
        ("max_generations", "2", 2),
        ("keep_pid", "Yes", True),
        ("keep_pid", "0", False),
        ("release_dir", "/srv/shop/current", "/srv/shop/current"),
        ("env_file", "", ""),
        ("health_path", "/-/health.json", "/-/health.json"),
    ],
)
def test_text_of_a_variable_becomes_the_type_of_its_setting(key: str, text: str, value: object) -> None:
    found = getattr(resolve({}, {f"ZDD_WEB_{key.upper()}": text}), key)
    assert (found, type(found)) == (value, type(value))


def test_settings_are_frozen() -> None:
    settings = Settings(warmup=["/"])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.grace_period = 5  # type: ignore[misc]
    assert settings.warmup == ("/",)
    assert hash(settings) == hash(Settings(warmup=("/",)))


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        (Settings(), StopBudget(lame_duck=0, work=28, margin=2)),
        (Settings(drain_delay=10), StopBudget(lame_duck=10, work=18, margin=2)),
        (Settings(grace_period=1), StopBudget(lame_duck=0, work=0.5, margin=0.5)),
        (Settings(grace_period=10, drain_delay=4), StopBudget(lame_duck=4, work=5, margin=1)),
        (Settings(grace_period=600), StopBudget(lame_duck=0, work=598, margin=2)),
    ],
)
def test_stop_budget_is_split_as_documented(settings: Settings, budget: StopBudget) -> None:
    assert settings.stop_budget() == budget


@given(grace_period=st.floats(1, 86_400), drain_delay=st.floats(0, 86_400))
@example(grace_period=30, drain_delay=28)
@example(grace_period=30, drain_delay=27.999)
def test_stop_budget_sums_to_the_grace_period_or_is_refused(grace_period: float, drain_delay: float) -> None:
    margin = min(2.0, max(0.5, grace_period / 10))
    try:
        budget = Settings(grace_period=grace_period, drain_delay=drain_delay).stop_budget()
    except SettingsError:
        assert drain_delay + margin >= grace_period or math.isclose(drain_delay + margin, grace_period)
        return
    assert math.isclose(budget.lame_duck + budget.work + budget.margin, grace_period)
    assert min(budget.lame_duck, budget.work, budget.margin) >= 0
    assert budget.work > 0


NAMES = st.sampled_from([field.name for field in dataclasses.fields(Settings)])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner) | st.sets(st.text()),
    max_leaves=5,
)


@given(
    installed=st.dictionaries(NAMES | st.text(), VALUES),
    environ=st.dictionaries((NAMES | st.text()).map(lambda name: ENV_PREFIX + name.upper()) | st.text(), st.text()),
)
@example(installed={"grace_period": 10**400}, environ={})
@example(installed={}, environ={"ZDD_WEB_": ""})
def test_nothing_but_settings_errors_comes_out_of_resolve(installed: dict[str, Any], environ: dict[str, str]) -> None:
    try:
        settings = resolve(installed, environ)
    except SettingsError as error:
        assert str(error)
        return
    assert resolve(dataclasses.asdict(settings), {}) == settings


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}


@pytest.mark.parametrize(
    ("installed", "environ", "expected"),
    [
        ({}, {}, 0.0),
        ({}, POD, 10.0),
        ({"grace_period": 60}, POD, 10.0),
        ({"grace_period": 12}, POD, 4.0),
        ({}, {**POD, "ZDD_WEB_GRACE_PERIOD": "6"}, 2.0),
        ({"drain_delay": 0}, POD, 0.0),
        ({}, {**POD, "ZDD_WEB_DRAIN_DELAY": "3"}, 3.0),
    ],
)
def test_lame_duck_inside_kubernetes_is_ten_seconds_unless_somebody_says_otherwise(
    installed: dict[str, Any], environ: dict[str, str], expected: float
) -> None:
    assert merge(installed, environ).settings.drain_delay == expected


def test_default_inside_kubernetes_is_named_as_what_it_is() -> None:
    origin = merge({}, POD).origin["drain_delay"]
    assert origin.text == "the default DRAIN_DELAY inside Kubernetes (KUBERNETES_SERVICE_HOST is set)"


@pytest.mark.parametrize("value", [-1, 256, True, "one", 1.5])
def test_exit_status_is_one_that_a_process_can_have(value: object) -> None:
    with pytest.raises(SettingsError, match="a whole number from 0 to 255"):
        Settings(abandon_status=value)  # type: ignore[arg-type]
    assert Settings(abandon_status="75").abandon_status == 75  # type: ignore[arg-type]


LINKS = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR")


@pytest.mark.parametrize("link", LINKS)
def test_what_kubernetes_says_of_a_service_of_this_name_is_no_setting(link: str) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", f"ZDD_WEB_{link}": "tcp://10.96.7.7:80"}
    assert resolve({}, pod).drain_delay == 10
    del pod["KUBERNETES_SERVICE_HOST"]
    with pytest.raises(SettingsError, match="no such setting"):
        resolve({}, pod)
