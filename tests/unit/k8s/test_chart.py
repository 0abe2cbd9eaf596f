"""The chart: a courier, which puts a spec where the Python renderer puts it; strict about its values, with a path to what is wrong."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import check, tool
from test_render import EXAMPLES, GPU_JOB, JOB, JOB_CLUSTERS, OF_A_SERVICE, SERVICE

from danlu.k8s.manifests import render
from danlu.spec import install, yaml12
from danlu.spec.files import parse
from danlu.spec.install import Install
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

Object = dict[str, Any]
ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "danlu"
GATEWAY = {"service": "topics", "host": "topics.example.com"}

VALUES: dict[str, Object] = {
    "nothing": {},
    "a job": {"jobs": [JOB]},
    "a service": {"services": [SERVICE]},
    "everything of one team": {
        "jobs": [JOB],
        "services": [SERVICE],
        "access": {
            "service_account": "danlu",
            "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/danlu"},
            "groups": ["ml"],
        },
        "storage": {"claim": "danlu-storage", "size": "2Ti", "storage_class": "nfs"},
        "queues": [{"name": "research", "cluster_queue": "gpus"}],
        "quota": {"gpus": 16, "cpus": 200, "memory": "2Ti"},
        "monitoring": {"pod_monitor": True, "labels": {"release": "prometheus"}},
    },
    "a platform": {
        "priority_classes": [{"name": "serving", "value": 1000}, {"name": "best-effort", "value": -10, "preempts": False}],
        "cluster_queues": [
            {"name": "gpus", "cpus": 200, "memory": "2Ti", "gpus": 16, "node_labels": {"nvidia.com/gpu.product": "NVIDIA-L4"}},
            {"name": "cpus", "cpus": 64, "memory": "256Gi", "cohort": "all"},
        ],
    },
    "an ingress": {"services": [SERVICE], "gateways": [{"kind": "ingress", **GATEWAY}]},
    "an ingress with TLS": {
        "services": [SERVICE],
        "gateways": [{"kind": "ingress", "class_name": "nginx", "tls_secret": "cert", "annotations": {"a/b": "c"}, **GATEWAY}],
    },
    "a route": {"services": [SERVICE], "gateways": [{"kind": "http_route", "gateway": "public", **GATEWAY}]},
    "a route of a Gateway elsewhere": {
        "services": [SERVICE],
        "gateways": [{"kind": "http_route", "gateway": "public", "gateway_namespace": "infra", **GATEWAY}],
    },
    "no policies": {"jobs": [JOB], "services": [SERVICE], "network": {"enabled": False}, "disruption_budget": False},
    "narrow policies": {"services": [SERVICE], "network": {"ingress_namespace": "ingress-nginx", "monitoring_namespace": "prometheus"}},
    "keys from values": {
        "api_keys": [{"secret": "danlu-keys", "keys": '{"keys": []}'}],
        "services": [
            SERVICE
            | {"auth": {"keys_file": "/etc/danlu-keys/keys.json"}}
            | {"cluster": SERVICE["cluster"] | {"secret_volumes": [{"secret": "danlu-keys", "mount_path": "/etc/danlu-keys"}]}}
        ],
    },
    "two ways to one service": {
        "services": [SERVICE],
        "gateways": [
            {"kind": "ingress", **GATEWAY},
            {"kind": "ingress", **GATEWAY, "host": "topics.internal", "name": "topics-internal"},
            {"kind": "http_route", "gateway": "public", **GATEWAY},
        ],
    },
    "nothing goes out": {"jobs": [JOB], "services": [SERVICE], "network": {"egress": []}},
    "everything goes out": {"jobs": [JOB], "services": [SERVICE], "network": {"egress": None}},
    "a way out": {"services": [SERVICE], "network": {"egress": [{"ports": [443], "cidrs": ["10.0.0.0/8", "fd00::/8"]}, {"ports": [9000]}]}},
    "a cache of models": {"storage": {"claim": "c"}, "model_cache": {"claim": "models", "size": "1Ti"}},
    "one writer": {"storage": {"claim": "c", "access_modes": ["ReadWriteOnce"]}},
    "a quota of GPUs": {"quota": {"gpus": 1}},
    "a sub-chart's": {"global": {"imageRegistry": "x"}, "services": [SERVICE], "test_image": "registry/curl:8"},
    "another namespace": {"jobs": [JOB | {"cluster": JOB["cluster"] | {"namespace": "other"}}], "services": [SERVICE]},
}


def template(values: Object, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "values.yaml").write_text(yaml12.write(values))
    command = [tool("helm"), "template", "name", str(CHART), "--namespace", "release", "--values", str(tmp_path / "values.yaml")]
    return subprocess.run(command, capture_output=True, text=True)


def rendered(values: Object, tmp_path: Path) -> list[Object]:
    done = template(values, tmp_path)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def specs_apart(one: Object, kind: type[TrainJob] | type[Service]) -> Object:
    """An object with the specs in its texts read: how they are written down is nobody's business."""
    if one["kind"] == "ConfigMap":
        return {**one, "data": {name: parse(TrainJob, text) for name, text in one["data"].items()}}
    if one["kind"] == "RayService":
        config = yaml.safe_load(one["spec"]["serveConfigV2"])
        for application in config["applications"]:
            application["args"] = Service.model_validate(application["args"])
        return {**one, "spec": {**one["spec"], "serveConfigV2": config}}
    return one


