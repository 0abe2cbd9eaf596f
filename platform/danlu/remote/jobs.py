"""Jobs on Kubernetes: submit, list, show, follow, wait, cancel, resume, delete."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from danlu import traces
from danlu.errors import ClusterError, DanluError, SpecError
from danlu.k8s.manifests import render
from danlu.k8s.pods import KIND, Object
from danlu.k8s.rayjob import SPEC_FILE, config_map, config_map_name, ray_job
from danlu.k8s.status import ENDED, JobStatus, job_status, keeps_its_pods, queue_of
from danlu.remote.objects import delete_object, find_object, in_its_namespace, pods_of
from danlu.spec.files import parse
from danlu.spec.train import TrainJob

if TYPE_CHECKING:
    from danlu.k8s.kubeconfig import Kube

SUBMISSION = "danlu.ai/submission"
"""Annotation of a RayJob: which call of `submit` has made it."""
RULES = "danlu.ai/deletion-rules"
"""Annotation of a RayJob that was cancelled: its deletion rules, as JSON, for `resume`. KubeRay suspends no job that has some."""
BY_TTL = {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 0, "deletionStrategy": None}
"""Instead of deletion rules: whenever the job has ended, its pods go."""
LOG_TAIL = 200
CONFLICTS = 20
"""How often a job may change between a look at it and its change."""


def check_reachable(job: TrainJob) -> None:
    """SpecError for rows or a model that are files of this machine: pods do not have them."""
    assert job.cluster is not None
    mounts = [volume.mount_path for volume in job.cluster.volumes]
    sources = {"model.model_name_or_path": [job.model.model_name_or_path]}
    for split in ("train", "dev", "test"):
        found = getattr(job.data, split)
        sources[f"data.{split}"] = [found] if isinstance(found, str) else list(found or [])
    for field, paths in sources.items():
        for path in paths:
            if "://" in path or any(path.startswith(f"{mount}/") for mount in mounts):
                continue
            if path.startswith(("/", "./", "../", "~")) or Path(path).exists():
                raise SpecError(
                    f"{path} is on this machine, and the pods are on others",
                    where=field,
                    fix=f"copy it to {mounts[0]}, a volume of the pods" if mounts else "copy it to an object store: s3://bucket/...",
                )


def submit(kube: Kube, job: TrainJob, *, dry_run: bool = False) -> None:
    """Make the RayJob, then its ConfigMap, which it owns: a name that is taken changes nothing."""
    from danlu.k8s import client

    check_reachable(job)
    order = ray_job(job)
    kube = in_its_namespace(kube, order)
    if trace := traces.to_environment(traces.carrier()):
        # The trace goes on in the job's driver, which Ray starts with this environment.
        order["spec"]["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": trace})
    order["metadata"]["annotations"] = {SUBMISSION: uuid.uuid4().hex}
    try:
        made = client.create(kube, order, dry_run=dry_run)
    except ClusterError as error:
        if isinstance(error, client.Refused) and error.reason != "AlreadyExists":
            raise
        made = _made_after_all(kube, order, error)
    spec = config_map(job)
    if not dry_run:
        meta = made["metadata"]
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": job.name, "uid": meta.get("uid", ""), "controller": True}
        spec["metadata"] = {**spec["metadata"], "ownerReferences": [owner]}
    try:
        client.apply(kube, spec, dry_run=dry_run)
    except BaseException:
        if not dry_run:  # else its pods would wait for the spec for ever
            client.delete(kube, "RayJob", job.name)
        raise


def _made_after_all(kube: Kube, order: Object, error: ClusterError) -> Object:
    """The RayJob of an order whose answer got lost, or was an error after the deed; ClusterError if it is not ours, or not there."""
    from danlu.k8s import client

    name, found = order["metadata"]["name"], None
    with suppress(ClusterError):
        found = client.get(kube, "RayJob", name)
    if found is None:
        raise error
    if found["metadata"].get("annotations", {}).get(SUBMISSION) == order["metadata"]["annotations"][SUBMISSION]:
        return found
    deleting = "deletionTimestamp" in found["metadata"]
    fix = f"danlu jobs resume {name} goes on with it; danlu jobs delete {name} makes room; or --set name=..."
    raise ClusterError(
        f"there is a job named {name!r} already ({'being deleted' if deleting else job_status(found).state})",
        where="name",
        fix="once more in a moment" if deleting else fix,
    ) from error


def jobs(kube: Kube) -> list[JobStatus]:
    """Every job of ours in the namespace, by its own status alone."""
    from danlu.k8s import client

    return [job_status(one) for one in client.find(kube, "RayJob", {KIND: "train"})]


def status(kube: Kube, name: str) -> JobStatus:
    """A job's state, and why."""
    return _explained(kube, find_object(kube, "RayJob", name))


