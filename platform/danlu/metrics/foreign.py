"""Metrics of others that our rules and panels read: Prometheus, Ray, vLLM on Ray, DCGM, Kueue, KubeRay. Each with where it was seen.

"scraped" was on a metrics port of that version here; "read" was read in the source only, for want of a GPU or a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.metrics.catalog import Kind


@dataclass(frozen=True)
class Foreign:
    """Somebody else's metric. `labels` are those we use; `absent_here` says why a machine without its source has none."""

    exported: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...]
    seen: Literal["scraped", "read"]
    seen_in: str
    absent_here: str = ""


RAY = "ray 2.60.0"
DCGM = "dcgm-exporter etc/default-counters.csv at 00d6d34"
KUEUE = "kueue pkg/metrics at 0062126"
KUBERAY = "kuberay ray-operator/controllers/ray/metrics at 0ac416a"
VLLM = "vllm v1/metrics/loggers.py at a6f0308, through its RayPrometheusStatLogger"
CERT_MANAGER = "cert-manager 1.x, as its users' rules and its documentation have it"
_NO_GPU, _NO_K8S, _NO_VLLM = "there is no GPU", "there is no Kubernetes", "vLLM does not run here"

UP = Foreign("up", "gauge", "", "1 if the last scrape of a target worked.", ("job", "instance"), "scraped", "prometheus 2.42.0")

RAY_TARGET_REPLICAS = Foreign(
    "ray_serve_autoscaling_target_replicas",
    "gauge",
    "replicas",
    "Replicas that the autoscaler wants.",
    ("deployment", "application"),
    "scraped",
    RAY,
)
RAY_HEALTHY_REPLICAS = Foreign(
    "ray_serve_deployment_replica_healthy", "gauge", "replicas", "1 for a healthy replica.", ("deployment", "application"), "scraped", RAY
)
RAY_REPLICA_STARTUP = Foreign(
    "ray_serve_replica_startup_latency_ms",
    "histogram",
    "ms",
    "From a replica's creation until it was ready.",
    ("deployment", "application"),
    "scraped",
    RAY,
)
RAY_RESOURCES = Foreign(
    "ray_resources",
    "gauge",
    "",
    "Logical resources of a node by name, used or available.",
    ("Name", "State", "NodeAddress"),
    "scraped",
    RAY,
)
RAY_NODES = Foreign("ray_cluster_active_nodes", "gauge", "nodes", "Nodes in the cluster, by type.", ("node_type",), "scraped", RAY)
RAY_NODE_CPU = Foreign("ray_node_cpu_utilization", "gauge", "%", "Processor use of a node.", ("ip",), "scraped", RAY)
RAY_NODE_MEMORY_USED = Foreign("ray_node_mem_used", "gauge", "bytes", "Memory in use on a node.", ("ip",), "scraped", RAY)
RAY_NODE_MEMORY = Foreign("ray_node_mem_total", "gauge", "bytes", "Memory of a node.", ("ip",), "scraped", RAY)
RAY_NODE_DISK = Foreign(
    "ray_node_disk_utilization_percentage", "gauge", "%", "Used share of the disk that Ray's folder is on.", ("ip",), "scraped", RAY
)
RAY_NODE_GPU = Foreign("ray_node_gpus_utilization", "gauge", "%", "Use of a GPU.", ("ip", "GpuIndex"), "read", RAY, _NO_GPU)

VLLM_KV_USAGE = Foreign(
    "ray_vllm_kv_cache_usage_perc", "gauge", "ratio", "Used share of the KV cache.", ("model_name",), "read", VLLM, _NO_VLLM
)
VLLM_WAITING = Foreign(
    "ray_vllm_num_requests_waiting", "gauge", "requests", "Requests waiting for the engine.", ("model_name",), "read", VLLM, _NO_VLLM
)
VLLM_RUNNING = Foreign(
    "ray_vllm_num_requests_running", "gauge", "requests", "Requests in the engine's batch.", ("model_name",), "read", VLLM, _NO_VLLM
)
VLLM_TTFT = Foreign(
    "ray_vllm_time_to_first_token_seconds", "histogram", "s", "Time to the first token.", ("model_name",), "read", VLLM, _NO_VLLM
)

DCGM_UTIL = Foreign("DCGM_FI_DEV_GPU_UTIL", "gauge", "%", "Use of a GPU.", ("Hostname", "gpu"), "read", DCGM, _NO_GPU)
DCGM_XID = Foreign("DCGM_FI_DEV_XID_ERRORS", "gauge", "", "Number of the last XID error.", ("Hostname", "gpu"), "read", DCGM, _NO_GPU)
DCGM_TEMPERATURE = Foreign("DCGM_FI_DEV_GPU_TEMP", "gauge", "C", "Temperature of a GPU.", ("Hostname", "gpu"), "read", DCGM, _NO_GPU)
DCGM_MEMORY_USED = Foreign("DCGM_FI_DEV_FB_USED", "gauge", "MiB", "Memory in use on a GPU.", ("Hostname", "gpu"), "read", DCGM, _NO_GPU)
DCGM_ROW_REMAP_FAILURE = Foreign(
    "DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "", "1 if a GPU could not map a bad row away.", ("Hostname", "gpu"), "read", DCGM, _NO_GPU
)

KUEUE_PENDING = Foreign(
    "kueue_pending_workloads", "gauge", "workloads", "Workloads waiting for quota.", ("cluster_queue", "status"), "read", KUEUE, _NO_K8S
)
KUEUE_ADMITTED = Foreign(
    "kueue_admitted_active_workloads", "gauge", "workloads", "Workloads that run.", ("cluster_queue",), "read", KUEUE, _NO_K8S
)
KUEUE_WAIT = Foreign(
    "kueue_admission_wait_time_seconds", "histogram", "s", "From creation to admission.", ("cluster_queue",), "read", KUEUE, _NO_K8S
)
KUEUE_EVICTED = Foreign(
    "kueue_evicted_workloads_total", "counter", "workloads", "Workloads evicted.", ("cluster_queue", "reason"), "read", KUEUE, _NO_K8S
)
KUBERAY_JOB_STATUS = Foreign(
    "kuberay_job_deployment_status",
    "gauge",
    "",
    "1 for the state a RayJob is in.",
    ("name", "namespace", "deployment_status"),
    "read",
    KUBERAY,
    _NO_K8S,
)
CERTIFICATE_EXPIRY = Foreign(
    "certmanager_certificate_expiration_timestamp_seconds",
    "gauge",
    "s",
    "Unix time at which a certificate expires.",
    ("name",),
    "read",
    CERT_MANAGER,
    _NO_K8S,
)

ALL: tuple[Foreign, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Foreign))
