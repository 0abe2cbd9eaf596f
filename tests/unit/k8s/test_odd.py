"""Odd values: those that Kubernetes takes come out of the renderer and of the chart as they went in, the others are refused before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import check
from test_chart import by_helm, by_python, differences, rendered, template
from test_render import JOB, SERVICE

from danlu.errors import SpecError
from danlu.k8s.manifests import render, text
from danlu.spec import yaml12
from danlu.spec.files import parse
from danlu.spec.install import Install
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

Object = dict[str, Any]
LONGEST = "a" * 47
"""KubeRay's MaxRayJobNameLength and MaxRayServiceNameLength."""
ODD_CLUSTER: Object = {
    "image": "1e3",
    "namespace": "0777",
    "image_pull_secrets": ["null", "1.5"],
    "service_account": "true",
    "priority_class": "0x1f",
    "tolerations": [{"key": "on", "value": "off"}, {"key": "1", "value": ""}],
    "node_selector": {"no": "1e3", "a/b": "on"},
    "head": {"node_selector": {"y": "n"}},
    "env": {"NO": "on", "Y": "1e3", "E": "", "Q": "\"'\\ \n中", "Z": "~"},
    "secret_env": [{"name": "ON", "secret": "123", "key": "yes"}],
    "volumes": [{"claim": "1e5", "mount_path": "/data"}],
    "secret_volumes": [{"secret": "2026", "mount_path": "/keys"}],
}
NAMES = ("on", "null", "true", "e1", LONGEST)


def strings(one: Any) -> Iterator[str]:
    """Every name and value that is a text in YAML 1.2."""
    match one:
        case dict():
            for name, value in one.items():
                yield from (name, *strings(value))
        case list():
            for value in one:
                yield from strings(value)
        case str():
            yield one


def test_names_that_read_as_something_else_are_names_in_the_renderers_yaml_and_in_the_chart(tmp_path: Path) -> None:
    jobs = [JOB | {"name": name, "cluster": ODD_CLUSTER | {"scheduler": {"kind": "kueue", "queue": "1e3"}}} for name in NAMES]
    services = [SERVICE | {"name": name, "cluster": ODD_CLUSTER | {"scheduler": {"kind": "volcano", "queue": "123"}}} for name in NAMES]
    extra = {
        "access": {"service_account": "true", "groups": ["on"]},
        "storage": {"claim": "1e5", "storage_class": "123"},
        "queues": [{"name": "1e3", "cluster_queue": "123"}],
        "cluster_queues": [{"name": "123", "cpus": 1, "memory": "1Gi", "cohort": "0x1"}],
        "gateways": [{"kind": "ingress", "service": "on", "host": "on", "class_name": "123", "tls_secret": "null"}],
        "priority_classes": [{"name": "0x1f", "value": 1}],
        "network": {"monitoring_namespace": "123", "operator_namespace": "1e3", "ingress_namespace": "0777"},
    }
    values = {"jobs": jobs, "services": services, **extra}
    Install.model_validate(values)
    objects = rendered(values, tmp_path)
    different: list[str] = []
    for kind, documents in ((TrainJob, jobs), (Service, services)):
        for document in documents:
            spec = parse(kind, yaml12.write(document))
            for one in render(spec):
                check(one)
                # kubectl and Argo read YAML 1.1, in which `on` and `y` are no texts.
                assert list(strings(yaml.safe_load(text([one])))) == list(strings(one))
            different += [f"{spec.name}{path}" for path in differences(by_helm(objects, spec), list(by_python(spec)))]
    assert not different, "\n".join(different)
    for one in objects:
        check(one)