def logs(kube: Kube, name: str, *, follow: bool) -> Iterator[str]:
    """Lines of the driver's log. With `follow`, until the job has ended, over its retries."""
    from danlu.k8s import client

    seen: set[str] = set()
    job = find_object(kube, "RayJob", name)
    for one in client.watch(kube, "RayJob", name) if follow else [job]:
        if one is None:
            return
        for pod in _submitters(kube, name):
            if pod["metadata"]["name"] not in seen and pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed"):
                seen.add(pod["metadata"]["name"])
                try:
                    yield from client.pod_log(kube, pod["metadata"]["name"], follow=follow)
                except client.Refused as refused:
                    if not follow or refused.status != 404:  # a try's pod that goes while it is followed: the next one is
                        raise
        if job_status(one).state in ENDED:
            break
    if not seen:
        found = _explained(kube, find_object(kube, "RayJob", name))
        storage = _storage(kube, name) if found.state in ENDED else ""
        raise ClusterError(
            f"{name} has {'no log any more' if storage else 'written no log'}: it is {found.state}{', ' + found.why if found.why else ''}",
            where="jobs logs",
            fix=f"danlu jobs logs {name} --on local --storage {storage}, which outlives its pods" if storage else found.fix,
        )


def wait(kube: Kube, name: str, *, timeout_s: float | None = None) -> JobStatus | None:
    """A job's state once it has ended; None if that took longer than `timeout_s`."""
    from danlu.k8s import client

    find_object(kube, "RayJob", name)
    for one in client.watch(kube, "RayJob", name, timeout_s=timeout_s):
        if one is None:
            raise ClusterError(f"{name} was deleted", where="jobs wait")
        if job_status(one).state in ENDED:
            return _explained(kube, one)
    return None


def cancel(kube: Kube, name: str) -> str:
    """End a job's pods, whatever its cleanup; what there is to say. It is suspended, so that `resume` goes on with it, but a queued job:
    suspending is the queue's."""
    from danlu.k8s import client

    for _ in range(CONFLICTS):
        job = find_object(kube, "RayJob", name)
        found, stopped = job_status(job), keeps_its_pods(job)
        if found.state in ENDED and not stopped:
            return f"{name} has ended already: {found.state}"
        if queue_of(job):
            client.delete(kube, "RayJob", name)
            return f"{name} is deleted; `danlu train` of the same spec goes on from its last checkpoint"
        try:
            client.patch(kube, "RayJob", name, _let_go(job, suspend=not stopped))
        except client.Refused as refused:
            if refused.status == 409:  # it changed meanwhile: it may have ended
                continue
            raise
        what = "was stopped on its Ray cluster, and its pods go now" if stopped else "is cancelled"
        return f"{name} {what}; danlu jobs resume {name} goes on from its last checkpoint"
    raise ClusterError(f"{name} changes all the time", where="jobs cancel", fix=f"danlu jobs show {name} says what it does; try again")


