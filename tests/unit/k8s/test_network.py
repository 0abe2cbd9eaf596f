"""Who reaches whom through the chart's NetworkPolicies: their meaning, worked out here by Kubernetes' own rules, and not their text."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from kube import check
from test_chart import CHART, rendered
from test_render import JOB, SERVICE

from danlu.spec import yaml12
from danlu.spec.install import Install

Object = dict[str, Any]
MINIO, S3, METADATA = "10.1.2.3", "52.216.0.1", "169.254.169.254"


def pod(kind: str, name: str, namespace: str = "release") -> Object:
    return {"namespace": namespace, "labels": {"danlu.ai/kind": kind, "danlu.ai/name": name}}


STRANGER = {"namespace": "elsewhere", "labels": {"app": "shop"}}


class Policies:
    """What no policy selects is open, and the rest is what they add up to.

    https://kubernetes.io/docs/concepts/services-networking/network-policies
    """

    def __init__(self, objects: list[Object]) -> None:
        self.all = [one for one in objects if one["kind"] == "NetworkPolicy"]

    def lets_out(self, source: Object, to: Object | str, port: int, protocol: str = "TCP") -> bool:
        return self._lets("Egress", source, to, port, protocol)

    def lets_in(self, target: Object, source: Object | str, port: int | str) -> bool:
        return self._lets("Ingress", target, source, port, "TCP")

    def _lets(self, way: str, pod: Object, peer: Object | str, port: int | str, protocol: str) -> bool:
        mine = [
            one
            for one in self.all
            if way in one["spec"]["policyTypes"]
            and one["metadata"]["namespace"] == pod["namespace"]
            and _selects(one["spec"]["podSelector"], pod["labels"])
        ]
        rules = [(one, rule) for one in mine for rule in one["spec"].get(way.lower()) or []]
        return not mine or any(_is_port(rule, port, protocol) and _is_peer(one, rule, way, peer) for one, rule in rules)


def _is_port(rule: Object, port: int | str, protocol: str) -> bool:
    return "ports" not in rule or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in rule["ports"])


def _is_peer(policy: Object, rule: Object, way: str, peer: Object | str) -> bool:
    peers = rule.get("to" if way == "Egress" else "from")
    return peers is None or any(_matches(one, peer, policy["metadata"]["namespace"]) for one in peers)


def _matches(one: Object, peer: Object | str, own: str) -> bool:
    if isinstance(peer, str):
        return "ipBlock" in one and ip_address(peer) in ip_network(one["ipBlock"]["cidr"])
    if "ipBlock" in one:  # addresses of pods are nobody's to know
        return False
    there = {"kubernetes.io/metadata.name": peer["namespace"]}
    in_namespace = _selects(one["namespaceSelector"], there) if "namespaceSelector" in one else peer["namespace"] == own
    return in_namespace and _selects(one.get("podSelector", {}), peer["labels"])


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    for term in selector.get("matchExpressions", []):
        has = labels.get(term["key"])
        if not {"Exists": has is not None, "NotIn": has not in term.get("values", []), "In": has in term.get("values", [])}[
            term["operator"]
        ]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def policies(tmp_path: Path, network: Object | None = None, **cluster: Any) -> Policies:
    service = SERVICE | {"cluster": SERVICE["cluster"] | cluster}
    return Policies(rendered({"jobs": [JOB], "services": [service], **({} if network is None else {"network": network})}, tmp_path))


EVERY = [pod("train", "topics"), pod("serve", "topics"), pod("train", "somebodys"), pod("serve", "somebodys")]


@pytest.mark.parametrize("one", EVERY, ids=lambda one: "-".join(one["labels"].values()))
def test_nothing_goes_out_but_where_a_plain_install_has_to(one: Object, tmp_path: Path) -> None:
    found = policies(tmp_path)
    assert found.lets_out(one, one, 40_123), "Ray's own ports, between the pods of one cluster"
    assert found.lets_in(one, one, 40_123)
    for protocol in ("UDP", "TCP"):
        assert found.lets_out(one, STRANGER, 53, protocol), "names"
    assert found.lets_out(one, S3, 443), "an object store, a hub"
    assert found.lets_out(one, METADATA, 80), "workload identity"
    assert found.lets_out(one, "10.0.0.1", 6443), "the API server"
    assert not found.lets_out(one, S3, 22)
    assert not found.lets_out(one, S3, 80)
    assert not found.lets_out(one, MINIO, 9000)
    assert not found.lets_out(one, STRANGER, 8000)
    assert not found.lets_in(one, STRANGER, 40_123)


def test_pods_of_one_job_or_service_do_not_reach_those_of_another(tmp_path: Path) -> None:
    found = policies(tmp_path)
    for one in EVERY:
        for other in EVERY[:2]:
            assert found.lets_in(other, one, 8265) is (one == other), (one, other)
    assert not found.lets_out(EVERY[0], EVERY[1], 8265)


def test_what_people_submit_under_the_name_of_the_charts_job_is_a_service_of_its_own(tmp_path: Path) -> None:
    """What a job trains, a service of its name often serves."""
    found = Policies(rendered({"jobs": [JOB]}, tmp_path))
    service = pod("serve", "topics")
    assert found.lets_in(service, service, 6379)
    assert found.lets_out(service, service, 6379)
    assert found.lets_in(service, STRANGER, "serve")
    assert not found.lets_in(pod("train", "topics"), service, 6379)


def test_what_a_spec_names_may_be_reached_and_by_its_own_pods_alone(tmp_path: Path) -> None:
    env = {
        "AWS_ENDPOINT_URL": "http://minio.minio:9000/",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:p@collector:4317/v1?x=1:2",
        "HTTP_PROXY": "http://[fd00::1]:3128",
        "HF_ENDPOINT": "http://mirror",
        "SAID": "s3://bucket/%zz and no more",
        "NCCL_SOCKET_IFNAME": "eth0:1",
    }
    found = policies(tmp_path, {"egress": []}, env=env, redis={"address": "redis.infra:6380"})
    reached = {port for port in range(1, 10_000) if found.lets_out(pod("serve", "topics"), MINIO, port)}
    assert reached == {53, 5353, 9000, 4317, 3128, 80, 6380}
    for other in (pod("train", "topics"), pod("serve", "somebodys")):
        assert {port for port in range(1, 10_000) if found.lets_out(other, MINIO, port)} == {53, 5353}


def test_egress_is_what_the_value_says(tmp_path: Path) -> None:
    narrow = policies(tmp_path, {"egress": [{"ports": [443, 8443], "cidrs": ["10.0.0.0/8", "fd00::/8"]}]})
    for one in EVERY:
        assert narrow.lets_out(one, MINIO, 8443)
        assert narrow.lets_out(one, "fd00::1", 443)
        assert not narrow.lets_out(one, S3, 443)
        assert not narrow.lets_out(one, METADATA, 80)
    for network in ({"egress": None}, {"enabled": False}):
        opened = policies(tmp_path, network)
        assert all(opened.lets_out(one, S3, 22) for one in EVERY)
    assert not policies(tmp_path, {"egress": None}).lets_in(EVERY[0], STRANGER, 22), "what comes in is another matter"


def test_the_values_of_the_readme_are_values(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    found = [yaml12.read(block, "README.md")[0] for block in blocks]
    assert {"network", "gateways"} <= {name for values in found for name in values}
    for values in found:
        Install.model_validate(values)
        for one in rendered(values, tmp_path):
            check(one)
