"""Jobs and services as a person handles them, from the command line over HTTP to the objects: states that say why, and exit codes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_jobs import JOB
from kube import check
from typer.testing import CliRunner, Result

from danlu import traces
from danlu.cli import app
from danlu.errors import ClusterError, SpecError
from danlu.k8s import client
from danlu.k8s.kubeconfig import Kube, connect
from danlu.remote import jobs
from danlu.spec.files import dump, parse
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

SERVICE = Service.model_validate(
    {"name": "echo", "engine": {"kind": "echo"}, "autoscaling": {"max_replicas": 2}, "cluster": {"image": "registry/danlu:1"}}
)


def danlu(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(dump(JOB))
    return str(tmp_path / "job.yaml")


@pytest.fixture
def service_file(tmp_path: Path) -> str:
    (tmp_path / "service.yaml").write_text(dump(SERVICE))
    return str(tmp_path / "service.yaml")


@pytest.fixture
def submitted(api: Any) -> Kube:
    kube = connect()
    jobs.submit(kube, JOB)
    return kube


def pod(name: str, container: str = "ray-worker", **status: Any) -> dict[str, Any]:
    """Fields of a pod of the job."""
    limits = {"cpu": "1", "memory": "16Gi", "nvidia.com/gpu": "1"}
    return {
        "metadata": {"labels": {"danlu.ai/kind": "train", "danlu.ai/name": "topics", "ray.io/node-type": "worker"}},
        "spec": {
            "containers": [{"name": container, "resources": {"limits": limits}}],
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100"},
        },
        "status": status,
    }


def waiting(reason: str, message: str) -> list[dict[str, Any]]:
    return [{"name": "ray-worker", "image": "registry/danlu:1", "state": {"waiting": {"reason": reason, "message": message}}}]


def unscheduled(message: str) -> list[dict[str, Any]]:
    return [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]


# Submitting.


def test_a_job_is_submitted_with_its_spec_which_it_owns(api: Any, job_file: str) -> None:
    result = danlu("train", job_file, "--on", "k8s", "--set", "max_steps=7")
    assert result.exit_code == 0, result.output
    assert "topics is submitted to here, namespace default" in result.output
    made, spec = api.get("rayjobs", "topics"), api.get("configmaps", "topics-spec")
    (owner,) = spec["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("RayJob", made["metadata"]["uid"])
    assert parse(TrainJob, spec["data"]["job.yaml"]) == JOB.model_copy(update={"max_steps": 7})


def test_a_trace_goes_on_from_the_submission_in_the_jobs_driver(
    api: Any, job_file: str, spans: Callable[[], dict[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From there to its first step: test_logs.py."""
    assert danlu("train", job_file, "--on", "k8s").exit_code == 0
    (submit,) = spans()["submit"]
    assert (submit.kind.name, submit.attributes["danlu.train_job"], submit.parent) == ("CLIENT", "topics", None)
    made = api.get("rayjobs", "topics")
    # Ray starts the driver with this environment: danlu.train's `job` is then a child of the submission.
    (name, parent), *others = yaml.safe_load(made["spec"]["runtimeEnvYAML"])["env_vars"].items()
    assert (name, others) == ("TRACEPARENT", [])
    assert parent.split("-")[1:3] == [f"{submit.context.trace_id:032x}", f"{submit.context.span_id:016x}"]
    monkeypatch.setenv(name, parent)
    with traces.span("job", carrier=traces.from_environment()):
        pass
    (job,) = spans()["job"]
    assert (job.context.trace_id, job.parent.span_id) == (submit.context.trace_id, submit.context.span_id)


def test_a_job_of_an_untraced_submission_is_started_with_no_environment_of_its_own(api: Any, submitted: Kube) -> None:
    assert "runtimeEnvYAML" not in api.get("rayjobs", "topics")["spec"]


