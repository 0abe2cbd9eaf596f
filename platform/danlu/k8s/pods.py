"""The pods of a Ray cluster for a job or a service: resources, nodes, secrets, volumes. Pure; charts/danlu says the same in Helm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danlu.errors import SpecError
from danlu.spec.cluster import JobCluster, Kai, Kueue, Scheduler, ServiceCluster, Spot, Volcano, Yunikorn

Object = dict[str, Any]
"""One Kubernetes object, or a part of one."""

RAY_VERSION = "2.60.0"
"""Of the image that ops/docker builds; KubeRay asks for it where tokens guard the dashboard."""
KIND, NAME = "danlu.ai/kind", "danlu.ai/name"
"""Labels of every object and pod: `train` or `serve`, and the job's or service's name."""
WORKERS = "workers"
"""The name of the one group of workers."""
GPU = "nvidia.com/gpu"
RAY_ENV = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What a Ray of ours runs with on a laptop, too."""
SPOT: dict[Spot, tuple[str, str, bool]] = {
    "gke": ("cloud.google.com/gke-spot", "true", True),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT", False),
    "karpenter": ("karpenter.sh/capacity-type", "spot", False),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot", True),
}
"""The label of a provider's spot nodes, its value, and whether they carry it as a taint."""
HEAD_PORTS = {
    "gcs-server": 6379,
    "dashboard": 8265,
    "client": 10001,
    "serve": 8000,
    "metrics": 8080,
    "as-metrics": 44217,
    "dash-metrics": 44227,
}
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""Pod Security's `restricted`, of a container."""
WRITABLE = {"tmp": "/tmp", "home": "/home/danlu"}
"""Folders that live as long as their pod: the rest of its file system is read-only."""

TLS_ENV = {
    "RAY_USE_TLS": "1",
    "RAY_TLS_SERVER_CERT": "/etc/ray-tls/tls.crt",
    "RAY_TLS_SERVER_KEY": "/etc/ray-tls/tls.key",
    "RAY_TLS_CA_CERT": "/etc/ray-tls/ca.crt",
}
"""https://docs.ray.io/en/latest/ray-core/configure.html#tls-authentication"""
TLS_MOUNT = {"name": "tls", "mountPath": "/etc/ray-tls", "readOnly": True}
CERTIFICATE = """set -eu
umask 077
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=ray -keyout /etc/ray-tls/tls.key -out /tmp/tls.csr
echo "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:$POD_IP,DNS:*.$POD_NAMESPACE.svc.cluster.local" > /tmp/tls.ext
openssl x509 -req -in /tmp/tls.csr -extfile /tmp/tls.ext -days 3650 -set_serial "0x$(openssl rand -hex 16)" \\
  -CA /etc/ray-ca/tls.crt -CAkey /etc/ray-ca/tls.key -out /etc/ray-tls/tls.crt
cp /etc/ray-ca/tls.crt /etc/ray-tls/ca.crt
"""
"""A pod's own certificate: Ray asks pods by their addresses, and the head by its Service's name."""
SMALL = {"cpu": "500m", "memory": "256Mi"}
LEAVE_S = 120
"""How long a service's pod that is told to end waits for replicas elsewhere to be ready, before its own finish what they have begun."""
END_S = 30
"""And how long its processes may take to end after that."""

Cluster = JobCluster | ServiceCluster


def needed(cluster: Cluster | None, storage: str, *, writes: bool = True) -> None:
    """SpecError unless there is a `cluster:` and a `storage:` that all of its pods can reach."""
    if cluster is None:
        raise SpecError(
            "Kubernetes needs to be told what to run", where="cluster", fix="cluster: {image: registry/danlu:TAG, memory: 32Gi}"
        )
    mounts = [volume.mount_path for volume in cluster.volumes if not (volume.read_only and writes)]
    if "://" in storage and not storage.startswith("file://"):
        return
    path = storage.removeprefix("file://")
    if not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
        raise SpecError(
            f"storage={storage} is a folder of one machine, and pods run on several",
            where="storage",
            fix=f"storage: {mounts[0]}/runs" if mounts else "storage: s3://bucket/runs, or a folder in one of cluster.volumes",
        )


def metadata(cluster: Cluster, kind: str, name: str) -> Object:
    """Of the RayJob or RayService: who it is, and who starts its pods."""
    queued = schedulerlabels(cluster.scheduler, name)
    if isinstance(cluster.scheduler, Volcano) and cluster.priority_class:
        queued["ray.io/priority-class-name"] = cluster.priority_class
    return {"name": name, **_set(namespace=cluster.namespace), "labels": {**labels(kind, name), **queued}}