def by_python(spec: TrainJob | Service) -> Iterator[Object]:
    """What the renderer makes of a spec, in the release's namespace."""
    for one in render(spec):
        yield specs_apart({**one, "metadata": {"namespace": "release", **one["metadata"]}}, type(spec))


def by_helm(objects: list[Object], spec: TrainJob | Service) -> list[Object]:
    """What the chart makes of the same."""
    kinds = ("ConfigMap", "RayJob") if isinstance(spec, TrainJob) else ("RayService",)
    found = [one for one in objects if one["kind"] in kinds and one["metadata"]["labels"]["danlu.ai/name"] == spec.name]
    return [specs_apart(one, type(spec)) for one in sorted(found, key=lambda one: kinds.index(one["kind"]))]


def differences(helm: Any, python: Any, path: str = "") -> Iterator[str]:
    """Where the two differ, with what each has."""
    if isinstance(helm, dict) and isinstance(python, dict):
        for name in sorted(helm.keys() | python.keys()):
            yield from differences(helm.get(name), python.get(name), f"{path}.{name}")
    elif isinstance(helm, list) and isinstance(python, list) and len(helm) == len(python):
        for i, (one, other) in enumerate(zip(helm, python, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif helm != python:
        yield f"{path}: {helm!r} by Helm, {python!r} by Python"


def test_the_chart_makes_of_every_spec_what_the_renderer_makes(tmp_path: Path) -> None:
    jobs = [GPU_JOB | {"name": f"job-{i}", "cluster": JOB["cluster"] | fields} for i, fields in enumerate(JOB_CLUSTERS.values())]
    jobs += [JOB, GPU_JOB | {"name": "one-gpu", "workers": {"gpus_per_worker": 1}}]
    scaling = {"min_replicas": 1, "max_replicas": 5}
    services = [
        SERVICE | {"name": f"service-{i}", "autoscaling": scaling, "cluster": SERVICE["cluster"] | fields}
        for i, fields in enumerate(OF_A_SERVICE.values())
    ]
    services += [
        SERVICE | {"name": "gpu", "engine": {"kind": "encoder", "num_gpus": 1, "num_threads": 3}, "http": {"haproxy": True}},
        SERVICE | {"name": "writer", "engine": {"kind": "encoder_decoder", "num_gpus": 1, "num_threads": 2}},
        SERVICE
        | {
            "name": "limits",
            "limits": {"request_timeout_s": 2.5, "drain_timeout_s": 45.5, "max_body_bytes": 100_000_000},
            "autoscaling": {"max_replicas": 3},
        },
        SERVICE | {"name": "to-zero", "autoscaling": {"min_replicas": 0}},
        {"name": "echo", "engine": {"kind": "echo", "latency_ms": 0.5}, "cluster": {"image": "i", "gpu_type": None}},
        {
            "name": "echo-text",
            "engine": {"kind": "echo_text"},
            "auth": {"keys_file": "/keys/keys.json"},
            "cluster": {"image": "i", "secret_volumes": [{"secret": "keys", "mount_path": "/keys"}]},
        },
        {
            "name": "language",
            "engine": {"kind": "torch", "model_name_or_path": "/models/qwen", "num_gpus": 1, "num_threads": 4},
            "cluster": {"image": "i", "gpu_type": "NVIDIA-L4"},
        },
        {
            "name": "vllm-two",
            "engine": {"kind": "vllm", "model_name_or_path": "/models/qwen", "tensor_parallel_size": 2, "num_threads": 4},
            "autoscaling": {"max_replicas": 3},
            "cluster": {"image": "i", "gpu_type": "NVIDIA-L4", "replicas_per_pod": 2},
        },
        {
            "name": "vllm-cpu",
            "engine": {"kind": "vllm", "model_name_or_path": "/models/qwen", "device": "cpu"},
            "cluster": {"image": "i"},
        },
    ]
    for path in EXAMPLES:
        document, _ = yaml12.read(path.read_text(), path.name)
        document["name"] = f"example-{document['name']}"
        (services if document["kind"] == "service" else jobs).append(document)
    objects = rendered({"jobs": jobs, "services": services}, tmp_path)
    different: list[str] = []
    for kind, documents in ((TrainJob, jobs), (Service, services)):
        for document in documents:
            spec = parse(kind, yaml12.write(document))
            different += [f"{spec.name}{path}" for path in differences(by_helm(objects, spec), list(by_python(spec)))]
    assert not different, "\n".join(different)


def test_the_platforms_rules_and_dashboards_come_with_the_chart(tmp_path: Path) -> None:
    objects = rendered({"jobs": [JOB], "monitoring": {"rules": True, "dashboards": True, "labels": {"release": "prometheus"}}}, tmp_path)
    (rule,) = [one for one in objects if one["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load((ROOT / "ops/prometheus/rules/danlu.yaml").read_text())
    boards = {
        name: text for one in objects if one["metadata"].get("labels", {}).get("grafana_dashboard") for name, text in one["data"].items()
    }
    assert boards == {path.name: path.read_text() for path in (ROOT / "ops/grafana/dashboards").glob("*.json")}


@pytest.mark.parametrize("name", VALUES)
def test_whatever_the_values_every_object_is_taken(name: str, tmp_path: Path) -> None:
    Install.model_validate({key: value for key, value in VALUES[name].items() if key != "global"})
    objects = rendered(VALUES[name], tmp_path)
    for one in objects:
        check(one)
    assert len({(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects}) == len(objects)


def test_what_is_asked_for_around_the_specs_is_there_and_nothing_else(tmp_path: Path) -> None:
    def kinds(name: str) -> dict[str, int]:
        found = [one["kind"] for one in rendered(VALUES[name], tmp_path)]
        return {kind: found.count(kind) for kind in sorted(set(found))}

    assert kinds("nothing") == {"NetworkPolicy": 4}
    assert kinds("no policies") == {"ConfigMap": 1, "Pod": 1, "RayJob": 1, "RayService": 1}
    assert kinds("everything of one team") == {
        "ConfigMap": 1,
        "LocalQueue": 1,
        "NetworkPolicy": 6,
        "PersistentVolumeClaim": 1,
        "Pod": 1,
        "PodDisruptionBudget": 2,
        "PodMonitor": 1,
        "RayJob": 1,
        "RayService": 1,
        "ResourceQuota": 1,
        "Role": 1,
        "RoleBinding": 1,
        "ServiceAccount": 1,
    }


def test_training_yields_to_serving_and_comes_back(tmp_path: Path) -> None:
    """The values of the chart's README. What they ask for is Kubernetes', Kueue's and KubeRay's own; here that each of them is asked."""
    (block,) = [one for one in re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL) if "priority_classes" in one]
    values, _ = yaml12.read(block, "README.md")
    Install.model_validate(values)
    objects = rendered(values, tmp_path)
    for one in objects:
        check(one)
    of_kind = {kind: [one for one in objects if one["kind"] == kind] for kind in {one["kind"] for one in objects}}
    priority = {one["metadata"]["name"]: one for one in of_kind["PriorityClass"]}

    # A pod of the service that finds no room pushes out one of the training's.
    (service,), (job,) = of_kind["RayService"], of_kind["RayJob"]
    of_service, of_job = (
        {group["template"]["spec"]["priorityClassName"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])}
        for cluster in (service["spec"]["rayClusterConfig"], job["spec"]["rayClusterSpec"])
    )
    assert (of_service, of_job) == ({"serving"}, {"training"})
    assert priority["serving"]["value"] > priority["training"]["value"]
    assert priority["serving"]["preemptionPolicy"] == "PreemptLowerPriority"
    assert job["spec"]["submitterPodTemplate"]["spec"]["priorityClassName"] == "training"

    # And a job of higher priority suspends it, by Kueue, which starts it again when there is quota.
    (queue,), (cluster_queue,), (flavor,) = of_kind["LocalQueue"], of_kind["ClusterQueue"], of_kind["ResourceFlavor"]
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    assert cluster_queue["spec"]["preemption"]["withinClusterQueue"] == "LowerPriority"
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (quota,) = group["flavors"]
    assert (quota["name"], [one["name"] for one in quota["resources"]]) == (flavor["metadata"]["name"], group["coveredResources"])

    # It comes back: a lost worker is waited for, and a driver that is lost is tried again; both go on from the last checkpoint.
    spec = parse(TrainJob, yaml12.write(values["jobs"][0]))
    assert spec.max_failures > 0
    assert job["spec"]["backoffLimit"] > 0
    assert spec.checkpoint.save_steps is not None


def test_keys_that_are_made_here_are_a_secret_of_the_chart_and_open_the_service(tmp_path: Path) -> None:
    """From `danlu keys` over the chart's own Secret, as its pods have it, to what a service reads."""
    from danlu.serve.keys import create_key, read_keys

    file = tmp_path / "keys.json"
    create_key(file, "team")
    values = {**VALUES["keys from values"], "api_keys": [{"secret": "danlu-keys", "keys": file.read_text()}]}
    objects = rendered(values, tmp_path)
    (secret,) = [one for one in objects if one["kind"] == "Secret"]
    (mounted,) = Service.model_validate(values["services"][0]).cluster.secret_volumes  # type: ignore[union-attr]
    assert secret["metadata"]["name"] == mounted.secret
    in_the_pod = tmp_path / "pod"
    in_the_pod.mkdir()
    for name, text in secret["stringData"].items():
        (in_the_pod / name).write_text(text)
    assert read_keys(in_the_pod / "keys.json") == read_keys(file)


def test_the_role_is_what_the_client_asks_of_a_cluster_and_no_more(tmp_path: Path) -> None:
    (role,) = [one for one in rendered(VALUES["everything of one team"], tmp_path) if one["kind"] == "Role"]
    rights = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert not {verb for _, verb in rights} & {"*", "deletecollection", "escalate", "bind", "impersonate"}
    assert not {resource for resource, _ in rights} & {"*", "secrets", "pods/exec", "serviceaccounts"}
    assert {("rayjobs", "create"), ("configmaps", "patch"), ("pods/log", "get"), ("events", "list"), ("workloads", "list")} <= rights


def test_gateways_of_one_service_have_names_of_their_own_and_lead_to_it(tmp_path: Path) -> None:
    ways = [one for one in rendered(VALUES["two ways to one service"], tmp_path) if one["kind"] in ("Ingress", "HTTPRoute")]
    names = [(one["kind"], one["metadata"]["name"]) for one in ways]
    assert names == [("Ingress", "topics"), ("Ingress", "topics-internal"), ("HTTPRoute", "topics")]
    rules = [one["spec"]["rules"][0] for one in ways]
    assert [rule.get("host") for rule in rules] == ["topics.example.com", "topics.internal", None]
    assert {"topics-serve-svc"} == {
        rule["backendRefs"][0]["name"] if "backendRefs" in rule else rule["http"]["paths"][0]["backend"]["service"]["name"]
        for rule in rules
    }


TWICE: dict[str, Object] = {
    "two are named topics": {"jobs": [JOB, JOB | {"max_steps": 3}]},
    "two services are named topics": {"services": [SERVICE, SERVICE]},
    "two gateways of kind ingress are named topics": {
        "services": [SERVICE],
        "gateways": [{"kind": "ingress", **GATEWAY}, {"kind": "ingress", **GATEWAY, "host": "topics.internal"}],
    },
    "two gateways of kind http_route are named a": {
        "services": [SERVICE, SERVICE | {"name": "a"}],
        "gateways": [
            {"kind": "http_route", "gateway": "g", "service": "a", "host": "a"},
            {"kind": "http_route", "gateway": "g", **GATEWAY, "name": "a"},
        ],
    },
}


@pytest.mark.parametrize("said", TWICE)
def test_two_objects_of_one_name_are_refused_since_one_would_take_the_others_place(said: str, tmp_path: Path) -> None:
    what, _, name = said.rpartition(" are named ")
    done = template(TWICE[said], tmp_path)
    assert done.returncode
    for told in ("two", f"named {name}; give one of them a name of its own", *what.split()[-1:]):
        assert told in done.stderr
    with pytest.raises(ValueError, match=f"named {name}; give one of them a name of its own"):
        Install.model_validate(TWICE[said])
    apart = [one | ({"cluster": one["cluster"] | {"namespace": "b"}} if i else {}) for i, one in enumerate(TWICE[said].get("jobs", []))]
    rendered({"jobs": apart}, tmp_path)  # in two namespaces they are two


BAD: dict[str, tuple[Object, str]] = {
    "a misspelt value": ({"servces": []}, "servces"),
    "a misspelt field of a spec": ({"jobs": [JOB | {"max_step": 3}]}, "/jobs/0"),
    "a wrong number": ({"jobs": [JOB | {"max_steps": 0}]}, "/jobs/0/max_steps"),
    "no cluster": ({"services": [{"name": "a", "engine": {"kind": "echo"}}]}, "/services/0"),
    "a wrong unit": ({"services": [SERVICE | {"cluster": {"image": "i", "memory": "8G"}}]}, "/services/0/cluster/memory"),
    "a wrong union": ({"jobs": [JOB | {"cluster": {"image": "i", "scheduler": {"kind": "slurm"}}}]}, "/jobs/0/cluster/scheduler"),
    "a quota of none": ({"quota": {"gpus": 0}}, "/quota/gpus"),
    "an unknown service": (
        {"services": [SERVICE], "gateways": [{"kind": "ingress", "service": "topic", "host": "h"}]},
        "services has: topics",
    ),
    "keys that no pod has": (
        {"services": [SERVICE | {"auth": {"keys_file": "/etc/danlu-keys/keys.json"}}]},
        "auth.keys_file: /etc/danlu-keys/keys.json",
    ),
    "keys that are none": ({"api_keys": [{"secret": "danlu-keys", "keys": ""}]}, "/api_keys/0/keys"),
    "a route without a gateway": ({"services": [SERVICE], "gateways": [{"kind": "http_route", **GATEWAY}]}, "/gateways/0"),
    "a route with an Ingress' class": (
        {"services": [SERVICE], "gateways": [{"kind": "http_route", "gateway": "g", "class_name": "nginx", **GATEWAY}]},
        "/gateways/0",
    ),
    "a network that is none": ({"network": {"egress": [{"ports": [443], "cidrs": ["10.0.0.0"]}]}}, "/network/egress/0/cidrs/0"),
    "a port that is none": ({"network": {"egress": [{"ports": [0]}]}}, "/network/egress/0/ports/0"),
    "annotations of nothing": ({"access": {"annotations": {"a/b": "c"}}}, "no effect without access.service_account"),
    "a namespace that is none": (
        {"services": [SERVICE | {"cluster": {"image": "i", "namespace": "a.b"}}]},
        "/services/0/cluster/namespace",
    ),
    "a way round KubeRay's own Gateway": (
        {
            "services": [
                SERVICE
                | {"autoscaling": {"max_replicas": 2}}
                | {"cluster": SERVICE["cluster"] | {"upgrade": {"kind": "incremental", "gateway_class": "istio"}}}
            ],
            "gateways": [{"kind": "ingress", **GATEWAY}],
        },
        "KubeRay's own Gateway topics-gateway",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_with_a_path(name: str, tmp_path: Path) -> None:
    values, where = BAD[name]
    done = template(values, tmp_path)
    assert done.returncode
    assert where in done.stderr or where.replace("/", ".").lstrip(".") in done.stderr, done.stderr


def test_the_plain_manifests_of_a_platform_are_the_charts() -> None:
    folder = ROOT / "k8s" / "platform"
    command = [tool("helm"), "template", "danlu", str(CHART), "--namespace", "danlu", "--values", str(folder / "values.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (folder / "platform.yaml").read_text().splitlines()
    assert lines[2:] == done.stdout.splitlines(), f"stale: run {lines[1].strip('# ')}, and put it under the first two lines"


def test_a_ready_service_is_asked_by_a_pod_that_fits_a_quota_and_where_no_key_is_needed(tmp_path: Path) -> None:
    from danlu.serve.keys import OPEN_PATHS

    (pod,) = [one for one in rendered(VALUES["keys from values"], tmp_path) if one["kind"] == "Pod"]
    (container,) = pod["spec"]["containers"]
    assert "/" + container["command"][-1].rpartition("/")[2] in OPEN_PATHS
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_notes_say_what_to_do_next_and_nothing_of_what_is_not_there(tmp_path: Path) -> None:
    def notes(values: Object) -> str:
        (tmp_path / "values.yaml").write_text(yaml12.write(values))
        command = [tool("helm"), "install", "name", str(CHART), "--namespace", "team", "--values", str(tmp_path / "values.yaml")]
        done = subprocess.run([*command, "--dry-run=client"], capture_output=True, text=True, check=True)
        return done.stdout.partition("NOTES:")[2]

    empty = notes({})
    assert "Nothing runs yet" in empty
    assert "access.groups" in empty
    assert "helm test" not in empty
    assert "by network.egress 443, 6443, 6379; 80, 988 of 169.254.169.252/32, " in empty
    assert "by network.egress nothing." in notes({"network": {"egress": []}})
    assert "network.egress" not in notes({"network": {"egress": None}}) + notes({"network": {"enabled": False}})
    queued = JOB | {"cluster": JOB["cluster"] | {"scheduler": {"kind": "kueue", "queue": "q"}}}
    found = notes({**VALUES["keys from values"], "jobs": [queued], "gateways": [{"kind": "http_route", "gateway": "g", **GATEWAY}]})
    for told in (
        "danlu jobs logs -f topics -n team",
        "https://topics.example.com/v1/models, with one of its API keys",
        "Kueue 0.15 or newer: danlu doctor --on k8s -n team",
        "helm test name -n team",
    ):
        assert told in found, told
    assert "Nothing runs yet" not in found


def test_lint_has_nothing_against_it(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(VALUES["everything of one team"]))
    command = [tool("helm"), "lint", "--strict", str(CHART), "--values", str(tmp_path / "values.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_value_is_documented() -> None:
    text = (CHART / "values.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(Install.model_fields)
    for name in Install.model_fields:
        before = text.split(f"\n{name}:")[0].splitlines()[-1]
        assert before.startswith("# "), name
    own = {kind for kind in vars(install).values() if isinstance(kind, type) and kind.__module__ == install.__name__} - {Install}
    assert len(own) > 12
    plain = {"kind", "size", "memory"}  # what these mean stands in their names, and with whose they are
    undocumented = [f"{kind.__name__}.{name}" for kind in own for name, part in kind.model_fields.items() if not part.description]
    assert [name for name in undocumented if name.rpartition(".")[2] not in plain] == []