def resume(kube: Kube, name: str) -> str:
    """Go on with a job that was cancelled, that failed or that has ended, from its last checkpoint."""
    from danlu.k8s import client

    job = find_object(kube, "RayJob", name)
    found = job_status(job)
    if found.state not in ENDED:
        raise ClusterError(f"{name} is {found.state} already", where="jobs resume", fix=f"danlu jobs logs -f {name}")
    if job["spec"].get("suspend") and "deletionTimestamp" not in job["metadata"]:
        client.patch(kube, "RayJob", name, _go_on(job))
    else:
        spec = _spec(kube, name)
        client.delete(kube, "RayJob", name)
        for one in client.watch(kube, "RayJob", name, timeout_s=120):
            if one is None or one["metadata"].get("uid") != job["metadata"].get("uid"):
                break
        submit(kube, spec)
    return f"{name} goes on"


def _let_go(job: Object, *, suspend: bool) -> Object:
    """The change after which KubeRay lets a job's pods go; Refused where the job is not that one any more."""
    version = {"resourceVersion": job["metadata"].get("resourceVersion", "")}
    spec = {"suspend": True} if suspend else {}
    if job["spec"].get("shutdownAfterJobFinishes"):
        return {"metadata": version, "spec": spec}
    rules = {RULES: json.dumps(job["spec"].get("deletionStrategy"))}
    return {"metadata": {**version, "annotations": rules}, "spec": {**spec, **BY_TTL}}


def _go_on(job: Object) -> Object:
    """The change after which KubeRay starts a suspended job, with the deletion rules that it had."""
    rules = job["metadata"].get("annotations", {}).get(RULES)
    if rules is None:
        return {"spec": {"suspend": False}}
    own = {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": None, "deletionStrategy": json.loads(rules)}
    return {"metadata": {"annotations": {RULES: None}}, "spec": {"suspend": False, **own}}


def delete(kube: Kube, name: str) -> str:
    """Delete a job and its pods. Its runs and bundles stay in the storage."""
    return delete_object(kube, "RayJob", name)


def dry_run(kube: Kube, job: TrainJob) -> Sequence[str]:
    """Ask the API server whether it would take a job's objects; their names."""
    submit(kube, job, dry_run=True)
    return [f"{one['kind']} {one['metadata']['name']}" for one in render(job)]


def _explained(kube: Kube, job: Object) -> JobStatus:
    from danlu.k8s import client

    name, found = job["metadata"]["name"], job_status(job)
    pods = pods_of(kube, "train", name)
    log: list[str] = []
    for pod in _submitters(kube, name)[-1:] if found.state == "failed" else []:
        with suppress(ClusterError):  # its node may be gone; the state is known without
            log = list(client.pod_log(kube, pod["metadata"]["name"], tail=LOG_TAIL))
    workloads = client.find(kube, "Workload") if found.state == "queued" else []
    events = client.find(kube, "Event") if found.state == "starting" else []
    status = job_status(job, pods, events, workloads, log)
    if found.state not in ENDED or not (storage := _storage(kube, name)):
        return status
    record = f"danlu jobs show {name} --on local --storage {storage} reads its record"
    return replace(status, files=(f"{storage}/runs/{name}",), fix=status.fix or ("" if log else record))


def _storage(kube: Kube, name: str) -> str:
    """Where a job keeps its runs; empty if its spec is gone, or another Danlu's."""
    with suppress(DanluError):
        return _spec(kube, name).storage.rstrip("/")
    return ""


def _submitters(kube: Kube, name: str) -> list[Object]:
    """The pods that follow the driver's log, the oldest first: one for each try."""
    found = [pod for pod in pods_of(kube, "train", name) if pod["spec"]["containers"][0]["name"] == "ray-job-submitter"]
    return sorted(found, key=lambda pod: pod["metadata"].get("creationTimestamp", ""))


def _spec(kube: Kube, name: str) -> TrainJob:
    from danlu.k8s import client

    found = client.get(kube, "ConfigMap", config_map_name(name))
    if found is None:
        raise ClusterError(f"{name} has lost its spec", where=f"ConfigMap {config_map_name(name)}", fix="danlu train SPEC --on k8s")
    return parse(TrainJob, found["data"][SPEC_FILE], source=f"the spec of {name}")
