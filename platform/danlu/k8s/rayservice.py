"""A Service as a RayService: Ray Serve's configuration with the spec in it, and the pods it runs on. Pure."""

from __future__ import annotations

import math

import yaml

from danlu.errors import SpecError
from danlu.k8s.pods import GPU, LEAVE_S, Object, metadata, needed, ray_cluster
from danlu.spec.cluster import Incremental, InPlace, NewCluster, ServiceCluster
from danlu.spec.files import dump
from danlu.spec.serve import Echo, EchoText, Service

IMPORT_PATH = "danlu.serve.app:build"
PORT = 8000
GATEWAY_API = "gateway.networking.k8s.io"
"""The API group that incremental upgrades need."""


def ray_service(service: Service) -> Object:
    """The RayService of a service."""
    needed(service.cluster, service.storage if service.bundle else "memory://", writes=False)
    cluster, scaling, engine = service.cluster, service.autoscaling, service.engine
    assert cluster is not None
    _keys_are_mounted(service, cluster)
    each = cluster.replicas_per_pod
    low, high = math.ceil(scaling.min_replicas / each), math.ceil(scaling.max_replicas / each)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata(cluster, "serve", service.name),
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_config(service), sort_keys=False, allow_unicode=True),
            # Where no worker has to be, the head's proxy keeps a request until one is there.
            "excludeHeadPodFromServeSvc": low > 0,
            "upgradeStrategy": _upgrade(cluster),
            "rayClusterConfig": {
                **({"gcsFaultToleranceOptions": _redis(cluster)} if cluster.redis else {}),
                **ray_cluster(
                    cluster,
                    "serve",
                    service.name,
                    cpus=(1 if isinstance(engine, Echo | EchoText) else engine.num_threads) * each,
                    gpus=(0 if isinstance(engine, Echo | EchoText) else engine.num_gpus) * each,
                    pods=(low, high),
                    env={"RAY_SERVE_ENABLE_HA_PROXY": "1"} if service.http.haproxy else {},
                    leave_s=LEAVE_S + math.ceil(service.limits.drain_timeout_s),
                ),
            },
        },
    }


def keeps_its_pods(before: Object, after: Object) -> bool:
    """Whether the pods there are go on, more or fewer of them."""
    had, has = (_pods_alone(one["spec"]["rayClusterConfig"]) for one in (before, after))
    return had == has or after["spec"]["upgradeStrategy"]["type"] == "None"


def upgrade(before: Object, after: Object) -> str:
    """How KubeRay brings a service from one RayService to another, and what that needs."""
    step = after["spec"]["upgradeStrategy"]
    had, has = (_pods_alone(one["spec"]["rayClusterConfig"]) for one in (before, after))
    if had == has:
        return f"in place: no pod is replaced, new replicas take over on those there are{_scaled(before, after)}"
    if step["type"] == "None":
        return "in place: cluster.upgrade.kind=in_place keeps the pods as they are, and the new image or resources are left out"
    gpus, pods = _asked(after)
    surge = step.get("clusterUpgradeOptions", {}).get("maxSurgePercent", 100)
    more = math.ceil(pods * surge / 100)
    needs = (
        _count(more, "more pod")
        + " than now"
        + (f" and {_count(more * gpus, 'more GPU')}" if gpus else "")
        + " until the old ones have gone"
    )
    if step["type"] == "NewCluster":
        return f"new cluster: a second set of pods takes over once it is ready; at least {needs}"
    moved = f"{step['clusterUpgradeOptions']['stepSizePercent']} % of the requests at a time"
    return f"incremental: a second set of pods takes over {moved}; up to {needs}"


def _pods_alone(config: Object) -> Object:
    """What KubeRay compares: a cluster whose number of pods alone differs is scaled."""
    groups = [
        {name: value for name, value in group.items() if name not in ("replicas", "minReplicas", "maxReplicas")}
        for group in config["workerGroupSpecs"]
    ]
    return {**config, "workerGroupSpecs": groups}


def _scaled(before: Object, after: Object) -> str:
    """What a change of the number of pods alone needs."""
    (had,), (has,) = (one["spec"]["rayClusterConfig"]["workerGroupSpecs"] for one in (before, after))
    if (had["minReplicas"], had["maxReplicas"]) == (has["minReplicas"], has["maxReplicas"]):
        return ""
    gpus, _ = _asked(after)
    at_most = f", {_count(has['maxReplicas'] * gpus, 'GPU')} at most" if gpus else ""
    return f"; {has['minReplicas']} to {_count(has['maxReplicas'], 'pod')} instead of {had['minReplicas']} to {had['maxReplicas']}{at_most}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _asked(service: Object) -> tuple[int, int]:
    """GPUs of a pod, and pods at least."""
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return int(limits.get(GPU, 0)), int(group["replicas"])


def serve_config(service: Service) -> Object:
    """Ray Serve's own configuration. Its arguments are the spec without `cluster:`, so that other pods are no new application."""
    spec = yaml.safe_load(dump(service.model_copy(update={"cluster": None})))
    # Of a language model's answer only the gateway knows whether it still moves: a long one is not a late one.
    timeout_s = None if service.is_language_model else service.limits.request_timeout_s + 5
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT, "request_timeout_s": timeout_s},
        "applications": [{"name": service.name, "route_prefix": "/", "import_path": IMPORT_PATH, "args": spec}],
    }


def _keys_are_mounted(service: Service, cluster: ServiceCluster) -> None:
    if service.auth is None:
        return
    file = service.auth.keys_file
    mounts = [*(one.mount_path for one in cluster.volumes), *(one.mount_path for one in cluster.secret_volumes)]
    if not any(file.startswith(f"{mount}/") for mount in mounts):
        raise SpecError(
            f"{file} is in none of the pods' volumes",
            where="auth.keys_file",
            fix="keys_file: /etc/danlu-keys/keys.json, with cluster.secret_volumes: [{secret: danlu-keys, mount_path: /etc/danlu-keys}]",
        )


def _upgrade(cluster: ServiceCluster) -> Object:
    match cluster.upgrade:
        case NewCluster():
            return {"type": "NewCluster"}
        case InPlace():
            return {"type": "None"}
        case Incremental() as step:
            return {
                "type": "NewClusterWithIncrementalUpgrade",
                "clusterUpgradeOptions": {
                    "gatewayClassName": step.gateway_class,
                    "stepSizePercent": step.step_size_percent,
                    "intervalSeconds": step.interval_s,
                    "maxSurgePercent": step.max_surge_percent,
                },
            }


def _redis(cluster: ServiceCluster) -> Object:
    assert cluster.redis is not None
    secret = cluster.redis.password_secret
    password = {"redisPassword": {"valueFrom": {"secretKeyRef": {"name": secret, "key": "password"}}}} if secret else {}
    return {"redisAddress": cluster.redis.address, **password}