@pytest.mark.parametrize(
    ("kind", "change", "told", "fix"),
    [
        (TrainJob, "name=" + "a" * 48, "47 at most", "a" * 47),
        (TrainJob, "cluster.memory=1.5Gi", "a whole number of Mi, Gi or Ti is needed", "1536Mi"),
        (TrainJob, "cluster.memory=32GB", "a whole number of Mi, Gi or Ti is needed", "32Gi"),
        (TrainJob, "cluster.memory=0.0001Gi", "a whole number", ""),
        (TrainJob, "cluster.scheduler={kind: kueue, queue: " + "q" * 64 + "}", "cluster.scheduler", ""),
        (TrainJob, "cluster.scheduler={kind: yunikorn, queue: root." + "q" * 60 + "}", "63", ""),
        (TrainJob, "cluster.node_selector={pool: a b}", "node_selector.pool", "a-b"),
        (TrainJob, "cluster.tolerations=[{key: team, value: a/b}]", "tolerations", "a-b"),
        (TrainJob, "cluster.secret_env=[{name: A, secret: s, key: k}, {name: A, secret: s, key: l}]", "A is set twice", ""),
        (Service, "cluster.gpu_type='NVIDIA H100 80GB'", "gpu_type", "NVIDIA-H100-80GB"),
    ],
)  # fmt: skip
def test_what_an_api_server_would_refuse_is_refused_with_what_it_would_take(kind: type, change: str, told: str, fix: str) -> None:
    document = yaml12.write(JOB if kind is TrainJob else SERVICE)
    with pytest.raises(SpecError) as raised:
        parse(kind, document, [change])
    assert told in str(raised.value)
    assert raised.value.fix.startswith(fix)


def allowed(policies: list[Object], source: Object, target: Object, port: str) -> bool:
    """What Kubernetes says of NetworkPolicies: a pod that none selects is open, and else what any of them lets in comes in."""

    def selects(selector: Object, labels: Object) -> bool:
        wanted = selector.get("matchLabels", {}).items() <= labels.items()
        for one in selector.get("matchExpressions", []):
            value = labels.get(one["key"])
            match one["operator"]:
                case "Exists":
                    wanted &= value is not None
                case "NotIn":
                    wanted &= value not in one["values"]
        return wanted

    def peer(one: Object, namespace: str) -> bool:
        if "namespaceSelector" in one:
            return selects(one["namespaceSelector"], {"kubernetes.io/metadata.name": source["namespace"]})
        return source["namespace"] == namespace and selects(one["podSelector"], source["labels"])

    mine = [one for one in policies if one["metadata"]["namespace"] == target["namespace"]]
    mine = [one["spec"] for one in mine if selects(one["spec"]["podSelector"], target["labels"])]
    return not mine or any(
        (not rule.get("from") or any(peer(one, target["namespace"]) for one in rule["from"]))
        and (not rule.get("ports") or port in [one["port"] for one in rule["ports"]])
        for spec in mine
        for rule in spec.get("ingress", [])
    )


def pod(kind: str, name: str, namespace: str = "release") -> Object:
    return {"namespace": namespace, "labels": {"danlu.ai/kind": kind, "danlu.ai/name": name}}


@pytest.fixture
def policies(tmp_path: Path) -> list[Object]:
    """Of a chart with a job in its own namespace and one in another, and a service."""
    elsewhere = JOB | {"name": "far", "cluster": JOB["cluster"] | {"namespace": "other"}}
    values = {"jobs": [JOB, elsewhere], "services": [SERVICE | {"name": "asked"}], "monitoring": {"pod_monitor": True}}
    return [one for one in rendered(values, tmp_path) if one["kind"] in ("NetworkPolicy", "PodMonitor")]


