"""A cluster that does not answer as it should: commands go on, or say what is wrong and what would help."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_jobs import JOB
from test_chart import rendered
from test_remote import SERVICE, danlu

from danlu.errors import ClusterError, SpecError
from danlu.k8s import client
from danlu.k8s.kubeconfig import Kube, connect
from danlu.remote import jobs, services
from danlu.spec.files import dump
from danlu.spec.serve import Service

Object = dict[str, Any]
PODS = {"labels": {"danlu.ai/kind": "train", "danlu.ai/name": "topics"}}
SUBMITTER = {"metadata": PODS, "spec": {"containers": [{"name": "ray-job-submitter"}]}}


@pytest.fixture
def kube(api: Any) -> Kube:
    found = connect()
    jobs.submit(found, JOB)
    return found


def test_a_name_that_is_no_name_is_not_there_and_is_never_part_of_a_path(api: Any, kube: Kube) -> None:
    for name in ("topics/status", "../pods/x", "topics?watch=true", "Topics", "t" * 300, "", "主题"):
        for command in ("show", "delete", "cancel", "resume", "wait"):
            with pytest.raises(ClusterError, match="there is no job named"):
                getattr(jobs, {"show": "status"}.get(command, command))(kube, name)
    assert not [request for request in api.requests() if "/status" in request or "watch" in request]
    assert api.get("rayjobs", "topics") is not None
    with pytest.raises(ClusterError, match="cannot be a namespace's name"):
        connect(namespace="a/b")


def test_a_failed_job_is_shown_also_where_its_log_is_gone(api: Any, kube: Kube) -> None:
    api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Failed", "message": "the pod was evicted"})
    api.put("pods", "topics-submit", **SUBMITTER, status={"phase": "Failed"})
    api.answer("get /api/v1/namespaces/default/pods/topics-submit/log", 500, {"message": "dial tcp: no route to the node"})
    found = jobs.status(kube, "topics")
    assert (found.state, found.why) == ("failed", "the pod was evicted")


def test_a_watch_outlives_an_api_server_that_is_replaced(api: Any, kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WATCH_S", 1)
    states = client.watch(kube, "RayJob", "topics", timeout_s=60)
    assert next(states) is not None
    api.answer("get", 503, {"message": "shutting down"}, times=3 * client.RETRIES)
    threading.Timer(0.3, lambda: api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})).start()
    assert any(one is not None and one.get("status", {}).get("jobStatus") == "SUCCEEDED" for one in states)


def test_a_watch_ends_with_what_was_said_where_nobody_answers_any_more_or_a_token_is_old(
    api: Any, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WATCH_S", 1)
    monkeypatch.setattr(client, "OUTAGE_S", 0.2)
    states = client.watch(kube, "RayJob", "topics")
    assert next(states) is not None
    api.answer("get", 503, {"message": "shutting down"})
    with pytest.raises(ClusterError, match="shutting down"):
        list(states)


def test_a_token_that_has_run_out_ends_a_watch_at_once(api: Any, kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WATCH_S", 1)
    states = client.watch(kube, "RayJob", "topics")
    assert next(states) is not None
    api.answer("get", 401, {"reason": "Unauthorized", "message": "Unauthorized"})
    with pytest.raises(ClusterError) as raised:
        list(states)
    assert "log in again" in raised.value.fix


def test_a_job_that_changes_at_every_look_is_not_cancelled_for_ever(api: Any, kube: Kube) -> None:
    api.answer("patch", 409, {"reason": "Conflict", "message": "the object has been modified"})
    with pytest.raises(ClusterError, match="changes all the time"):
        jobs.cancel(kube, "topics")


def test_a_spec_of_another_danlu_does_not_stop_its_successor(api: Any) -> None:
    kube = connect()
    services.deploy(kube, SERVICE)
    old = dump(SERVICE) + "a_field_of_tomorrow: 1\n"
    api.put("rayservices", "echo", metadata={"annotations": {services.SPEC: old}})
    changed = SERVICE.model_copy(update={"limits": SERVICE.limits.model_copy(update={"max_ongoing_requests": 7})})
    assert services.deploy(kube, changed) == "changed: KubeRay finds out how, since the spec before is another Danlu's"
    assert api.get("rayservices", "echo")["metadata"]["annotations"][services.PREVIOUS] == old


def test_rolling_back_twice_is_where_it_began(api: Any) -> None:
    kube = connect()
    first = SERVICE.model_copy(update={"limits": SERVICE.limits.model_copy(update={"max_ongoing_requests": 7})})
    services.deploy(kube, first)
    services.deploy(kube, SERVICE)
    assert [services.rollback(kube, "echo")[0] for _ in range(3)] == [first, SERVICE, first]


def test_a_specs_own_namespace_is_where_everything_of_it_is_done(api: Any, tmp_path: Path) -> None:
    there = JOB.model_copy(update={"cluster": JOB.cluster.model_copy(update={"namespace": "team"})})
    (tmp_path / "job.yaml").write_text(dump(there))
    result = danlu("train", str(tmp_path / "job.yaml"), "--on", "k8s")
    assert "namespace team" in result.output
    assert "danlu jobs logs -f topics --namespace team " in result.output, "the next command finds it"
    assert api.get("rayjobs", "topics", "team") is not None
    assert api.get("configmaps", "topics-spec", "team") is not None
    kube = connect()  # its namespace is another, as in a notebook
    with pytest.raises(ClusterError, match="a job named 'topics' already"):
        jobs.submit(kube, there)
    service = SERVICE.model_copy(update={"cluster": SERVICE.cluster.model_copy(update={"namespace": "team"})})
    assert services.deploy(kube, service).startswith("new")
    assert services.deploy(kube, service) == "as it was"
    refused = danlu("train", str(tmp_path / "job.yaml"), "--on", "k8s", "--namespace", "mine")
    assert isinstance(refused.exception, SpecError)
    assert "--set cluster.namespace=mine" in refused.exception.fix


@pytest.mark.parametrize(
    ("text", "told", "fix"),
    [
        ("a: [b", "is no kubeconfig: while parsing a flow sequence", "kubectl config view"),
        ("just text", "is no kubeconfig", "kubectl config view"),
        ("", "no kubeconfig that can be read", "KUBECONFIG="),
        ("{apiVersion: v1, kind: Config, contexts: [{context: {}}]}", "no kubeconfig that can be read", "KUBECONFIG="),
    ],
)
def test_a_file_that_is_no_kubeconfig_is_named(text: str, told: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "broken"
    file.write_text(text)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match=told) as raised:
        connect()
    assert fix in raised.value.fix


def test_a_context_that_cannot_be_used_is_told_with_what_it_lacks(api: Any) -> None:
    """Its cluster or its user is not in the file, a file that it names is not there or is none, its login command gives no credentials."""
    file = api.kubeconfig(here="default", there="research")
    document = yaml.safe_load(file.read_text())
    document["contexts"][1]["context"]["cluster"] = "nowhere"
    document["users"] += [
        {"name": "login", "user": {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-login", "args": ["now"]}}},
        {"name": "certificate", "user": {"client-certificate": "/nowhere/c.crt", "client-key": "/nowhere/c.key"}},
    ]
    document["users"] += [
        {"name": "token", "user": {"tokenFile": "/nowhere/token"}},
        {"name": "garbled", "user": {"client-certificate-data": "no base64", "client-key-data": "x"}},
    ]
    document["clusters"].append({"name": "s", "cluster": {"server": "https://127.0.0.1:9"}})
    users = ("login", "certificate", "token", "garbled", "nobody")
    document["contexts"] += [{"name": user, "context": {"cluster": "s", "user": user}} for user in users]
    document["clusters"].append({"name": "bare", "cluster": {"server": "127.0.0.1:9"}})
    document["contexts"].append({"name": "bare", "context": {"cluster": "bare", "user": "u"}})
    file.write_text(yaml.safe_dump(document))
    for context, told in (
        ("there", "context 'there' cannot be used: .*nowhere"),
        ("login", "no credentials from `no-such-login now`"),
        ("certificate", "context 'certificate' cannot be used: File does not exist: /nowhere/c.crt"),
        ("token", "context 'token' cannot be used: .*/nowhere/token"),
        ("garbled", "context 'garbled' cannot be used: .*base64"),
        ("bare", "context 'bare' cannot be used: its cluster's server is '127.0.0.1:9'"),
        ("nobody", "context 'nobody' cannot be used: the file has no user 'nobody'"),
    ):
        with pytest.raises(ClusterError, match=told):
            connect(context)
    assert connect("here").context == "here"
    document["current-context"] = "there"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ClusterError, match="context 'there' cannot be used"):
        connect()
    document["current-context"] = "gone"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ClusterError, match="the kubeconfig's current context is 'gone', which it does not have"):
        connect()


def test_a_kubeconfig_without_a_current_context_does_with_one_that_is_named(api: Any) -> None:
    path = api.kubeconfig(here="default", there="team")
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({name: value for name, value in document.items() if name != "current-context"}))
    assert (connect("there").context, connect("there").namespace) == ("there", "team")
    with pytest.raises(ClusterError, match="no context 'nowhere'") as raised:
        connect("nowhere")
    assert raised.value.fix == "one of: here, there"
    with pytest.raises(ClusterError, match="no current context") as raised:
        connect()
    assert "here, there" in raised.value.fix


def test_a_service_says_what_its_queue_says(api: Any) -> None:
    kube = connect()
    cluster = {"image": "i", "scheduler": {"kind": "kueue", "queue": "research"}}
    queued = Service.model_validate({"name": "echo", "engine": {"kind": "echo"}, "cluster": cluster})
    services.deploy(kube, queued)
    uid = api.get("rayservices", "echo")["metadata"]["uid"]
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for cpu"}
    api.put("workloads", "rayservice-echo", metadata={"ownerReferences": [{"uid": uid}]}, status={"conditions": [condition]})
    found = services.service(kube, "echo")
    assert (found.phase, found.why) == ("starting", "behind the quota in queue research: insufficient unused quota for cpu")


def test_the_role_of_the_chart_allows_every_request_that_the_commands_make(api: Any, kube: Kube, tmp_path: Path) -> None:
    (role,) = [one for one in rendered({"access": {"groups": ["ml"]}}, tmp_path) if one["kind"] == "Role"]
    may = {(verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    services.deploy(kube, SERVICE)
    api.put("rayservices", "echo", status={"activeServiceStatus": {"rayClusterName": "echo-a"}})
    api.put("rayclusters", "echo-a", spec={"workerGroupSpecs": [{"minReplicas": 1, "maxReplicas": 2}]})
    api.put("pods", "topics-submit", **SUBMITTER, status={"phase": "Failed"})
    api.answer("get /api/v1/namespaces/default/pods/topics-submit/log", 200, b"a line\n")
    for state in ("Running", "Failed"):
        api.put("rayjobs", "topics", status={"jobDeploymentStatus": state})
        jobs.status(kube, "topics")
    list(jobs.logs(kube, "topics", follow=False))
    assert jobs.wait(kube, "topics", timeout_s=1)
    jobs.jobs(kube), services.services(kube), services.service(kube, "echo"), services.scale(kube, "echo", min_replicas=1, max_replicas=3)
    jobs.resume(kube, "topics")
    jobs.cancel(kube, "topics")
    jobs.delete(kube, "topics")
    services.delete_service(kube, "echo")
    asked = set()
    for request in api.requests():
        verb, path = request.split(" ")
        _, _, inside = path.partition("/namespaces/default/")
        resource, _, name = inside.partition("/")
        resource += "/log" if name.endswith("/log") else ""
        verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "GET": "get" if name else "list"}
        asked.add((verbs[verb], resource))
    assert {resource for _, resource in asked} >= {"rayjobs", "rayservices", "configmaps", "pods", "pods/log", "events"}
    assert asked <= may
