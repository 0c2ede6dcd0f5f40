"""The manifests that users copy are valid, and their figures go together with the settings that they make."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zdd_web.errors import SettingsError
from zdd_web.settings import ENV_PREFIX, IN_KUBERNETES, Settings, resolve

# tox's matrix does without: what the validator needs is not there for each Python.
kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("example_*/deploy/k8s.yaml"))
#: The first that knows `unhealthyPodEvictionPolicy` without a feature gate, and the newest that the validator brings.
VERSIONS = ["1.27", kubernetes_validate.latest_version().rpartition(".")[0]]
PROBES = {"startupProbe": "startup_path", "readinessProbe": "readiness_path", "livenessProbe": "liveness_path"}


class Manifest:
    """One file: its objects by kind, and what of them the tests ask for."""

    def __init__(self, text: str) -> None:
        self.text = text
        documents = list(yaml.safe_load_all(text))
        self.objects: dict[str, Any] = {each["kind"]: each for each in documents}
        assert len(self.objects) == len(documents)

    @property
    def template(self) -> Any:
        return self.objects["Deployment"]["spec"]["template"]

    @property
    def pod(self) -> Any:
        return self.template["spec"]

    @property
    def container(self) -> Any:
        (container,) = self.pod["containers"]
        return container

    @property
    def settings(self) -> Settings:
        """The settings of a master in this pod."""
        environ = {each["name"]: each["value"] for each in self.container["env"] if "value" in each}
        return resolve({}, {**environ, IN_KUBERNETES: "10.96.0.1"})

    def port(self, name: str) -> int:
        (port,) = [each["containerPort"] for each in self.container["ports"] if each["name"] == name]
        return int(port)

    def changed(self, path: str, value: Any) -> Manifest:
        """Return a copy with another value, or without one if it is None, at a path such as `Service.spec.ports.0`."""
        other = copy.deepcopy(self)
        *way, last = (int(step) if step.isdecimal() else step for step in path.split("."))
        place: Any = other.objects
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
        return other


def seconds_until_failed(probe: Any) -> int:
    return int(probe["periodSeconds"] * probe["failureThreshold"])


@pytest.fixture(params=FILES, ids=lambda path: path.parts[-3])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return Manifest(request.param.read_text())


def test_both_examples_have_one() -> None:
    assert [path.parts[-3] for path in FILES] == ["example_django", "example_flask"]


# --- what each manifest must be; called by SPOILT, too --------------------------------------------------------


def test_kubernetes_takes_it(manifest: Manifest) -> None:
    assert set(manifest.objects) == {"Deployment", "Service", "PodDisruptionBudget"}
    for each in manifest.objects.values():
        for version in VERSIONS:
            # The validator takes an older schema where it has none for a version.
            assert kubernetes_validate.validate(each, version, strict=True) == version


def test_probes_ask_the_paths_of_the_settings_on_the_probe_port(manifest: Manifest) -> None:
    for probe, path in PROBES.items():
        asked = manifest.container[probe]["httpGet"]
        assert asked == {"path": getattr(manifest.settings, path), "port": "probes"}


def test_probe_port_is_that_of_probe_bind_and_open_to_the_kubelet(manifest: Manifest) -> None:
    host, _, port = manifest.settings.probe_bind.rpartition(":")
    assert host in ("0.0.0.0", "[::]")
    assert manifest.port("probes") == int(port)
    assert f'prometheus.io/port: "{port}"' in manifest.text


def test_gunicorn_listens_where_the_service_sends(manifest: Manifest) -> None:
    command = manifest.container["command"]
    assert command[command.index("--bind") + 1] == f"0.0.0.0:{manifest.port('http')}"
    assert [port["targetPort"] for port in manifest.objects["Service"]["spec"]["ports"]] == ["http"]


def test_command_has_no_shell_that_would_keep_sigterm(manifest: Manifest) -> None:
    assert manifest.container["command"][0] == "gunicorn"


def test_stop_ends_before_kubernetes_kills(manifest: Manifest) -> None:
    assert manifest.pod["terminationGracePeriodSeconds"] >= manifest.settings.grace_period


def test_stop_has_its_lame_duck_and_time_for_work_as_the_comment_says(manifest: Manifest) -> None:
    budget = manifest.settings.stop_budget()
    assert budget.lame_duck == 10
    assert budget.lame_duck + budget.work + budget.margin <= manifest.pod["terminationGracePeriodSeconds"]
    said = f"{budget.lame_duck:g} s lame duck, {budget.work:g} s for requests and background work, {budget.margin:g} s"
    assert said in manifest.text


def test_nothing_runs_before_sigterm(manifest: Manifest) -> None:
    assert "preStop" not in manifest.container.get("lifecycle", {})


def test_startup_has_as_long_as_an_upgrade(manifest: Manifest) -> None:
    seconds = seconds_until_failed(manifest.container["startupProbe"])
    assert seconds >= manifest.settings.upgrade_timeout
    assert f"may take {seconds} s" in manifest.text


def test_readiness_falls_within_the_lame_duck(manifest: Manifest) -> None:
    probe = manifest.container["readinessProbe"]
    seconds = seconds_until_failed(probe)
    # The last probe may take its whole timeout to fail.
    assert seconds + probe["timeoutSeconds"] <= manifest.settings.drain_delay
    assert f"within {seconds} s of the lame duck" in manifest.text


def test_rollout_takes_no_pod_away_before_there_is_another(manifest: Manifest) -> None:
    strategy = manifest.objects["Deployment"]["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_a_rollout_fails_some_time_after_a_pod_has_had_its_time_to_start(manifest: Manifest) -> None:
    seconds = manifest.objects["Deployment"]["spec"]["progressDeadlineSeconds"]
    # As much again and more: a node may have to pull the image first.
    assert seconds >= 3 * seconds_until_failed(manifest.container["startupProbe"])


def test_pods_are_spread_over_nodes_and_zones(manifest: Manifest) -> None:
    constraints = manifest.pod["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in constraints] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    for each in constraints:
        assert each["labelSelector"]["matchLabels"].items() <= manifest.template["metadata"]["labels"].items()
        # One node shall still do, on a developer's machine too.
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"


def test_disruption_budget_leaves_a_pod_and_lets_one_go(manifest: Manifest) -> None:
    allowed = manifest.objects["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert 1 <= allowed < manifest.objects["Deployment"]["spec"]["replicas"]


def test_selectors_find_the_pods(manifest: Manifest) -> None:
    labels = manifest.template["metadata"]["labels"].items()
    specs = {kind: each["spec"] for kind, each in manifest.objects.items()}
    for selector in (
        specs["Deployment"]["selector"]["matchLabels"],
        specs["Service"]["selector"],
        specs["PodDisruptionBudget"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels


def test_container_has_no_more_rights_than_it_needs(manifest: Manifest) -> None:
    assert manifest.pod["securityContext"]["runAsNonRoot"] is True
    assert manifest.pod["securityContext"]["runAsUser"] > 0
    assert manifest.pod["securityContext"]["runAsGroup"] > 0
    assert manifest.pod["automountServiceAccountToken"] is False
    assert manifest.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_what_is_written_is_written_to_a_volume(manifest: Manifest) -> None:
    # gunicorn's control socket and temporary files, and SQLite's files beside the database.
    environ = {each["name"]: each.get("value", "") for each in manifest.container["env"]}
    assert environ["HOME"] == "/tmp"
    assert environ["DATABASE_PATH"].startswith("/tmp/")
    (mount,) = manifest.container["volumeMounts"]
    assert mount["mountPath"] == "/tmp"
    assert [volume["name"] for volume in manifest.pod["volumes"]] == [mount["name"]]


# --- each of these can fail ------------------------------------------------------------------------------------

POD = "Deployment.spec.template.spec"
WEB = f"{POD}.containers.0"

SPOILT: list[tuple[Callable[[Manifest], None], str, Any]] = [
    (test_probes_ask_the_paths_of_the_settings_on_the_probe_port, f"{WEB}.livenessProbe.httpGet.path", "/healthz"),
    (test_probes_ask_the_paths_of_the_settings_on_the_probe_port, f"{WEB}.startupProbe.httpGet.path", "/readyz"),
    (test_probes_ask_the_paths_of_the_settings_on_the_probe_port, f"{WEB}.readinessProbe.httpGet.port", "http"),
    (test_probe_port_is_that_of_probe_bind_and_open_to_the_kubelet, f"{WEB}.ports.1.containerPort", 8082),
    (test_probe_port_is_that_of_probe_bind_and_open_to_the_kubelet, f"{WEB}.env.1.value", "127.0.0.1:8081"),
    (test_gunicorn_listens_where_the_service_sends, f"{WEB}.ports.0.containerPort", 8080),
    (test_gunicorn_listens_where_the_service_sends, "Service.spec.ports.0.targetPort", "probes"),
    (test_command_has_no_shell_that_would_keep_sigterm, f"{WEB}.command", ["sh", "-c", "gunicorn"]),
    (test_stop_ends_before_kubernetes_kills, f"{POD}.terminationGracePeriodSeconds", 39),
    (test_stop_ends_before_kubernetes_kills, f"{WEB}.env.0.value", "41"),
    (test_stop_has_its_lame_duck_and_time_for_work_as_the_comment_says, f"{WEB}.env.0.value", "27"),
    (test_stop_has_its_lame_duck_and_time_for_work_as_the_comment_says, f"{WEB}.env.0.value", "39"),
    (test_nothing_runs_before_sigterm, f"{WEB}.lifecycle", {"preStop": {"sleep": {"seconds": 10}}}),
    (test_startup_has_as_long_as_an_upgrade, f"{WEB}.startupProbe.failureThreshold", 59),
    (test_readiness_falls_within_the_lame_duck, f"{WEB}.readinessProbe.failureThreshold", 5),
    (test_rollout_takes_no_pod_away_before_there_is_another,
     "Deployment.spec.strategy.rollingUpdate.maxUnavailable", 1),
    (test_a_rollout_fails_some_time_after_a_pod_has_had_its_time_to_start, "Deployment.spec.progressDeadlineSeconds",
     120),
    (test_pods_are_spread_over_nodes_and_zones, f"{POD}.topologySpreadConstraints.0.topologyKey", "zone"),
    (test_pods_are_spread_over_nodes_and_zones, f"{POD}.topologySpreadConstraints.1.labelSelector.matchLabels",
     {"app": "shop"}),
    (test_disruption_budget_leaves_a_pod_and_lets_one_go, "PodDisruptionBudget.spec.maxUnavailable", 0),
    (test_disruption_budget_leaves_a_pod_and_lets_one_go, "Deployment.spec.replicas", 1),
    (test_selectors_find_the_pods, "Service.spec.selector", {"app": "shop"}),
    (test_selectors_find_the_pods, "PodDisruptionBudget.spec.selector.matchLabels", {"app": "shop"}),
    (test_selectors_find_the_pods, "Deployment.spec.template.metadata.labels", {"app": "shop"}),
    (test_container_has_no_more_rights_than_it_needs, f"{WEB}.securityContext.allowPrivilegeEscalation", True),
    (test_container_has_no_more_rights_than_it_needs, f"{POD}.securityContext.runAsUser", 0),
    (test_container_has_no_more_rights_than_it_needs, f"{POD}.securityContext.runAsGroup", 0),
    (test_container_has_no_more_rights_than_it_needs, f"{POD}.automountServiceAccountToken", True),
    (test_what_is_written_is_written_to_a_volume, f"{WEB}.volumeMounts.0.mountPath", "/data"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "path", "value"), SPOILT)
def test_spoilt_manifest_is_noticed(
    manifest: Manifest, check: Callable[[Manifest], None], path: str, value: Any
) -> None:
    with pytest.raises(AssertionError):
        check(manifest.changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("Deployment.spec.replica", 2, "'replica' was unexpected"),
        ("Deployment.spec.strategy.rollingUpdate.maxUnavailible", 0, "'maxUnavailible' was unexpected"),
        (f"{POD}.terminationGracePeriod", 40, "'terminationGracePeriod' was unexpected"),
        (f"{WEB}.livenessprobe", {}, "'livenessprobe' was unexpected"),
        (f"{WEB}.readinessProbe.httpGet.prot", "probes", "'prot' was unexpected"),
        (f"{WEB}.securityContext.readOnlyRootFileSystem", True, "'readOnlyRootFileSystem' was unexpected"),
        ("Service.spec.ports.0.targetport", "http", "'targetport' was unexpected"),
        ("PodDisruptionBudget.spec.minAvailible", 1, "'minAvailible' was unexpected"),
        (f"{POD}.terminationGracePeriodSeconds", "40", "'40' is not of type 'integer'"),
        (f"{WEB}.env.0.value", 40, "40 is not of type 'string'"),
        (f"{WEB}.name", None, "'name' is a required property"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_misspelt_key_or_wrong_type_is_refused_by_the_schemas(
    manifest: Manifest, version: str, path: str, value: Any, said: str
) -> None:
    spoilt = manifest.changed(path, value).objects[path.partition(".")[0]]
    with pytest.raises(kubernetes_validate.ValidationError) as caught:
        kubernetes_validate.validate(spoilt, version, strict=True)
    assert said in caught.value.message


def test_misspelt_setting_is_refused(manifest: Manifest) -> None:
    with pytest.raises(SettingsError, match="did you mean ZDD_WEB_GRACE_PERIOD"):
        _ = manifest.changed(f"{WEB}.env.0.name", f"{ENV_PREFIX}GRACE_PERIODE").settings


# --- the page about them -----------------------------------------------------------------------------------


def yaml_blocks(page: Path) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))


def test_page_shows_what_stands_in_the_files(manifest: Manifest) -> None:
    blocks = list(yaml_blocks(ROOT / "docs" / "how-to" / "kubernetes.md"))
    assert blocks
    for block in blocks:
        first = re.escape(block.partition("\n")[0])
        indents = {match[1] for match in re.finditer(rf"^( *){first}$", manifest.text, re.MULTILINE)}
        assert any(textwrap.indent(block, indent) in manifest.text for indent in indents)
