"""`danlu doctor`: what this machine, the storage, the hub and the Kubernetes cluster have, and what to do about what they lack."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from danlu.errors import ClusterError, DanluError, SpecError

Verdict = Literal["ok", "warning", "missing"]
GIB = 1 << 30
RIGHTS = (
    ("create", "ray.io", "rayjobs"),
    ("patch", "ray.io", "rayjobs"),
    ("delete", "ray.io", "rayjobs"),
    ("patch", "ray.io", "rayservices"),
    ("patch", "ray.io", "rayclusters"),
    ("create", "", "configmaps"),
    ("list", "", "pods"),
    ("list", "", "events"),
    ("get", "", "pods/log"),
)
"""What `--on k8s` and its commands do."""
NEW_FIELDS = ("preRunningDeadlineSeconds", "deletionStrategy", "activeDeadlineSeconds")
"""Of a RayJob's CRD, which does not say its version: KubeRay 1.7 has all of them."""


@dataclass(frozen=True)
class Finding:
    """One line of the table: `missing` is what a job would fail of, `warning` what it would be slow or limited by."""

    what: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(storage: str, *, on: str | None = None, context: str | None = None, namespace: str | None = None) -> list[Finding]:
    """Everything, in the order in which a job needs it. `on` is where jobs are to run: `local` asks no cluster, and `k8s` needs one."""
    if on not in (None, "local", "k8s"):
        fix = "local or k8s; a Ray cluster's answers are those of danlu jobs list --on"
        raise SpecError(f"{on!r} is no place that is looked at", where="--on", fix=fix)
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        _python,
        _torch,
        _kernels,
        _ray,
        _shared_memory,
        lambda: _disk(storage),
        lambda: _storage(storage),
        _hub,
        lambda: iter(()) if on == "local" else _kubernetes(context, namespace, needed=on == "k8s"),
    )
    return [finding for check in checks for finding in check()]


def table(findings: Sequence[Finding]) -> str:
    """For a terminal: what was found, and under it what to do."""
    lines = []
    for one in findings:
        lines.append(f"  {one.verdict:<8} {one.what:<16} {one.found}")
        if one.fix:
            lines.append(f"  {'':<8} {'':<16} try: {one.fix}")
    return "\n".join(lines)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    new = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if new else "missing", f"{version}, {sys.executable}", "" if new else "Python 3.11 or newer")


