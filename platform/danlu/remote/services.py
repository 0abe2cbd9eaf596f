"""Services on Kubernetes: deploy, list, show, scale, roll back, delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from danlu.errors import ClusterError, DanluError, SpecError
from danlu.k8s.manifests import render
from danlu.k8s.pods import KIND, Object
from danlu.k8s.rayservice import GATEWAY_API, keeps_its_pods, ray_service, upgrade
from danlu.k8s.status import ServiceStatus, queue_of, service_status
from danlu.remote.objects import delete_object, find_object, in_its_namespace, pods_of
from danlu.spec.files import dump, parse
from danlu.spec.serve import Service

if TYPE_CHECKING:
    from danlu.k8s.kubeconfig import Kube

SPEC, PREVIOUS = "danlu.ai/spec", "danlu.ai/previous-spec"
"""Annotations of a RayService: the spec it was deployed from, and the one before it."""


def deploy(kube: Kube, service: Service, *, dry_run: bool = False) -> str:
    """Make or change a service; how it is brought there. The spec before is kept beside it, for `rollback`."""
    from danlu.k8s import client

    one = ray_service(service)
    kube = in_its_namespace(kube, one)
    _check_upgrade(kube, one)
    before = client.get(kube, "RayService", service.name)
    last = (before or {}).get("metadata", {}).get("annotations", {}).get(SPEC)
    notes = {SPEC: dump(service)}
    if last is not None and last != notes[SPEC]:
        notes[PREVIOUS] = last
    elif before is not None and PREVIOUS in before["metadata"].get("annotations", {}):
        notes[PREVIOUS] = before["metadata"]["annotations"][PREVIOUS]
    asked = {**one, "metadata": {**one["metadata"], "annotations": notes}}
    client.apply(kube, asked, dry_run=dry_run)
    if before is None:
        return "new: it answers once its pods are up"
    was = before if last is None else _rendered(last)
    if was and keeps_its_pods(was, one) and not dry_run:
        _set_pods(kube, before, one)
    if last == notes[SPEC]:
        return "as it was"
    return upgrade(was, one) if was else "changed: KubeRay finds out how, since the spec before is another Danlu's"


def _check_upgrade(kube: Kube, one: Object) -> None:
    """ClusterError for an upgrade that the cluster has no means for: KubeRay would take it, and bring up nothing."""
    from danlu.k8s import client

    if one["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade" and not client.serves(kube, GATEWAY_API):
        raise ClusterError(
            "an incremental upgrade moves requests by the Gateway API, which this cluster does not have",
            where="cluster.upgrade.kind",
            fix="--set 'cluster.upgrade={kind: new_cluster}' (twice the GPUs for a while), or the Gateway API and a controller for it",
        )


def _set_pods(kube: Kube, before: Object, after: Object) -> None:
    """Give the clusters there are the pods that are asked for now: KubeRay does so for new ones only (ray-project/kuberay#4568)."""
    from danlu.k8s import client

    (asked,) = after["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    wanted = {name: asked[name] for name in ("minReplicas", "maxReplicas")}
    if asked["minReplicas"] == asked["maxReplicas"]:  # else how many there are is Ray's autoscaler's to say
        wanted["replicas"] = asked["replicas"]
    clusters = [(before.get("status") or {}).get(which) or {} for which in ("activeServiceStatus", "pendingServiceStatus")]
    for name in [str(one["rayClusterName"]) for one in clusters if one.get("rayClusterName")]:
        cluster = client.get(kube, "RayCluster", name)
        if cluster and any(cluster["spec"]["workerGroupSpecs"][0].get(field) != number for field, number in wanted.items()):
            client.set_values(kube, "RayCluster", name, {f"/spec/workerGroupSpecs/0/{field}": number for field, number in wanted.items()})


def _rendered(spec: str) -> Object | None:
    """The RayService of a spec that was deployed; None if this Danlu cannot read it."""
    try:
        return ray_service(parse(Service, spec))
    except DanluError:
        return None


def services(kube: Kube) -> list[ServiceStatus]:
    """Every service of ours in the namespace, by its own status alone."""
    from danlu.k8s import client

    return [service_status(one) for one in client.find(kube, "RayService", {KIND: "serve"})]


def service(kube: Kube, name: str) -> ServiceStatus:
    """A service's phase, and why."""
    from danlu.k8s import client

    one = find_object(kube, "RayService", name)
    workloads = client.find(kube, "Workload") if queue_of(one) else []
    return service_status(one, pods_of(kube, "serve", name), client.find(kube, "Event"), workloads)


def scale(kube: Kube, name: str, *, min_replicas: int | None, max_replicas: int | None) -> tuple[Service, str]:
    """Change how many replicas a service has; the spec it has now, and how it is brought there."""
    spec = _deployed(kube, name, SPEC)
    changes = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    overrides = [f"autoscaling.{field}={number}" for field, number in changes.items() if number is not None]
    if not overrides:
        raise SpecError("neither --min nor --max is given", where="services scale", fix=f"danlu services scale {name} --max 8")
    changed = parse(Service, dump(spec), overrides, source=f"the spec of {name}")
    return changed, deploy(kube, changed)


def rollback(kube: Kube, name: str) -> tuple[Service, str]:
    """Go back to the spec that was deployed before, and how; again goes forward."""
    spec = _deployed(kube, name, PREVIOUS)
    return spec, deploy(kube, spec)


def delete_service(kube: Kube, name: str) -> str:
    """Delete a service and its pods. Its bundles stay in the storage."""
    return delete_object(kube, "RayService", name)


def dry_run(kube: Kube, service: Service) -> tuple[Sequence[str], str]:
    """Ask the API server whether it would take a service's objects; their names, and how it would be brought there."""
    how = deploy(kube, service, dry_run=True)
    return [f"{one['kind']} {one['metadata']['name']}" for one in render(service)], how


def _deployed(kube: Kube, name: str, annotation: str) -> Service:
    text = find_object(kube, "RayService", name)["metadata"].get("annotations", {}).get(annotation)
    if text is None:
        what = "was deployed once only: there is nothing before it" if annotation == PREVIOUS else "was not deployed by `danlu serve`"
        raise ClusterError(f"{name} {what}", where="services", fix="danlu serve SPEC --on k8s; a chart's service is changed in its values")
    return parse(Service, text, source=f"the spec of {name}")
