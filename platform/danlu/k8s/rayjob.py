"""A TrainJob as Kubernetes objects: a ConfigMap with the spec, and the RayJob that runs `python -m danlu.train` on it. Pure."""

from __future__ import annotations

from danlu.k8s.pods import Object, labels, metadata, needed, pod_spec, ray_cluster, scratch, tolerations
from danlu.spec.cluster import JobCluster, Kueue, Rules, Ttl
from danlu.spec.files import dump
from danlu.spec.train import TrainJob

SPEC_FILE = "job.yaml"
ENTRYPOINT = f"python -m danlu.train /etc/danlu/{SPEC_FILE}"


def job_objects(job: TrainJob) -> list[Object]:
    """Everything that a job is on a cluster, in the order of `kubectl apply`."""
    return [config_map(job), ray_job(job)]


def config_map(job: TrainJob) -> Object:
    """The validated spec: the only thing that crosses from laptop to cluster."""
    needed(job.cluster, job.storage)
    assert job.cluster is not None
    meta = metadata(job.cluster, "train", job.name)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**meta, "name": config_map_name(job.name)},
        "data": {SPEC_FILE: dump(job)},
    }


def config_map_name(job: str) -> str:
    return f"{job}-spec"


def ray_job(job: TrainJob) -> Object:
    """The RayJob of a job."""
    needed(job.cluster, job.storage)
    cluster, workers = job.cluster, job.workers
    assert cluster is not None
    each, pods = cluster.workers_per_pod, workers.num_workers // cluster.workers_per_pod
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(cluster, "train", job.name),
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": ENTRYPOINT,
            **_driver(job),
            **({"suspend": True} if isinstance(cluster.scheduler, Kueue) else {}),
            **_cleanup(cluster),
            "backoffLimit": cluster.backoff_limit,
            **({"activeDeadlineSeconds": cluster.active_deadline_s} if cluster.active_deadline_s else {}),
            **({"preRunningDeadlineSeconds": cluster.pre_running_deadline_s} if cluster.pre_running_deadline_s else {}),
            "submitterPodTemplate": _submitter(cluster, job.name),
            "rayClusterSpec": ray_cluster(
                cluster,
                "train",
                job.name,
                cpus=workers.cpus_per_worker * each,
                gpus=workers.gpus_per_worker * each,
                pods=(pods, pods),
                env={},
                config_map=config_map_name(job.name),
            ),
        },
    }


def _driver(job: TrainJob) -> Object:
    """One worker trains in the driver, which then runs in the worker's pod; several train on Ray, and the driver runs on the head."""
    if job.workers.num_workers > 1:
        return {}
    return {
        "entrypointNumCpus": job.workers.cpus_per_worker,
        **({"entrypointNumGpus": job.workers.gpus_per_worker} if job.workers.gpus_per_worker else {}),
    }


def _cleanup(cluster: JobCluster) -> Object:
    match cluster.cleanup:
        case Ttl() as ttl:
            return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": ttl.ttl_seconds_after_finished}
        case Rules() as rules:
            return {
                "shutdownAfterJobFinishes": False,
                "deletionStrategy": {
                    "deletionRules": [
                        _rule({"jobStatus": "SUCCEEDED"}, rules.after_success_s, "DeleteCluster"),
                        # The RayJob's own failure, which a deadline is, too: Ray knows nothing of that one.
                        _rule({"jobDeploymentStatus": "Failed"}, rules.workers_after_failure_s, "DeleteWorkers"),
                        _rule({"jobDeploymentStatus": "Failed"}, rules.head_after_failure_s, "DeleteCluster"),
                    ]
                },
            }


def _rule(ended: Object, seconds: int, policy: str) -> Object:
    return {"condition": {**ended, "ttlSeconds": seconds}, "policy": policy}


def _submitter(cluster: JobCluster, name: str) -> Object:
    """The pod that hands the job to Ray and then follows its log: `kubectl logs` still has it when the Ray cluster is gone."""
    resources = {"cpu": "500m", "memory": "512Mi"}
    volumes, mounts = scratch()
    container = {"name": "ray-job-submitter", "resources": {"requests": resources, "limits": resources}, "volumeMounts": mounts}
    pod = {**pod_spec(cluster, container, tolerations=tolerations(cluster), volumes=volumes), "restartPolicy": "Never"}
    return {"metadata": {"labels": labels("train", name)}, "spec": pod}


__all__ = ["ENTRYPOINT", "config_map", "config_map_name", "job_objects", "ray_job"]