def test_a_job_whose_name_is_taken_is_refused_and_the_other_stays(api: Any, submitted: Kube, job_file: str) -> None:
    before = api.get("configmaps", "topics-spec")
    result = danlu("train", job_file, "--on", "k8s", "--set", "max_steps=7")
    assert isinstance(result.exception, ClusterError)
    assert "a job named 'topics' already (starting)" in str(result.exception)
    assert "danlu jobs resume topics" in result.exception.fix
    assert api.get("configmaps", "topics-spec") == before


def test_a_job_without_its_spec_is_not_left_behind(api: Any) -> None:
    api.answer("patch", 403, {"reason": "Forbidden", "message": "no configmaps for you"})
    with pytest.raises(ClusterError, match="no configmaps for you") as refused:
        jobs.submit(connect(), JOB)
    assert "the right to patch configmaps" in refused.value.fix
    assert api.get("rayjobs", "topics") is None


def test_the_server_is_asked_and_makes_nothing_in_a_dry_run(api: Any, job_file: str, service_file: str) -> None:
    assert "here would take ConfigMap topics-spec, RayJob topics" in danlu("train", job_file, "--on", "k8s", "--dry-run=server").output
    assert "here would take RayService echo" in danlu("serve", service_file, "--on", "k8s", "--dry-run=server").output
    assert api.do(lambda handler: len(handler.store)) == 0


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--on", "gcp"], "--on"),
        (["--dry-run=server"], "--dry-run"),
        (["--context", "x"], "--context"),
        (["--on", "k8s", "--fresh"], "--fresh"),
        (["--on", "k8s", "--dry-run=client"], "--dry-run"),
    ],
)
def test_an_option_without_effect_is_refused(options: list[str], where: str, job_file: str) -> None:
    result = danlu("train", job_file, *options)
    assert isinstance(result.exception, SpecError)
    assert result.exception.where == where


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"data": {"train": "/home/me/t.csv"}}, "data.train"),
        ({"data": {"train": ["s3://b/t.csv"], "test": "./t.csv"}}, "data.test"),
        ({"model": {"model_name_or_path": "~/model"}}, "model.model_name_or_path"),
    ],
)
def test_files_of_this_machine_are_refused_before_pods_look_for_them(change: dict[str, Any], where: str) -> None:
    with pytest.raises(SpecError, match="is on this machine") as refused:
        jobs.check_reachable(TrainJob.model_validate(JOB.model_dump() | change))
    assert refused.value.where == where


# What it is doing, and why.


STARTING: dict[str, tuple[dict[str, Any], str, str]] = {
    "no pods": ({}, "KubeRay has made no pods yet", ""),
    "an image": (
        {"phase": "Pending", "containerStatuses": waiting("ImagePullBackOff", "401 Unauthorized")},
        "pod w-0 cannot pull the image registry/danlu:1: 401 Unauthorized",
        "cluster.image_pull_secrets",
    ),
    "no such GPU": (
        {"phase": "Pending", "conditions": unscheduled("0/9 nodes are available: 9 node(s) didn't match Pod's node affinity/selector.")},
        "pod w-0 fits no node",
        "no node has nvidia.com/gpu.product=NVIDIA-H100",
    ),
    "no free GPU": (
        {"phase": "Pending", "conditions": unscheduled("0/9 nodes are available: 9 Insufficient nvidia.com/gpu.")},
        "9 Insufficient nvidia.com/gpu",
        "wait for nodes with a GPU that is free",
    ),
    "no memory": (
        {"phase": "Pending", "conditions": unscheduled("0/9 nodes are available: 9 Insufficient memory.")},
        "9 Insufficient memory",
        "16Gi",
    ),
    "a taint": (
        {"phase": "Pending", "conditions": unscheduled("0/1 nodes are available: 1 node(s) had untolerated taint {team: a}.")},
        "untolerated taint",
        "cluster.tolerations",
    ),
    "a taint or another GPU": (
        {
            "phase": "Pending",
            "conditions": unscheduled(
                "0/4 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
                "1 node(s) had untolerated taint {gpu: h100}, 2 node(s) didn't match Pod's node affinity/selector."
            ),
        },
        "fits no node",
        "no node has nvidia.com/gpu.product=NVIDIA-H100, unless those with the taint gpu: h100 do, which cluster.tolerations allows",
    ),
    "a claim": (
        {"phase": "Pending", "conditions": unscheduled('0/1 nodes are available: persistentvolumeclaim "c" not found.')},
        'persistentvolumeclaim "c" not found',
        "cluster.volumes",
    ),
    "a secret": (
        {"phase": "Pending", "containerStatuses": waiting("CreateContainerConfigError", 'secret "hub" not found')},
        'secret "hub" not found',
        "cluster.secret_env",
    ),
    "a crash": (
        {"phase": "Running", "containerStatuses": waiting("CrashLoopBackOff", "back-off 5m0s")},
        "starts and ends again",
        "kubectl logs w-0 -n default --previous",
    ),
    "time": ({"phase": "Pending"}, "1 of 1 pods are not up yet", ""),
}