def schedulerlabels(scheduler: Scheduler | None, name: str) -> dict[str, str]:
    """What tells Kueue, or KubeRay's batch scheduler, whose pods these are."""
    match scheduler:
        case None:
            return {}
        case Kueue():
            return {"kueue.x-k8s.io/queue-name": scheduler.queue}
        case Volcano():
            return {"ray.io/scheduler-name": "volcano"} | ({"volcano.sh/queue-name": scheduler.queue} if scheduler.queue else {})
        case Yunikorn():
            return {
                "ray.io/gang-scheduling-enabled": "true",
                "yunikorn.apache.org/app-id": name,
                "yunikorn.apache.org/queue": scheduler.queue,
            }
        case Kai():
            return {"kai.scheduler/queue": scheduler.queue}


def ray_cluster(
    cluster: Cluster,
    kind: str,
    name: str,
    *,
    cpus: int,
    gpus: int,
    pods: tuple[int, int],
    env: Mapping[str, str],
    config_map: str | None = None,
    leave_s: int | None = None,
) -> Object:
    """A RayCluster's spec: a head without work of its own, and from `pods[0]` to `pods[1]` workers of `cpus` cores and `gpus` GPUs.

    `leave_s` is how long a worker may take to hand its replicas over before it is ended.
    """
    scales = pods[0] < pods[1]
    head = _pod(cluster, kind, name, "head", cluster.head.cpus, cluster.head.memory, 0, env, config_map)
    head["spec"]["automountServiceAccountToken"] = scales
    worker = _pod(cluster, kind, name, "worker", cpus, cluster.memory, gpus, env, config_map)
    if leave_s is not None:
        leave = ["python", "-m", "danlu.serve.leave", str(leave_s)]
        worker["spec"]["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": leave}}}
        worker["spec"]["terminationGracePeriodSeconds"] = leave_s + END_S
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        **({"enableInTreeAutoscaling": True, "autoscalerOptions": _autoscaler(cluster)} if scales else {}),
        "headGroupSpec": {"rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": WORKERS,
                "replicas": pods[0],
                "minReplicas": pods[0],
                "maxReplicas": pods[1],
                "rayStartParams": {},
                "template": worker,
            }
        ],
    }


def _autoscaler(cluster: Cluster) -> Object:
    secured = {"env": _values(TLS_ENV), "volumeMounts": [TLS_MOUNT]} if cluster.tls else {}
    return {"version": "v2", "securityContext": RESTRICTED, **secured}


def pod_spec(cluster: Cluster, container: Object, **more: Any) -> Object:
    """What any pod of a cluster has: its identity, its rights, and the taints it tolerates."""
    return {
        **_set(
            serviceAccountName=cluster.service_account,
            imagePullSecrets=[{"name": secret} for secret in cluster.image_pull_secrets],
            priorityClassName=cluster.priority_class,
        ),
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": container["name"],
                "image": cluster.image,
                **_set(imagePullPolicy=cluster.image_pull_policy),
                **container,
                "securityContext": {**RESTRICTED, "readOnlyRootFilesystem": True},
            }
        ],
        **_set(**more),
    }


def tolerations(cluster: Cluster, gpus: int = 0, *, worker: bool = False) -> list[Object]:
    """As the spec says, and those that follow from GPUs and spot nodes."""
    found = [
        {
            "key": one.key,
            **({"operator": "Exists"} if one.value is None else {"operator": "Equal", "value": one.value}),
            **_set(effect=one.effect),
        }
        for one in cluster.tolerations
    ]
    if gpus:
        found.append({"key": GPU, "operator": "Exists", "effect": "NoSchedule"})
    if worker and (spot := _spot(cluster)) and spot[2]:
        found.append({"key": spot[0], "operator": "Equal", "value": spot[1], "effect": "NoSchedule"})
    return found


def _pod(
    cluster: Cluster, kind: str, name: str, role: str, cpus: int, memory: str, gpus: int, env: Mapping[str, str], config_map: str | None
) -> Object:
    worker = role == "worker"
    resources: Object = {"cpu": str(cpus), "memory": memory, **({GPU: str(gpus)} if gpus else {})}
    volumes, mounts = _volumes(cluster, config_map)
    container = {
        "name": f"ray-{role}",
        "env": _env(cluster, env),
        "ports": [
            {"name": port, "containerPort": number} for port, number in HEAD_PORTS.items() if not worker or port in ("serve", "metrics")
        ],
        "resources": {"requests": resources, "limits": resources},
        **_set(volumeMounts=mounts),
    }
    nodes = {**cluster.node_selector, **({GPU + ".product": cluster.gpu_type} if cluster.gpu_type else {})}
    if worker and (spot := _spot(cluster)):
        nodes[spot[0]] = spot[1]
    return {
        "metadata": {"labels": labels(kind, name)},
        "spec": pod_spec(
            cluster,
            container,
            nodeSelector=nodes if worker else dict(cluster.head.node_selector),
            tolerations=tolerations(cluster, gpus, worker=worker),
            affinity=_affinity(cluster, name, worker=worker),
            topologySpreadConstraints=_spread(cluster, name) if worker else [],
            initContainers=[_certificate(cluster)] if cluster.tls else [],
            volumes=volumes,
        ),
    }


