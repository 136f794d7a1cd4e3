"""The manifests are Kubernetes', and what they name is there: in the images, in the settings, in the server."""

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from server.access import Doorkeeper, refuse_strangers
from server.health import LIVENESS
from tests.dockerfile import DOCKERFILE, chain, parse
from tests.kubernetes import (
    FOLDER,
    SHELL,
    Manifest,
    mounted_at,
    of_kind,
    pods,
    ports_of,
    render,
)
from tests.prometheus import DASHBOARD, ROOT
from thumbloop.config import ServerConfig, TrainerConfig, load
from thumbloop.errors import SettingsError

GUIDE = (ROOT / "docs/deploy.md").read_text()
OVERLAYS = ("cpu", "one-gpu", "two-gpus")
FOLDERS = (*OVERLAYS, "storage", "monitoring")
KUBERNETES = ("1.27", "1.37")  # gRPC probes came to stay; the newest whose schemas we have
CONFIGS = {"server": ServerConfig, "trainer": TrainerConfig}
OF_THE_OPERATOR = "monitoring.coreos.com/v1"
SECRETS = {"thumbloop-access", "thumbloop-tls"}
TOKENS = {"backend": {"sha256": "0" * 64, "scopes": ["generate", "on_behalf"]}}
_SERVICE_LINKS = ("SERVICE_HOST", "PORT", "PORT_50051_TCP")


def deployed(overlay: str) -> tuple[Manifest, ...]:
    """Return everything that runs or lies beside an overlay's own objects, too."""
    shell = yaml.safe_load(SHELL.read_text())
    return (*render(FOLDER / overlay), *render(FOLDER / "storage"), shell)


def pod_of(overlay: str, target: str) -> Manifest:
    deployment = of_kind(render(FOLDER / overlay), "Deployment")[f"thumbloop-{target}"]
    return deployment["spec"]["template"]


def environment_of(pod: Manifest, target: str) -> dict[str, str]:
    """Return the settings in a container's environment: the image's, then the pod's, secrets filled in."""
    (container,) = pod["spec"]["containers"]
    secrets = {("thumbloop-access", "tokens"): json.dumps(TOKENS)}
    environment = chain(parse(DOCKERFILE), target, "cpu")[0].environment()
    for variable in container.get("env", ()):
        if (value := variable.get("value")) is None:
            key = variable["valueFrom"]["secretKeyRef"]
            value = secrets[key["name"], key["key"]]
        environment[variable["name"]] = value
    return environment


def settings_of(
    overlay: str, target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ServerConfig | TrainerConfig:
    """Return the settings that an application would have in its pod."""
    pod = pod_of(overlay, target)
    (container,) = pod["spec"]["containers"]
    option, file = container["args"][-2:]
    assert option == "--config"
    name = mounted_at(pod)[str(Path(file).parent)]["configMap"]["name"]
    data = of_kind(render(FOLDER / overlay), "ConfigMap")[name]["data"]
    (folder / "settings.yaml").write_text(data[Path(file).name])
    for variable, value in environment_of(pod, target).items():
        monkeypatch.setenv(variable, value)
    return load(CONFIGS[target], folder / "settings.yaml")


def probes_of(pod: Manifest) -> dict[str, Manifest]:
    (container,) = pod["spec"]["containers"]
    return {name: container[name] for name in container if name.endswith("Probe")}


@pytest.fixture(params=product(OVERLAYS, CONFIGS), ids="-".join)
def application(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Manifest, ServerConfig | TrainerConfig]:
    """A pod of an overlay, and its settings."""
    overlay, target = request.param
    return pod_of(overlay, target), settings_of(overlay, target, tmp_path, monkeypatch)


@pytest.fixture(params=OVERLAYS)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Manifest, ServerConfig]:
    """The server's pod of an overlay, and its settings."""
    config = settings_of(request.param, "server", tmp_path, monkeypatch)
    assert isinstance(config, ServerConfig)
    return pod_of(request.param, "server"), config