@pytest.mark.parametrize("name", STARTING)
def test_a_job_that_does_not_start_says_what_it_waits_for(name: str, api: Any, submitted: Kube) -> None:
    status, why, fix = STARTING[name]
    if status:
        api.put("pods", "w-0", **pod("w-0", **status))
    found = jobs.status(submitted, "topics")
    assert found.state == "starting"
    assert why in found.why
    assert fix in found.fix


def test_a_volume_that_cannot_be_mounted_is_told_by_its_event(api: Any, submitted: Kube) -> None:
    api.put("pods", "w-0", **pod("w-0", phase="Pending"))
    api.put("events", "e", involvedObject={"name": "w-0"}, reason="FailedMount", message='configmap "topics-spec" not found')
    assert 'pod w-0: configmap "topics-spec" not found' in jobs.status(submitted, "topics").why


def test_a_queued_job_says_which_quota_it_waits_for(api: Any) -> None:
    kube = connect()
    cluster = {"image": "i", "scheduler": {"kind": "kueue", "queue": "research"}}
    jobs.submit(kube, TrainJob.model_validate(JOB.model_dump() | {"cluster": cluster}))
    assert jobs.status(kube, "topics").why == "waiting in queue research"
    message = "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu in flavor a100, 8 more needed"
    api.put(
        "workloads",
        "w",
        metadata={"ownerReferences": [{"uid": api.get("rayjobs", "topics")["metadata"]["uid"]}]},
        status={"conditions": [{"type": "QuotaReserved", "status": "False", "message": message}]},
    )
    found = jobs.status(kube, "topics")
    assert found.state == "queued"
    assert found.why == f"behind the quota in queue research: {message}"


LOG = """\
  step 39/155  loss 0.4412  lr 1.2e-04
  step 40/155  loss 0.4312  lr 1.2e-04
error: workers: a training worker was lost (rank 3): its machine ran out of memory
  try: a smaller micro_batch_size; the same command goes on from the last checkpoint
"""


def failed(api: Any) -> None:
    """The job has failed as one does whose worker was killed for its memory."""
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    api.put("pods", "w-0", **pod("w-0", phase="Running", containerStatuses=[{"name": "ray-worker", "state": {}, "lastState": killed}]))
    api.put("pods", "topics-x", **pod("topics-x", "ray-job-submitter", phase="Failed"))
    api.answer("get /api/v1/namespaces/default/pods/topics-x/log", LOG.encode())
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "Job entrypoint command failed"}
    api.put("rayjobs", "topics", status=status)


def test_a_failed_job_says_which_rank_what_limit_which_step_and_its_last_lines(api: Any, submitted: Kube) -> None:
    failed(api)
    result = danlu("jobs", "show", "topics")
    assert result.exit_code == 0
    assert "left: s3://b/runs/runs/topics" in result.output
    for told in ("failed", "rank 3", "more than 16Gi of memory", "after step 40/155", "larger cluster.memory", "| error: workers:"):
        assert told in result.output, told
    assert json.loads(danlu("jobs", "show", "topics", "--json").output)["state"] == "failed"


