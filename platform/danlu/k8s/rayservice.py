"""A Service as a RayService: Ray Serve's configuration with the spec in it, and the pods it runs on. Pure."""

from __future__ import annotations

import math

import yaml

from danlu.k8s.pods import Object, metadata, needed, ray_cluster
from danlu.spec.cluster import Incremental, InPlace, NewCluster, ServiceCluster
from danlu.spec.files import dump
from danlu.spec.serve import Encoder, Service, Torch
from danlu.spec.vllm import Vllm

IMPORT_PATH = "danlu.serve.app:build"
PORT = 8000


def ray_service(service: Service) -> Object:
    """The RayService of a service."""
    needed(service.cluster, service.storage if service.bundle else "memory://", writes=False)
    cluster, scaling, engine = service.cluster, service.autoscaling, service.engine
    assert cluster is not None
    each = cluster.replicas_per_pod
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata(cluster, "serve", service.name),
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_config(service), sort_keys=False, allow_unicode=True),
            "excludeHeadPodFromServeSvc": True,
            "upgradeStrategy": _upgrade(cluster),
            "rayClusterConfig": {
                **({"gcsFaultToleranceOptions": _redis(cluster)} if cluster.redis else {}),
                **ray_cluster(
                    cluster,
                    "serve",
                    service.name,
                    cpus=(engine.num_threads if isinstance(engine, Encoder | Torch | Vllm) else 1) * each,
                    gpus=(engine.num_gpus if isinstance(engine, Encoder | Torch | Vllm) else 0) * each,
                    pods=(math.ceil(scaling.min_replicas / each), math.ceil(scaling.max_replicas / each)),
                    env={"RAY_SERVE_ENABLE_HA_PROXY": "1"} if service.http.haproxy else {},
                ),
            },
        },
    }


def serve_config(service: Service) -> Object:
    """Ray Serve's own configuration. Its arguments are the spec without `cluster:`, so that other pods are no new application."""
    spec = yaml.safe_load(dump(service.model_copy(update={"cluster": None})))
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT, "request_timeout_s": service.limits.request_timeout_s + 5},
        "applications": [{"name": service.name, "route_prefix": "/", "import_path": IMPORT_PATH, "args": spec}],
    }


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