# What Kubernetes says


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_are_as_the_schemas_of_kubernetes_want_them(folder: str, version: str):
    manifests = [m for m in render(FOLDER / folder) if m["apiVersion"] != OF_THE_OPERATOR]
    assert manifests
    for manifest in (*manifests, yaml.safe_load(SHELL.read_text())):
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("readinessProbe", "readyProbe"), ("port: 50052", "port: health"), ("ReadOnly", "ReadMostly")],
)
def test_a_word_that_kubernetes_does_not_know_is_found(right: str, wrong: str):
    text = yaml.safe_dump(of_kind(render(FOLDER / "cpu"), "Deployment")["thumbloop-server"])
    broken = re.sub(right, wrong, text, flags=re.IGNORECASE)
    assert broken != text
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(yaml.safe_load(broken), KUBERNETES[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_is_in_one_namespace_that_takes_restricted_pods_only(overlay: str):
    (space,) = of_kind(render(FOLDER / "storage"), "Namespace").values()
    assert space["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    others = (m for m in deployed(overlay) if m["kind"] != "Namespace")
    assert {m["metadata"]["namespace"] for m in others} == {space["metadata"]["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_no_more_rights_than_it_needs(overlay: str):
    (made,) = re.findall(r"useradd .*--uid (\d+) thumbloop", DOCKERFILE)
    for pod in pods(deployed(overlay)):
        of_pod = pod["spec"]["securityContext"]
        assert of_pod["runAsNonRoot"]
        assert {of_pod[k] for k in ("runAsUser", "runAsGroup", "fsGroup")} == {int(made)}
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_says_what_it_takes(overlay: str):
    for pod in pods(deployed(overlay)):
        (container,) = pod["spec"]["containers"]
        taken = container["resources"]
        assert {"cpu", "memory"} <= taken["requests"].keys()
        assert taken["limits"]["memory"] == taken["requests"]["memory"]


# What the applications say


def test_settings_are_read_and_folders_are_volumes(
    application: tuple[Manifest, ServerConfig | TrainerConfig],
):
    pod, config = application
    volumes = mounted_at(pod)
    state, model = volumes[str(config.state.folder)], volumes[config.model.path]
    assert state["persistentVolumeClaim"] == {"claimName": "thumbloop-state"}
    assert model["persistentVolumeClaim"] == {"claimName": "thumbloop-model"}
    for path in ("/tmp", "/home/thumbloop", "/dev/shm"):
        assert "emptyDir" in volumes[path]


def test_ports_are_those_of_the_settings(
    application: tuple[Manifest, ServerConfig | TrainerConfig],
):
    pod, config = application
    expected = {"metrics": config.metrics.port}
    if isinstance(config, ServerConfig):
        listen = config.listen
        expected |= {"grpc": listen.port, "http": config.http.port, "health": listen.health_port}
    assert ports_of(pod) == expected


def test_strangers_find_tls_and_tokens(server: tuple[Manifest, ServerConfig]):
    pod, config = server
    refuse_strangers(config)
    assert not config.listen.insecure
    assert config.access.model_dump(mode="json")["tokens"] == TOKENS
    for path in (config.listen.tls_certificate, config.listen.tls_key):
        assert path is not None
        assert path.name in ("tls.crt", "tls.key")  # the keys of every kubernetes.io/tls
        assert mounted_at(pod)[str(path.parent)]["secret"]["secretName"] == "thumbloop-tls"


def test_probes_ask_the_server_what_it_answers(server: tuple[Manifest, ServerConfig]):
    pod, config = server
    probes = probes_of(pod)
    assert {probe["grpc"]["port"] for probe in probes.values()} == {config.listen.health_port}
    asked = {name: probe["grpc"].get("service", "") for name, probe in probes.items()}
    assert asked == {"startupProbe": LIVENESS, "livenessProbe": LIVENESS, "readinessProbe": ""}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_the_trainer_for_its_metrics(overlay: str):
    probes = probes_of(pod_of(overlay, "trainer"))
    assert probes.keys() == {"startupProbe", "livenessProbe"}
    for probe in probes.values():
        assert probe["httpGet"] == {"port": "metrics", "path": "/metrics"}


def test_a_pod_is_not_killed_while_it_drains(server: tuple[Manifest, ServerConfig]):
    pod, config = server
    assert pod["spec"]["terminationGracePeriodSeconds"] >= config.listen.grace_s + 20


def test_tokens_made_as_the_guide_says_are_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = re.findall(
        r"^\.venv/bin/(?:thumbloop token|python -c) (?:.*\\\n)*.*", GUIDE, re.MULTILINE
    )
    assert len(made) == 3
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    for command in made:
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True)
    tokens = (tmp_path / "tokens.json").read_text()
    monkeypatch.setenv("THUMBLOOP_SERVER_ACCESS__TOKENS", tokens)
    doorkeeper = Doorkeeper(load(ServerConfig, None).access)
    for file, subject in (("token", "web-backend"), ("operator.token", "operator")):
        header = f"Bearer {(tmp_path / file).read_text()}"
        assert doorkeeper.identify([header]).subject == subject


@pytest.mark.parametrize("target", CONFIGS)
def test_variables_of_services_do_not_reach_the_settings(
    target: str, monkeypatch: pytest.MonkeyPatch
):
    for overlay in OVERLAYS:
        assert pod_of(overlay, target)["spec"]["enableServiceLinks"] is False
    for name in _SERVICE_LINKS:  # what Kubernetes would set for the Service beside it
        with monkeypatch.context() as pod:
            pod.setenv(f"THUMBLOOP_{target.upper()}_{name}", "10.0.0.1")
            with pytest.raises(SettingsError, match="unknown setting"):
                load(CONFIGS[target], None)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_image_is_a_target_and_runs_what_is_in_it(overlay: str):
    stages = parse(DOCKERFILE)
    for target in CONFIGS:
        (container,) = pod_of(overlay, target)["spec"]["containers"]
        name, _, tag = container["image"].rpartition("/")[2].partition(":")
        assert name == f"thumbloop-{target}"
        assert tag.endswith("-gpu") == (overlay != "cpu")
        (command,) = stages[target].values("CMD")
        assert container["args"][:-2] == json.loads(command)


# What the manifests say of each other


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_lead_to_ports_of_pods(overlay: str):
    manifests = render(FOLDER / overlay)
    for service in of_kind(manifests, "Service").values():
        (found,) = (
            pod
            for pod in pods(manifests)
            if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        )
        ports = ports_of(found)
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
            assert port["targetPort"] == port["name"]
        assert set(ports) - {port["name"] for port in service["spec"]["ports"]} <= {"health"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_volumes_that_pods_name_exist_or_are_secrets_that_the_guide_makes(overlay: str):
    manifests = deployed(overlay)
    known = {
        "persistentVolumeClaim": of_kind(manifests, "PersistentVolumeClaim").keys(),
        "configMap": of_kind(manifests, "ConfigMap").keys(),
        "secret": set(re.findall(r"create secret \w+ (thumbloop-\w+)", GUIDE)),
    }
    assert known["secret"] == SECRETS
    for pod in pods(manifests):
        for volume in pod["spec"]["volumes"]:
            for kind, key in (
                ("persistentVolumeClaim", "claimName"),
                ("configMap", "name"),
                ("secret", "secretName"),
            ):
                if kind in volume:
                    assert volume[kind][key] in known[kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_shares_the_volumes_shares_a_node(overlay: str):
    found = list(pods(deployed(overlay)))
    assert len(found) == 3
    for pod in found:
        affinity = pod["spec"]["affinity"]["podAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        for other in found:
            wanted = term["labelSelector"]["matchLabels"]
            assert wanted.items() <= other["metadata"]["labels"].items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_store_on_a_volume_has_one_server_and_one_trainer(overlay: str):
    for deployment in of_kind(render(FOLDER / overlay), "Deployment").values():
        assert deployment["spec"]["replicas"] == 1
        assert deployment["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_goes_in_or_out_but_calls_and_metrics(overlay: str):
    manifests = render(FOLDER / overlay)
    policies = of_kind(manifests, "NetworkPolicy")
    closed = policies.pop("thumbloop")["spec"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & closed.keys()
    for pod in pods(manifests):
        labels = pod["metadata"]["labels"].items()
        assert closed["podSelector"]["matchLabels"].items() <= labels
        opened = {
            port["port"]
            for policy in policies.values()
            if policy["spec"]["podSelector"]["matchLabels"].items() <= labels
            for rule in policy["spec"]["ingress"]
            for port in rule["ports"]
        }
        assert opened == ports_of(pod).keys() - {"health"}


def test_a_gpu_is_asked_for_where_the_overlay_says_so():
    asked = {
        (overlay, target): pod_of(overlay, target)["spec"]["containers"][0]["resources"]["limits"]
        for overlay in OVERLAYS
        for target in CONFIGS
    }
    assert {key: taken.get("nvidia.com/gpu") for key, taken in asked.items()} == {
        (overlay, target): None if overlay == "cpu" else "1"
        for overlay in OVERLAYS
        for target in CONFIGS
    }


# Monitoring


def test_the_operators_alerts_are_our_rules():
    (rule,) = of_kind(render(FOLDER / "monitoring"), "PrometheusRule").values()
    assert rule["apiVersion"] == OF_THE_OPERATOR
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())


def test_the_file_of_alerts_is_what_the_rules_give():
    check = [ROOT / "scripts/alerts", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_of_alerts_that_was_edited_is_noticed(tmp_path: Path):
    rules, alerts = "deploy/prometheus/rules.yml", "deploy/kubernetes/monitoring/alerts.yaml"
    modules = [f"deploy/{name}.py" for name in ("__init__", "alerts", "observe", "panels")]
    for name in ("scripts/alerts", rules, alerts, *modules):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "scripts/alerts").chmod(0o755)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    check = [tmp_path / "scripts/alerts", "--check"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    (tmp_path / alerts).write_text((tmp_path / alerts).read_text().replace("> 0", "> 1", 1))
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run make alerts" in done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_finds_both_under_the_names_that_the_alerts_know(overlay: str):
    (monitor,) = of_kind(render(FOLDER / "monitoring"), "ServiceMonitor").values()
    spec = monitor["spec"]
    assert monitor["apiVersion"] == OF_THE_OPERATOR
    assert spec["endpoints"] == [{"port": "metrics", "interval": "10s"}]
    found = [
        service
        for service in of_kind(render(FOLDER / overlay), "Service").values()
        if spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    assert all("metrics" in {p["name"] for p in s["spec"]["ports"]} for s in found)
    jobs = {service["metadata"]["labels"][spec["jobLabel"]] for service in found}
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    assert jobs == set(re.findall(r'absent\(up\{job="([\w-]+)"', rules))


def test_grafana_finds_the_dashboard():
    (board,) = of_kind(render(FOLDER / "monitoring"), "ConfigMap").values()
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert board["data"] == {DASHBOARD.name: DASHBOARD.read_text()}


def test_the_guide_names_folders_that_can_be_applied():
    named = set(re.findall(r"-k (deploy/kubernetes/[\w-]+)", GUIDE))
    assert named == {f"deploy/kubernetes/{folder}" for folder in FOLDERS}
    for folder in named:
        assert render(ROOT / folder)
    files = set(re.findall(r"-f (deploy/\S+)", GUIDE))
    assert files == {str(SHELL.relative_to(ROOT))}