@pytest.mark.parametrize(
    ("status", "state", "why"),
    [
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", ""),
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, "running", "it has ended (SUCCEEDED), and its log is being closed"),
        ({"jobDeploymentStatus": "Retrying", "failed": 1}, "retrying", "attempt 2 of 1"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "succeeded", ""),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "cancelled", "stopped"),
        ({"jobDeploymentStatus": "Suspended"}, "starting", "it was suspended, and goes on"),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "m"}, "failed", "cluster.active_deadline_s"),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "bad"}, "failed", "KubeRay refuses it: bad"),
    ],
)
def test_every_state_of_kuberays_has_one_of_ours(status: dict[str, Any], state: str, why: str, api: Any, submitted: Kube) -> None:
    api.put("rayjobs", "topics", status=status)
    found = jobs.status(submitted, "topics")
    assert found.state == state
    assert why in found.why
    assert f"{state}" in danlu("jobs", "list").output


def test_an_unknown_job_is_answered_with_those_there_are(api: Any, submitted: Kube) -> None:
    for command in ("show", "wait", "cancel", "resume", "delete", "logs"):
        result = danlu("jobs", command, "topic")
        assert isinstance(result.exception, ClusterError), command
        assert "no job named 'topic' in namespace default; there is: topics" in str(result.exception)
        assert result.exception.fix.startswith("did you mean topics? Else --namespace or --context")
    assert isinstance(danlu("jobs", "logs", "-f", "topic").exception, ClusterError), "it does not end as if there were nothing to follow"


def test_the_name_that_was_meant_comes_first_of_many(api: Any, submitted: Kube) -> None:
    for number in range(12):
        jobs.submit(submitted, JOB.model_copy(update={"name": f"another-{number:02}"}))
    told = danlu("jobs", "show", "topcis").exception
    assert isinstance(told, ClusterError)
    assert "; there is: topics, another-00, " in told.problem
    assert told.problem.endswith(" and 5 more")
    assert danlu("jobs", "show", "other-1").exception.fix.startswith("did you mean another-10?")  # type: ignore[union-attr]
    assert danlu("jobs", "show", "sentiment").exception.fix.startswith("--namespace"), "nothing like it is there"  # type: ignore[union-attr]


def test_a_rayjob_that_is_not_danlus_is_left_alone(api: Any, submitted: Kube) -> None:
    api.put("rayjobs", "etl", metadata={"labels": {"team": "data"}}, spec={})
    for command in ("show", "wait", "cancel", "resume", "delete", "logs"):
        told = danlu("jobs", command, "etl").exception
        assert isinstance(told, ClusterError)
        assert "no job named 'etl' in namespace default, but a RayJob that is not Danlu's; there is: topics" in told.problem
    assert api.get("rayjobs", "etl")["spec"] == {}


def test_what_outlives_the_pods_of_a_job_is_told_with_its_storage(api: Any, submitted: Kube) -> None:
    api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    assert danlu("jobs", "show", "topics").output.splitlines() == [
        "topics: succeeded",
        "  try: danlu jobs show topics --on local --storage s3://b/runs reads its record",
        "  left: s3://b/runs/runs/topics",
    ]
    result = danlu("jobs", "logs", "topics")
    assert isinstance(result.exception, ClusterError)
    assert "no log any more" in result.exception.problem
    assert result.exception.fix.startswith("danlu jobs logs topics --on local --storage s3://b/runs")


# Following, waiting, cancelling, resuming.


def test_waiting_ends_with_the_job_and_with_an_exit_code_that_says_how(api: Any, submitted: Kube) -> None:
    assert danlu("jobs", "wait", "topics", "--timeout", "0.1").exit_code == 124
    threading.Timer(0.2, failed, (api,)).start()
    result = danlu("jobs", "wait", "topics")
    assert result.exit_code == 1
    assert "rank 3" in result.output
    for status, code in (("SUCCEEDED", 0), ("STOPPED", 130)):
        api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Complete", "jobStatus": status})
        assert danlu("jobs", "wait", "topics").exit_code == code