def _certificate(cluster: Cluster) -> Object:
    """What makes a pod's certificate before Ray starts, the only one to see the CA's key."""
    fields = {"POD_IP": "status.podIP", "POD_NAMESPACE": "metadata.namespace"}
    return {
        "name": "certificate",
        "image": cluster.image,
        **_set(imagePullPolicy=cluster.image_pull_policy),
        "command": ["sh", "-c", CERTIFICATE],
        "env": [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()],
        "resources": {"requests": SMALL, "limits": SMALL},
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "ca", "mountPath": "/etc/ray-ca", "readOnly": True},
            {"name": "tls", "mountPath": "/etc/ray-tls"},
        ],
        "securityContext": {**RESTRICTED, "readOnlyRootFilesystem": True},
    }


def labels(kind: str, name: str) -> dict[str, str]:
    """Of every object and pod of a job or a service."""
    return {KIND: kind, NAME: name}


def _env(cluster: Cluster, env: Mapping[str, str]) -> list[Object]:
    plain = {**RAY_ENV, **(TLS_ENV if cluster.tls else {}), **env, **cluster.env}
    secret = [{"name": one.name, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": one.key}}} for one in cluster.secret_env]
    return _values(plain) + secret


def _values(env: Mapping[str, str]) -> list[Object]:
    return [{"name": key, "value": value} for key, value in sorted(env.items())]


def _volumes(cluster: Cluster, config_map: str | None) -> tuple[list[Object], list[Object]]:
    volumes, mounts = scratch()
    if config_map:
        volumes.append({"name": "spec", "configMap": {"name": config_map}})
        mounts.append({"name": "spec", "mountPath": "/etc/danlu", "readOnly": True})
    if cluster.tls:
        volumes += [{"name": "ca", "secret": {"secretName": cluster.tls.ca_secret}}, {"name": "tls", "emptyDir": {"medium": "Memory"}}]
        mounts.append(TLS_MOUNT)
    if cluster.shared_memory:
        volumes.append({"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}})
        mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})
    for i, volume in enumerate(cluster.volumes):
        volumes.append({"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"volume-{i}", "mountPath": volume.mount_path, **({"readOnly": True} if volume.read_only else {})})
    for i, secret in enumerate(cluster.secret_volumes):
        volumes.append({"name": f"secret-{i}", "secret": {"secretName": secret.secret}})
        mounts.append({"name": f"secret-{i}", "mountPath": secret.mount_path, "readOnly": True})
    return volumes, mounts


def scratch() -> tuple[list[Object], list[Object]]:
    """The volumes that a process writes to, and where they are mounted."""
    return [{"name": name, "emptyDir": {}} for name in WRITABLE], [{"name": name, "mountPath": path} for name, path in WRITABLE.items()]


def _affinity(cluster: Cluster, name: str, *, worker: bool) -> Object:
    """Workers stay together; the head, which a job cannot lose, stays off nodes that are taken away."""
    if not isinstance(cluster, JobCluster):
        return {}
    if worker and cluster.same_topology:
        term = {"labelSelector": {"matchLabels": _workers_of("train", name)}, "topologyKey": cluster.same_topology}
        return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    if not worker and (spot := _spot(cluster)):
        off = {"matchExpressions": [{"key": spot[0], "operator": "NotIn", "values": [spot[1]]}]}
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [off]}}}
    return {}


def _spread(cluster: Cluster, name: str) -> list[Object]:
    if not isinstance(cluster, ServiceCluster) or not cluster.spread_over:
        return []
    return [
        {
            "maxSkew": 1,
            "topologyKey": cluster.spread_over,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": _workers_of("serve", name)},
        }
    ]


def _workers_of(kind: str, name: str) -> dict[str, str]:
    return {**labels(kind, name), "ray.io/node-type": "worker"}


def _spot(cluster: Cluster) -> tuple[str, str, bool] | None:
    return SPOT[cluster.spot] if isinstance(cluster, JobCluster) and cluster.spot else None


def _set(**fields: Any) -> Object:
    """The fields that are there."""
    return {name: value for name, value in fields.items() if value not in (None, [], {})}
