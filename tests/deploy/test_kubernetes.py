"""The manifests for Kubernetes, rendered; without a cluster they must agree with all they name."""

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pytest
import yaml

from app.api.routes.operations import router
from app.settings import PREFIX, Settings
from deploy.kubernetes import check, generate
from tests.test_proxy_server import program
from tests.test_server import ROOT

Object = Mapping[str, Any]

NAMES: Final = [*check.OVERLAYS, *(f"base-{name}" for name in check.COMPONENTS)]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()
MEBIBYTE: Final = 2**20


@pytest.fixture(scope="module")
def all_rendered() -> Mapping[str, Sequence[Object]]:
    """The objects of each overlay, and of the base with each component."""
    program("kubectl")
    return {name: list(yaml.safe_load_all(text)) for name, text in check.rendered()}


@pytest.fixture(params=NAMES)
def objects(
    all_rendered: Mapping[str, Sequence[Object]], request: pytest.FixtureRequest
) -> Sequence[Object]:
    """The objects of one of them."""
    return all_rendered[request.param]


@pytest.fixture
def cpu(all_rendered: Mapping[str, Sequence[Object]]) -> Sequence[Object]:
    """The objects of the overlay for CPUs."""
    return all_rendered["cpu"]


def of_kind(objects: Sequence[Object], *kinds: str) -> Sequence[Object]:
    """Those of a kind."""
    return [one for one in objects if one["kind"] in kinds]


