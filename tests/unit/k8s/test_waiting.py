"""What keeps pods from being made, and what is no trouble of theirs: the words of a job or a service that waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from k8s_jobs import JOB
from test_remote import SERVICE, danlu, pod, waiting

from danlu.errors import ClusterError
from danlu.k8s import client
from danlu.k8s.kubeconfig import Kube, connect
from danlu.remote import jobs, services
from danlu.spec.files import dump

QUOTA = 'pods "topics-head" is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu=8, used: 12, limited: 16'
EARLY, LATE = "2026-11-25T00:00:01Z", "2026-11-25T00:00:09Z"


@pytest.fixture
def kube(api: Any) -> Kube:
    """A job and a service of one name, each with its Ray cluster, of which no pod is there."""
    found = connect()
    jobs.submit(found, JOB)
    services.deploy(found, SERVICE.model_copy(update={"name": "topics"}))
    api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Initializing", "rayClusterName": "topics-abcde"})
    api.put("rayservices", "topics", status={"pendingServiceStatus": {"rayClusterName": "topics-vwxyz"}})
    return found


def told(api: Any, name: str, message: str, *, kind: str = "RayCluster", reason: str = "FailedToCreateHeadPod", time: str = EARLY) -> None:
    """An event as KubeRay or the Job's controller writes it."""
    about = {"kind": kind, "name": name}
    api.put("events", f"{name}.{reason.lower()}", involvedObject=about, reason=reason, message=message, lastTimestamp=time)


@pytest.mark.parametrize(
    ("message", "why", "fix"),
    [
        (QUOTA, f"behind the namespace's quota: {QUOTA}", "kubectl describe resourcequota"),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "its pods cannot be made: pods", "Pod Security"),
        (
            'pods "x" is forbidden: no PriorityClass with name high was found',
            "no PriorityClass with name high",
            "kubectl get priorityclasses",
        ),
        (
            'pods "x" is forbidden: error looking up service account default/d: serviceaccount "d" not found',
            "serviceaccount",
            "access.serv",
        ),
        ("failed quota: team: must specify requests.cpu", "must specify requests.cpu", "a LimitRange"),
        ("a webhook is down", "its pods cannot be made: a webhook is down", ""),
    ],
)
def test_a_pod_that_cannot_be_made_is_told_with_what_forbids_it(message: str, why: str, fix: str, api: Any, kube: Kube) -> None:
    told(api, "topics-abcde", message)
    found = jobs.status(kube, "topics")
    assert (found.state, why in found.why, fix in found.fix) == ("starting", True, True), found
    assert "KubeRay has made no pods yet" in services.service(kube, "topics").why, "the event is of the job's cluster"
    told(api, "topics-vwxyz", message)
    assert why in services.service(kube, "topics").why


def test_workers_that_cannot_be_made_are_told_beside_a_head_that_was_and_not_once_they_are(api: Any, kube: Kube) -> None:
    def put(name: str, made: str) -> None:
        fields = pod(name, phase="Running")
        fields["metadata"]["creationTimestamp"] = made
        api.put("pods", name, **fields)

    put("topics-head", EARLY)
    told(api, "topics-abcde", QUOTA, reason="FailedToCreateWorkerPod", time=LATE)
    assert "behind the namespace's quota" in jobs.status(kube, "topics").why
    put("topics-worker", "2026-11-25T00:00:10Z")
    assert jobs.status(kube, "topics").why == "all 2 pods are up"


def test_a_submitter_that_cannot_be_made_and_a_spec_that_kuberay_refuses_are_told(api: Any, kube: Kube) -> None:
    told(api, "topics", QUOTA, kind="Job", reason="FailedCreate")
    assert "behind the namespace's quota" in jobs.status(kube, "topics").why
    told(api, "topics", "RayService name should be no more than 47 characters", kind="RayService", reason="InvalidRayServiceMetadata")
    assert services.service(kube, "topics").why.startswith("KubeRay refuses it: RayService name")


def test_a_job_and_a_service_of_one_name_are_told_apart(api: Any, kube: Kube) -> None:
    fields = pod("s-0", phase="Pending", containerStatuses=waiting("ImagePullBackOff", "401 Unauthorized"))
    fields["metadata"]["labels"]["danlu.ai/kind"] = "serve"
    api.put("pods", "s-0", **fields)
    assert "cannot pull the image" in services.service(kube, "topics").why
    assert jobs.status(kube, "topics").why == "KubeRay has made no pods yet"


def test_a_job_that_is_being_deleted_says_so_also_to_one_of_its_name(api: Any, kube: Kube) -> None:
    api.put("rayjobs", "topics", metadata={"deletionTimestamp": LATE}, status={"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"})
    assert "topics: cancelled, it is being deleted" in danlu("jobs", "show", "topics").output
    with pytest.raises(ClusterError, match="already \\(being deleted\\)") as refused:
        jobs.submit(kube, JOB)
    assert refused.value.fix == "once more in a moment"


def test_a_suspended_job_that_is_being_deleted_is_made_anew_by_resume(api: Any, kube: Kube) -> None:
    before = api.put("rayjobs", "topics", metadata={"deletionTimestamp": LATE}, spec={"suspend": True})["metadata"]["uid"]
    assert jobs.resume(kube, "topics") == "topics goes on"
    job = api.get("rayjobs", "topics")
    assert (job["metadata"]["uid"] != before, "suspend" in job["spec"]) == (True, False)