def _torch() -> Iterator[Finding]:
    import torch

    from danlu.plan import num_cores
    from danlu.tasks.device import has_native_bf16

    yield Finding("torch", "ok", f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"))
    bf16 = has_native_bf16(torch.device("cpu"))
    yield Finding("CPU", "ok", f"{num_cores()} cores, {'native bf16' if bf16 else 'no native bf16: precision auto is fp32 on them'}")
    nvidia = Path("/proc/driver/nvidia/version")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("GPUs", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}")
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    elif nvidia.exists():
        driver = nvidia.read_text().splitlines()[0]
        fix = "a driver that is new enough for it: nvidia-smi shows the highest CUDA version that the driver takes"
        fix = fix if torch.version.cuda else "pip install torch from PyPI instead of the CPU index"
        yield Finding("GPUs", "missing", f"there is a driver ({driver}), and torch sees no GPU", fix)
    else:
        yield Finding("GPUs", "ok", "none, and no NVIDIA driver: training and serving use the CPU")


def _kernels() -> Iterator[Finding]:
    from danlu.compiled import KernelsUnavailable, cache_folder, find_compiler, find_prebuilt
    from danlu.serve.engines.torch.kernels import SOURCE

    if found := find_prebuilt(SOURCE):
        yield Finding("kernels", "ok", f"they came with Danlu: {found.name}")
        return
    try:
        told = f"{find_compiler()[0]} builds them in {cache_folder()}, once"
    except KernelsUnavailable as error:
        fix = "a C++ compiler, as apt install g++ brings"
        yield Finding("kernels", "warning", f"none, so a CPU trains encoders and serves language models more slowly: {error}", fix)
    else:
        yield Finding("kernels", "ok", told)


def _ray() -> Iterator[Finding]:
    from danlu.k8s.pods import RAY_VERSION

    version = importlib.metadata.version("ray")
    same = version == RAY_VERSION
    yield Finding("Ray", "ok" if same else "warning", version, "" if same else f"ray=={RAY_VERSION} is what Danlu was tested with")


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("shared memory", "warning", "there is no /dev/shm", "Ray keeps its objects on disk instead, which is slower")
        return
    size = shutil.disk_usage(place).total
    small = size < GIB
    fix = "docker run --shm-size=8g; in a pod, cluster.shared_memory" if small else ""
    yield Finding("shared memory", "warning" if small else "ok", f"{size / GIB:.1f} GiB", fix)


def _disk(storage: str) -> Iterator[Finding]:
    places = {"temporary files": Path(tempfile.gettempdir())}
    if "://" not in storage:
        places["disk"] = next(path for path in (Path(storage).resolve(), *Path(storage).resolve().parents) if path.exists())
    for what, place in places.items():
        free = shutil.disk_usage(place).free
        small = free < 10 * GIB
        fix = "free some space, or set TMPDIR" if what == "temporary files" else "free some space, or storage: s3://bucket/runs"
        yield Finding(what, "warning" if small else "ok", f"{free / GIB:.1f} GiB free in {place}", fix if small else "")


def _storage(storage: str) -> Iterator[Finding]:
    from danlu.artifact.store import ensure_writable

    try:
        ensure_writable(storage)
    except DanluError as error:
        told = error.problem if storage in error.problem else f"{storage}: {error.problem}"
        yield Finding("storage", "missing", told, error.fix)
    else:
        yield Finding("storage", "ok", f"{storage} can be written")


def _hub() -> Iterator[Finding]:
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        status = httpx.head(endpoint, timeout=5, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        fix = "model folders, s3:// and pkg:// work without it; a mirror: export HF_ENDPOINT=https://..."
        yield Finding("model hub", "warning", f"{endpoint}: {error or type(error).__name__}", fix)
    else:
        yield Finding("model hub", "ok" if status < 500 else "warning", f"{endpoint} answers {status}")


def _kubernetes(context: str | None, namespace: str | None, *, needed: bool = False) -> Iterator[Finding]:
    needed = needed or context is not None
    try:
        from danlu.k8s import client
        from danlu.k8s.kubeconfig import connect
        from danlu.k8s.rayservice import GATEWAY_API
    except ImportError:
        yield Finding(
            "Kubernetes",
            "missing" if needed else "warning",
            "the client is not installed",
            "pip install 'danlu[k8s]' if jobs are to run there",
        )
        return
    try:
        kube = connect(context, namespace)
    except ClusterError as error:
        yield Finding("Kubernetes", "missing" if needed else "warning", error.problem, error.fix)
        return
    try:
        denied = [f"{verb} {resource}" for verb, group, resource in RIGHTS if not client.may(kube, verb, group, resource)]
        found = f"context {kube.context}, namespace {kube.namespace}"
        if denied:
            fix = "the chart's access.groups binds a Role with these rights"
            yield Finding("Kubernetes", "missing", f"{found}: not allowed to {', '.join(denied)}", fix)
        else:
            yield Finding("Kubernetes", "ok", f"{found}: everything that is needed is allowed")
        yield from _kuberay(client.crd(kube, "rayjobs.ray.io"))
        yield _kueue(client.crd(kube, "workloads.kueue.x-k8s.io"))
        yield _prometheus(client.crd(kube, "podmonitors.monitoring.coreos.com"))
        yield _gateway(client.serves(kube, GATEWAY_API))
    except client.Refused as refused:
        if refused.status == 403:
            yield Finding("KubeRay", "warning", "its version cannot be read: CRDs are not yours to look at")
        else:
            yield Finding("Kubernetes", "missing", refused.problem, refused.fix)
    except ClusterError as error:
        yield Finding("Kubernetes", "missing", error.problem, error.fix)


def _kuberay(crd: dict[str, object] | None) -> Iterator[Finding]:
    install = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"
    if crd is None:
        yield Finding("KubeRay", "missing", "it is not installed", install)
        return
    versions = {one["name"]: one for one in crd["spec"]["versions"]}  # type: ignore[index]
    fields = versions.get("v1", {}).get("schema", {}).get("openAPIV3Schema", {}).get("properties", {}).get("spec", {}).get("properties", {})
    lacks = [name for name in NEW_FIELDS if name not in fields]
    if lacks:
        fix = "kubectl apply --server-side -k 'github.com/ray-project/kuberay/ray-operator/config/crd?ref=v1.7.0': helm updates no CRDs"
        yield Finding("KubeRay", "warning", f"its CRDs are older than 1.7: no {', '.join(lacks)}", fix)
    else:
        yield Finding("KubeRay", "ok", "ray.io/v1, 1.7 or newer")


def _kueue(crd: dict[str, Any] | None) -> Finding:
    if crd is None:
        return Finding("Kueue", "ok", "none, which cluster.scheduler.kind=kueue would need")
    served = [one["name"] for one in crd["spec"]["versions"] if one.get("served", True)]
    if "v1beta2" in served:
        return Finding("Kueue", "ok", "v1beta2, 0.15 or newer")
    return Finding("Kueue", "warning", f"older than 0.15: it serves {', '.join(served)}", "Kueue 0.15 or newer, for services 0.17")


def _gateway(there: bool) -> Finding:
    if not there:
        return Finding(
            "Gateway API", "ok", "none, which cluster.upgrade.kind=incremental and the chart's gateways of kind http_route would need"
        )
    return Finding("Gateway API", "ok", "there is one")


def _prometheus(crd: dict[str, Any] | None) -> Finding:
    if crd is None:
        fix = "helm install prometheus prometheus-community/kube-prometheus-stack; the chart's monitoring: needs it, and nothing else does"
        return Finding("Prometheus", "warning", "its operator is not installed", fix)
    version = crd.get("metadata", {}).get("annotations", {}).get("operator.prometheus.io/version", "of an unknown version")
    return Finding("Prometheus", "ok", f"its operator's objects are {version}")
