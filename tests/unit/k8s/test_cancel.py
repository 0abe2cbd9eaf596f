"""Whatever a job's cleanup, and however it was stopped: its pods are let go, and it goes on from there."""

from __future__ import annotations

from typing import Any

import pytest
from k8s_jobs import JOB
from kube import crd_errors
from test_remote import danlu

from danlu.k8s.kubeconfig import Kube, connect
from danlu.remote import jobs
from danlu.spec.train import TrainJob

CLEANUPS: dict[str, dict[str, Any]] = {
    "a day": {"kind": "ttl", "ttl_seconds_after_finished": 86_400},
    "rules": {"kind": "rules", "after_success_s": 60, "workers_after_failure_s": 120},
}
STOPPED = {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}


@pytest.fixture(params=CLEANUPS)
def kube(request: pytest.FixtureRequest, api: Any) -> Kube:
    found = connect()
    jobs.submit(found, job(request.param))
    return found


def job(cleanup: str) -> TrainJob:
    assert JOB.cluster is not None
    return TrainJob.model_validate(JOB.model_dump() | {"cluster": JOB.cluster.model_dump() | {"cleanup": CLEANUPS[cleanup]}})


def spec(api: Any) -> dict[str, Any]:
    """The RayJob's, as KubeRay takes it: ValidateRayJobSpec's rules of what goes with what, and the CRD's."""
    one = api.get("rayjobs", "topics")
    assert not crd_errors({name: part for name, part in one.items() if name != "status"})
    found: dict[str, Any] = one["spec"]
    rules = "deletionStrategy" in found
    assert found["shutdownAfterJobFinishes"] is not rules, "rules and a time to live exclude each other"
    assert not (found.get("suspend") and rules), "KubeRay suspends no job with rules"
    assert not (rules and found.get("ttlSecondsAfterFinished")), "and no time to live stands beside rules"
    return found


def test_a_cancelled_job_is_suspended_under_every_cleanup_and_resumed_as_it_was(api: Any, kube: Kube) -> None:
    before = spec(api)
    api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"})
    assert "is cancelled; danlu jobs resume topics" in danlu("jobs", "cancel", "topics").output
    assert spec(api)["suspend"] is True
    assert (found := jobs.status(kube, "topics")).state == "cancelled"
    assert found.why == "its pods are being ended"
    api.put("rayjobs", "topics", status={"jobDeploymentStatus": "Suspended", "jobStatus": ""})
    assert jobs.status(kube, "topics").why == "it is suspended"
    assert jobs.cancel(kube, "topics") == "topics has ended already: cancelled"
    assert danlu("jobs", "resume", "topics").exit_code == 0
    assert spec(api) == {**before, "suspend": False}
    assert jobs.wait(kube, "topics", timeout_s=0.1) is None, "it goes on, whatever KubeRay has seen of that by now"
    assert jobs.status(kube, "topics").why == "it was suspended, and goes on"
    assert jobs.RULES not in api.get("rayjobs", "topics")["metadata"]["annotations"]


def test_a_job_that_was_stopped_through_ray_lets_its_pods_go(api: Any, kube: Kube) -> None:
    """By its time to live, or, where KubeRay has no rule for that, once it is cancelled, which `show` and `wait` say."""
    api.put("rayjobs", "topics", status=STOPPED)
    stays = "deletionStrategy" in spec(api)
    shown = danlu("jobs", "wait", "topics")
    assert shown.exit_code == 130
    assert ("its pods stay" in shown.output) is stays
    assert ("danlu jobs cancel topics lets them go" in shown.output) is stays
    told = jobs.cancel(kube, "topics")
    assert told.startswith("topics was stopped on its Ray cluster, and its pods go now" if stays else "topics has ended already: cancelled")
    after = spec(api)
    assert after["shutdownAfterJobFinishes"] is True
    assert after["ttlSecondsAfterFinished"] == (0 if stays else 86_400)
    assert not after.get("suspend"), "a job that has ended is not suspended"
    assert jobs.status(kube, "topics").why == "it was stopped on its Ray cluster"
    assert jobs.cancel(kube, "topics") == "topics has ended already: cancelled"


def test_a_job_that_was_stopped_and_cancelled_goes_on_with_its_rules(api: Any, kube: Kube) -> None:
    before = spec(api)
    api.put("rayjobs", "topics", status=STOPPED)
    jobs.cancel(kube, "topics")
    assert jobs.resume(kube, "topics") == "topics goes on"
    assert spec(api) == before
    assert "status" not in api.get("rayjobs", "topics")