def test_what_kuberay_has_never_looked_at_says_why_that_may_be(api: Any, kube: Kube) -> None:
    jobs.submit(kube, JOB.model_copy(update={"name": "unseen"}))
    services.deploy(kube, SERVICE.model_copy(update={"name": "unseen"}))
    assert "KubeRay's operator does not run" in jobs.status(kube, "unseen").fix
    assert "KubeRay's operator does not run" in services.service(kube, "unseen").fix
    assert (jobs.status(kube, "topics").fix, services.service(kube, "topics").fix) == ("", "")


def test_a_gang_that_waits_for_its_queue_is_not_said_to_fit_no_node(api: Any, kube: Kube) -> None:
    unready = [{"type": "PodScheduled", "status": "False", "message": "pod group is not ready, 1 Pending, 9 minAvailable"}]
    worker = pod("w-0", phase="Pending", conditions=unready)
    worker["spec"]["schedulerName"] = "volcano"
    api.put("pods", "w-0", **worker)
    assert jobs.status(kube, "topics").why == "pod w-0 is not started by volcano yet: pod group is not ready, 1 Pending, 9 minAvailable"


@pytest.mark.parametrize("available", [False, True])
def test_an_incremental_upgrade_needs_the_gateway_api(available: bool, api: Any, tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text(dump(SERVICE))
    if available:
        api.answer("get /apis/gateway.networking.k8s.io", {"kind": "APIGroup"})
    asked = ("serve", str(tmp_path / "service.yaml"), "--on", "k8s", "--set", "cluster.upgrade={kind: incremental, gateway_class: istio}")
    for more in ((), ("--dry-run=server",)):
        told = danlu(*asked, *more)
        if available:
            assert told.exit_code == 0, told.output
            continue
        assert isinstance(told.exception, ClusterError)
        assert (told.exception.where, "Gateway API" in told.exception.problem) == ("cluster.upgrade.kind", True)
        assert "new_cluster" in told.exception.fix
        assert api.get("rayservices", "echo") is None


@pytest.mark.parametrize("answer", ["lost", "an error"])
def test_a_job_that_was_made_without_an_answer_gets_its_spec(answer: str, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = connect()
    ask, lost = kube.api.rest_client.request, []

    def request(method: str, *arguments: Any, **options: Any) -> Any:
        found = ask(method, *arguments, **options)
        if method == "POST" and not lost:
            lost.append(method)
            if answer == "lost":
                raise ConnectionResetError("reset by peer")
            api.answer("post", 504, {"message": "etcdserver: request timed out"}, times=1)
            return ask(method, *arguments, **options)
        return found

    monkeypatch.setattr(kube.api.rest_client, "request", request)
    jobs.submit(kube, JOB)
    made = api.get("rayjobs", "topics")
    (owner,) = api.get("configmaps", "topics-spec")["metadata"]["ownerReferences"]
    assert owner["uid"] == made["metadata"]["uid"]
    with pytest.raises(ClusterError, match="a job named 'topics' already \\(starting\\)"):
        jobs.submit(kube, JOB)


def test_a_namespace_that_is_not_there_is_said(api: Any) -> None:
    status = {"reason": "NotFound", "message": 'namespaces "reserch" not found', "details": {"kind": "namespaces", "name": "reserch"}}
    api.answer("post", 404, status)
    with pytest.raises(client.Refused, match='namespaces "reserch" not found') as refused:
        jobs.submit(connect(namespace="reserch"), JOB)
    assert "kubectl create namespace" in refused.value.fix


def cluster(api: Any, name: str, **group: int) -> None:
    api.put("rayclusters", name, spec={"workerGroupSpecs": [{"groupName": "workers", **group}]})


def test_a_service_that_is_scaled_has_its_pods_at_once_as_kuberay_gives_them_to_new_clusters_only(api: Any) -> None:
    """https://github.com/ray-project/kuberay/issues/4568"""
    kube = connect()
    services.deploy(kube, SERVICE)
    cluster(api, "echo-abcde", replicas=2, minReplicas=1, maxReplicas=2)
    api.put("rayservices", "echo", status={"activeServiceStatus": {"rayClusterName": "echo-abcde"}})
    spec, how = services.scale(kube, "echo", min_replicas=2, max_replicas=6)
    assert (spec.autoscaling.max_replicas, how.endswith("; 2 to 6 pods instead of 1 to 2")) == (6, True)
    (group,) = api.get("rayclusters", "echo-abcde")["spec"]["workerGroupSpecs"]
    assert group == {"groupName": "workers", "replicas": 2, "minReplicas": 2, "maxReplicas": 6}, "how many there are is the autoscaler's"
    before = len(api.requests("PATCH"))
    assert services.deploy(kube, spec) == "as it was"
    assert len(api.requests("PATCH")) == before + 1, "nothing more than the apply"
    cluster(api, "echo-abcde", replicas=2, minReplicas=1, maxReplicas=2)
    services.deploy(kube, spec)
    assert api.get("rayclusters", "echo-abcde")["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 6, "what was not done is done then"
    # Other pods come as a new cluster, and the old one is left as it is.
    services.deploy(kube, spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"image": "registry/danlu:2"})}))  # type: ignore[union-attr]
    services.rollback(kube, "echo")
    fixed = {"min_replicas": 3, "max_replicas": 3}
    services.deploy(kube, spec.model_copy(update={"autoscaling": type(spec.autoscaling)(**fixed)}))
    assert api.get("rayclusters", "echo-abcde")["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 6