def test_a_log_is_followed_over_retries_until_the_end(api: Any, submitted: Kube) -> None:
    def put_try(number: int) -> None:
        name = f"topics-{number}"
        api.answer(f"get /api/v1/namespaces/default/pods/{name}/log", f"try {number}\n".encode())
        fields = pod(name, "ray-job-submitter", phase="Succeeded")
        fields["metadata"]["creationTimestamp"] = f"2026-11-25T00:00:0{number}Z"
        api.put("pods", name, **fields)

    put_try(1)
    api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Retrying", "failed": 1})

    def second() -> None:
        put_try(2)
        api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})

    threading.Timer(0.2, second).start()
    assert danlu("jobs", "logs", "-f", "topics").output.splitlines() == ["try 1", "try 2"]


def test_a_try_whose_pod_goes_while_it_is_followed_does_not_end_the_log(api: Any, submitted: Kube) -> None:
    api.put("pods", "topics-x", **pod("topics-x", "ray-job-submitter", phase="Running"))
    gone = {"reason": "NotFound", "message": 'pods "topics-x" not found'}
    api.answer("get /api/v1/namespaces/default/pods/topics-x/log", 404, gone)
    ended = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    threading.Timer(0.2, lambda: api.put("rayjobs", "topics", status=ended)).start()
    assert list(jobs.logs(submitted, "topics", follow=True)) == []
    with pytest.raises(client.Refused, match="not found"):
        list(jobs.logs(submitted, "topics", follow=False))


def test_a_job_that_has_no_log_yet_says_why(api: Any, submitted: Kube) -> None:
    result = danlu("jobs", "logs", "topics")
    assert isinstance(result.exception, ClusterError)
    assert "has written no log: it is starting, KubeRay has made no pods yet" in str(result.exception)


def test_a_cancelled_job_is_suspended_and_resumed(api: Any, submitted: Kube) -> None:
    assert "is cancelled; danlu jobs resume topics" in danlu("jobs", "cancel", "topics").output
    assert api.get("rayjobs", "topics")["spec"]["suspend"] is True
    assert jobs.status(submitted, "topics").state == "cancelled"
    assert danlu("jobs", "resume", "topics").exit_code == 0
    assert api.get("rayjobs", "topics")["spec"]["suspend"] is False
    result = danlu("jobs", "resume", "topics")
    assert isinstance(result.exception, ClusterError)
    assert "is starting already" in str(result.exception)