def named(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The one of this kind and name."""
    [found] = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


def pods(objects: Sequence[Object]) -> Sequence[Object]:
    """The pod templates."""
    return [one["spec"]["template"] for one in of_kind(objects, "Deployment")]


def normgate(objects: Sequence[Object]) -> tuple[Object, Object]:
    """NormGate's pod and its only container."""
    pod = named(objects, "Deployment", "normgate")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def selected(objects: Sequence[Object], selector: Mapping[str, str]) -> Sequence[Object]:
    """The pod templates that have these labels."""
    return [pod for pod in pods(objects) if selector.items() <= pod["metadata"]["labels"].items()]


def port_names(pod: Object) -> set[str]:
    """How a pod's ports are called."""
    return {port["name"] for one in pod["spec"]["containers"] for port in one["ports"]}


def references(node: Any) -> Iterator[tuple[str, str]]:
    """The kind and name of what an object needs to be there."""
    if isinstance(node, list):
        for one in node:
            yield from references(one)
    elif isinstance(node, dict):
        for key, kind, field in (
            ("configMapRef", "ConfigMap", "name"),
            ("configMap", "ConfigMap", "name"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if key in node:
                yield kind, node[key][field]
        if "serviceAccountName" in node:
            yield "ServiceAccount", node["serviceAccountName"]
        for one in node.values():
            yield from references(one)


def settings(objects: Sequence[Object]) -> Mapping[str, str]:
    """NormGate's environment."""
    found: dict[str, str] = {}
    for one in of_kind(objects, "ConfigMap"):
        if one["metadata"]["name"].startswith("normgate-settings"):
            found.update(one["data"])
    return found


def test_schemas(objects: Sequence[Object]) -> None:
    """Every object keeps to the schema of its kind, in the oldest and the newest version."""
    assert check.problems(iter(objects)) == []


def test_a_misspelt_field_is_found() -> None:
    """A field that Kubernetes does not know is told of, with its place."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"selectors": {}},
    }

    problems = check.problems(iter([service]))

    assert len(problems) == len(check.VERSIONS)
    assert all("Service a" in one and "$.spec" in one and "selectors" in one for one in problems)


@pytest.mark.parametrize("path", generate.files(), ids=lambda path: path.name)
def test_made_files_are_current(path: Any) -> None:
    """``make kubernetes`` has been run since the rules or Envoy's configuration were changed."""
    assert path.read_text() == generate.files()[path]


def test_rules(cpu: Sequence[Object]) -> None:
    """The PrometheusRule holds what Prometheus is given elsewhere."""
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules/normgate.yml").read_text())

    assert named(cpu, "PrometheusRule", "normgate")["spec"] == rules


def test_dashboard(cpu: Sequence[Object]) -> None:
    """The dashboard is the shipped one, and small enough to be applied."""
    shipped = (ROOT / "deploy/grafana/dashboards/normgate.json").read_text()
    dashboard = named(cpu, "ConfigMap", "normgate-dashboard")

    assert dashboard["data"] == {"normgate.json": shipped}
    # `kubectl apply` keeps a copy in an annotation, which may be so long.
    assert len(shipped) < 256 * 1024


def test_namespace(objects: Sequence[Object]) -> None:
    """Everything lies in the namespace normgate."""
    for one in objects:
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == "normgate"


def test_selectors(objects: Sequence[Object]) -> None:
    """Whatever selects pods selects those of exactly one Deployment, and ports that they have."""
    for one in of_kind(objects, "Deployment", "PodDisruptionBudget", "NetworkPolicy"):
        selector = one["spec"].get("selector") or one["spec"]["podSelector"]
        assert len(selected(objects, selector["matchLabels"])) == 1, one["metadata"]
    for one in of_kind(objects, "Service"):
        [pod] = selected(objects, one["spec"]["selector"])
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= port_names(pod)
    for one in of_kind(objects, "NetworkPolicy"):
        [pod] = selected(objects, one["spec"]["podSelector"]["matchLabels"])
        for rule in one["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= port_names(pod)


def test_references(objects: Sequence[Object]) -> None:
    """The maps, claims and accounts that pods name are there; secrets are optional."""
    there = {(one["kind"], one["metadata"]["name"]) for one in objects}

    for pod in pods(objects):
        needed = set(references(pod))
        assert needed
        assert needed <= there
        for container in pod["spec"]["containers"]:
            secrets = [
                one["secretRef"] for one in container.get("envFrom", []) if "secretRef" in one
            ]
            assert all(secret["optional"] for secret in secrets)


def test_pods_may_do_little(objects: Sequence[Object]) -> None:
    """No pod is root, writes outside its volumes, gains rights or holds a token."""
    for template in pods(objects):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 10_000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_network(objects: Sequence[Object]) -> None:
    """Without a component NormGate calls nobody; it is called by clients and Prometheus alone."""
    policy = named(objects, "NetworkPolicy", "normgate")["spec"]

    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy.get("egress", []) == []
    for one in of_kind(objects, "NetworkPolicy"):
        if one["spec"]["podSelector"] == policy["podSelector"]:
            for rule in one["spec"].get("ingress", []):
                assert all(peer["podSelector"]["matchLabels"] for peer in rule["from"])


def test_image(cpu: Sequence[Object]) -> None:
    """The pod is the image that the Dockerfile makes: version, user, port, place of the models."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    pod, container = normgate(cpu)

    assert container["image"] == f"normgate:{version[1]}"
    assert (
        f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n"
        in (DOCKERFILE)
    )
    assert f"EXPOSE {container['ports'][0]['containerPort']}\n" in DOCKERFILE


def test_models_are_mounted_where_the_image_looks(
    all_rendered: Mapping[str, Sequence[Object]],
) -> None:
    """A volume of models takes the place of the image's own."""
    _, container = normgate(all_rendered["base-store-volume"])
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "models"]

    assert f"NORMGATE_MODEL_STORE={mount['mountPath']}\n" in DOCKERFILE
    assert mount["readOnly"] is True


def test_probes(objects: Sequence[Object]) -> None:
    """The probes ask for routes that exist; only the liveness probe may end a pod that is busy."""
    _, container = normgate(objects)
    routes = {route.path for route in router.routes if hasattr(route, "path")}
    paths = {
        name: container[name]["httpGet"]["path"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }

    assert paths == {
        "startupProbe": "/readyz",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    assert set(paths.values()) <= routes
    assert all(container[name]["httpGet"]["port"] == "http" for name in paths)


def test_the_end_is_given_time(objects: Sequence[Object]) -> None:
    """Before it is killed a pod waits, serves on, and answers a request of the longest deadline."""
    pod, container = normgate(objects)
    wait_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace_s = float(settings(objects)["NORMGATE_SHUTDOWN_GRACE_S"])
    longest_s = Settings().max_deadline_ms / 1000

    assert pod["terminationGracePeriodSeconds"] >= wait_s + grace_s + longest_s + 10


def test_settings(objects: Sequence[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes its settings, and the cluster adds none: it would refuse unknown ones."""
    for name, value in settings(objects).items():
        assert name.startswith(PREFIX)
        monkeypatch.setenv(name, value)

    Settings.read({})
    assert normgate(objects)[0]["enableServiceLinks"] is False


def test_threads_and_memory(cpu: Sequence[Object]) -> None:
    """One core is left for all but the network, and what may be in flight fits into the memory."""
    _, container = normgate(cpu)
    limits = container["resources"]["limits"]
    gibibytes = float(limits["memory"].removesuffix("Gi"))

    assert int(settings(cpu)["NORMGATE_COMPUTE_THREADS"]) == int(limits["cpu"]) - 1
    assert gibibytes * 2**30 >= Settings().max_inflight_bytes + 768 * MEBIBYTE


def test_gpu(all_rendered: Mapping[str, Sequence[Object]]) -> None:
    """Each replica asks for one GPU and computes on no other device; an update needs none more."""
    objects = all_rendered["nvidia-gpu"]
    _, container = normgate(objects)
    update = named(objects, "Deployment", "normgate")["spec"]["strategy"]["rollingUpdate"]

    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings(objects)["NORMGATE_DEVICES"] == "cuda:0"
    assert update == {"maxSurge": 0, "maxUnavailable": 1}


def test_service_monitor(objects: Sequence[Object]) -> None:
    """Prometheus finds each pod once, in the job that the alerts look for."""
    for monitor in of_kind(objects, "ServiceMonitor"):
        spec = monitor["spec"]
        [service] = [
            one
            for one in of_kind(objects, "Service")
            if spec["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
        ]
        [endpoint] = spec["endpoints"]
        assert service["metadata"]["labels"][spec["jobLabel"]] == "normgate"
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert endpoint["path"] in {getattr(route, "path", None) for route in router.routes}


def test_autoscaler(cpu: Sequence[Object]) -> None:
    """KEDA scales the Deployment, which has no number of its own, by waiting, devices and cores."""
    spec = named(cpu, "ScaledObject", "normgate")["spec"]
    [by_wait, by_devices, by_cores] = spec["triggers"]

    assert "replicas" not in named(cpu, "Deployment", spec["scaleTargetRef"]["name"])["spec"]
    assert 2 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
    assert (by_wait["type"], by_wait["metricType"]) == ("prometheus", "Value")
    assert 'stage="queue"' in by_wait["metadata"]["query"]
    assert (by_devices["type"], by_devices["metricType"]) == ("prometheus", "AverageValue")
    assert by_devices["metadata"]["query"].startswith("sum(rate(")
    assert (by_cores["type"], by_cores["metricType"]) == ("cpu", "Utilization")
    for trigger in spec["triggers"]:
        assert all(isinstance(value, str) for value in trigger["metadata"].values())


def test_envoy(all_rendered: Mapping[str, Sequence[Object]]) -> None:
    """A real Envoy takes the configuration, whose addresses are Services that lead to pods."""
    path = check.HERE / "components/envoy/envoy.yaml"
    addresses = re.findall(r"address: ([a-z-]+), port_value: (\d+)}", path.read_text())
    ended = subprocess.run(
        [program("envoy"), "--mode", "validate", "-c", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    assert addresses == [("normgate-pods", "8000"), ("classifier", "9000")]
    objects = all_rendered["envoy-gate"]
    service = named(objects, "Service", "normgate-pods")["spec"]
    assert (service["clusterIP"], service["ports"][0]["port"]) == ("None", 8000)
    [envoy] = selected(objects, {"app.kubernetes.io/name": "normgate-envoy"})
    assert envoy["metadata"]["labels"]["normgate-client"] == "true"