def test_the_policies_let_ray_its_operator_and_prometheus_do_their_work_and_others_not(policies: list[Object]) -> None:
    *policies, monitor = sorted(policies, key=lambda one: one["kind"] == "PodMonitor")
    operator, prometheus = ({"namespace": name, "labels": {}} for name in ("kuberay-operator", "monitoring"))
    stranger = {"namespace": "release", "labels": {"app": "other"}}
    for kind, name, namespace in (
        ("train", "topics", "release"),
        ("train", "far", "other"),
        ("serve", "asked", "release"),
        ("train", "by-hand", "release"),  # from `danlu train --on k8s`, of which the chart knows nothing
        ("serve", "by-hand", "release"),
    ):
        one = pod(kind, name, namespace)
        assert allowed(policies, one, one, "gcs-server"), f"{name}'s workers reach its head"
        assert allowed(policies, operator, one, "dashboard"), f"KubeRay asks {name}'s head"
        assert allowed(policies, prometheus, one, "as-metrics"), f"{name} is scraped"
        assert not allowed(policies, {**stranger, "namespace": namespace}, one, "gcs-server")
    assert not allowed(policies, pod("train", "by-hand"), pod("train", "topics"), "gcs-server"), "no other job reaches it"
    assert allowed(policies, stranger, pod("serve", "asked"), "serve")
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["release", "other"]}


def test_a_route_is_where_its_service_is(tmp_path: Path) -> None:
    one = SERVICE | {"cluster": SERVICE["cluster"] | {"namespace": "other"}}
    gateways = [{"kind": "ingress", "service": "topics", "host": "h"}]
    (ingress,) = [found for found in rendered({"services": [one], "gateways": gateways}, tmp_path) if found["kind"] == "Ingress"]
    assert ingress["metadata"]["namespace"] == "other", "an Ingress reaches no Service of another namespace"


KUEUE = {"cluster": SERVICE["cluster"] | {"scheduler": {"kind": "kueue", "queue": "research"}}}


def test_a_service_in_a_queue_has_a_fixed_number_of_pods_which_kueue_starts(tmp_path: Path) -> None:
    """https://kueue.sigs.k8s.io/docs/tasks/run/rayservices/"""
    one = SERVICE | KUEUE | {"autoscaling": {"min_replicas": 3, "max_replicas": 3}}
    (made,) = render(Service.model_validate(one))
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    spec = Service.model_validate(one)
    assert list(differences(by_helm(rendered({"services": [one]}, tmp_path), spec), list(by_python(spec)))) == []
    config = made["spec"]["rayClusterConfig"]
    assert "enableInTreeAutoscaling" not in config
    assert config["workerGroupSpecs"][0]["replicas"] == 3
    # Kueue sets it when it is made, and takes it back: said here, the next `danlu serve` would put a running service to sleep.
    assert "suspend" not in made["spec"] | config
    for scaling in ({"min_replicas": 1, "max_replicas": 4}, {"min_replicas": 0}):
        document = SERVICE | KUEUE | {"autoscaling": scaling}
        with pytest.raises(SpecError, match="a fixed number of pods"):
            parse(Service, yaml12.write(document))
        done = template({"services": [document]}, tmp_path)
        assert done.returncode != 0
        assert re.search("topics.*a fixed number of pods", done.stderr)
    four_in_a_pod = KUEUE["cluster"] | {"replicas_per_pod": 4}
    parse(Service, yaml12.write(SERVICE | {"cluster": four_in_a_pod, "autoscaling": {"min_replicas": 1, "max_replicas": 4}}))
    incremental = KUEUE["cluster"] | {"upgrade": {"kind": "incremental", "gateway_class": "istio"}}
    with pytest.raises(SpecError, match="needs Ray's autoscaler"):
        parse(Service, yaml12.write(SERVICE | {"cluster": incremental}))


def test_kueues_objects_are_of_the_version_that_it_serves(tmp_path: Path) -> None:
    """v1beta1 is served no more from Kueue 0.20 on; v1beta2 since 0.15 (kubernetes-sigs/kueue#13957)."""
    queue = {"name": "gpus", "cpus": 8, "memory": "1Ti", "cohort": "all"}
    objects = rendered({"cluster_queues": [queue], "queues": [{"name": "q", "cluster_queue": "gpus"}]}, tmp_path)
    found = {one["kind"]: one for one in objects if one["apiVersion"].startswith("kueue")}
    assert {one["apiVersion"] for one in found.values()} == {"kueue.x-k8s.io/v1beta2"}
    assert found["ClusterQueue"]["spec"]["cohortName"] == "all"