def test_a_job_that_ends_while_it_is_cancelled_has_ended(api: Any, submitted: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = client.patch

    def ends_first(*arguments: Any) -> Any:
        api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
        return patch(*arguments)

    monkeypatch.setattr(client, "patch", ends_first)
    assert danlu("jobs", "cancel", "topics").output == "topics has ended already: succeeded\n"
    assert "suspend" not in api.get("rayjobs", "topics")["spec"]


def test_a_failed_job_is_made_anew_from_the_spec_it_had(api: Any, submitted: Kube) -> None:
    failed(api)
    before = api.get("rayjobs", "topics")["metadata"]["uid"]
    assert danlu("jobs", "resume", "topics").exit_code == 0
    job = api.get("rayjobs", "topics")
    assert job["metadata"]["uid"] != before
    assert "status" not in job
    assert parse(TrainJob, api.get("configmaps", "topics-spec")["data"]["job.yaml"]) == JOB


def test_a_queued_job_is_cancelled_by_deletion_since_suspending_is_the_queues(api: Any) -> None:
    kube = connect()
    cluster = {"image": "i", "scheduler": {"kind": "kueue", "queue": "research"}}
    jobs.submit(kube, TrainJob.model_validate(JOB.model_dump() | {"cluster": cluster}))
    assert "is deleted" in jobs.cancel(kube, "topics")
    assert api.get("rayjobs", "topics") is None


def test_delete_deletes(api: Any, submitted: Kube) -> None:
    assert "what it stored stays" in danlu("jobs", "delete", "topics").output
    assert api.get("rayjobs", "topics") is None
    none = danlu("jobs", "list")
    assert (none.stdout, none.stderr) == ("", "there are none in namespace default of context here\n")


# Services.


def test_a_service_is_deployed_scaled_and_rolled_back(api: Any, service_file: str) -> None:
    def deployed() -> Service:
        one = api.get("rayservices", "echo")
        check({key: value for key, value in one.items() if key != "status"} | {"metadata": {"name": "echo"}})
        (application,) = yaml.safe_load(one["spec"]["serveConfigV2"])["applications"]
        return Service.model_validate(application["args"])

    first = danlu("serve", service_file, "--on", "k8s").output
    assert "new: it answers once its pods are up" in first
    assert "echo is deployed to here" in first
    assert "kubectl port-forward service/echo-serve-svc 8000 --namespace default  " in first
    again = danlu("serve", service_file, "--on", "k8s", "--set", "cluster.image=registry/danlu:2")
    assert "new cluster: a second set of pods takes over once it is ready; at least 1 more pod than now" in again.output
    assert "new cluster: a second set of pods" in danlu("services", "rollback", "echo").output
    asked = danlu("serve", service_file, "--on", "k8s", "--dry-run=server", "--set", "cluster.image=registry/danlu:3").output
    assert "new cluster: a second set of pods" in asked
    told = danlu("services", "scale", "echo", "--max", "5").output.splitlines()
    assert told[0] == "echo has 1 to 5 replicas"
    assert told[1].endswith("on those there are; 1 to 5 pods instead of 1 to 2")
    assert deployed().autoscaling.max_replicas == 5
    assert api.get("rayservices", "echo")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] == 5
    assert danlu("services", "rollback", "echo").exit_code == 0
    assert deployed().autoscaling.max_replicas == 2
    assert danlu("services", "rollback", "echo").exit_code == 0
    assert deployed().autoscaling.max_replicas == 5, "back and forth"
    result = danlu("services", "scale", "echo", "--min", "9")
    assert isinstance(result.exception, SpecError)
    assert "min_replicas=9 is more than max_replicas=5" in str(result.exception)
    assert danlu("services", "delete", "echo").exit_code == 0
    assert danlu("services", "list").stdout == ""


def test_a_service_that_was_deployed_once_has_nothing_to_go_back_to(api: Any, service_file: str) -> None:
    assert danlu("serve", service_file, "--on", "k8s").exit_code == 0
    assert danlu("serve", service_file, "--on", "k8s").exit_code == 0
    result = danlu("services", "rollback", "echo")
    assert isinstance(result.exception, ClusterError)
    assert "was deployed once only" in str(result.exception)


@pytest.mark.parametrize(
    ("status", "phase", "why"),
    [
        ({}, "starting", "no pods yet"),
        ({"conditions": [{"type": "Ready", "status": "True"}], "numServeEndpoints": 2}, "running", ""),
        ({"conditions": [{"type": "UpgradeInProgress", "status": "True"}], "numServeEndpoints": 2}, "updating", "no pods yet"),
        (
            {
                "conditions": [{"type": "Ready", "status": "True"}],
                "pendingServiceStatus": {"applicationStatuses": {"echo": {"status": "DEPLOY_FAILED", "message": "stack\nno such bundle"}}},
            },
            "failing",
            "echo: no such bundle",
        ),
    ],
)
def test_a_service_says_whether_it_answers(status: dict[str, Any], phase: str, why: str, api: Any, service_file: str) -> None:
    danlu("serve", service_file, "--on", "k8s")
    api.put("rayservices", "echo", status=status)
    found = json.loads(danlu("services", "show", "echo", "--json").output)
    assert found["phase"] == phase
    assert why in found["why"]
    assert found["endpoints"] == status.get("numServeEndpoints", 0)
