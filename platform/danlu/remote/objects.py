"""What a job and a service have in common there: a namespace, pods, a name that may not be one, an end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from danlu.errors import ClusterError
from danlu.k8s.pods import KIND, NAME, Object

if TYPE_CHECKING:
    from danlu.k8s.kubeconfig import Kube


def in_its_namespace(kube: Kube, one: Object) -> Kube:
    """The connection in the namespace of an object."""
    return replace(kube, namespace=one["metadata"].get("namespace") or kube.namespace)


def delete_object(kube: Kube, kind: str, name: str) -> str:
    """Delete a job or a service and its pods; ClusterError if there is none."""
    from danlu.k8s import client

    if not client.delete(kube, kind, name):
        raise unknown(kube, kind, name)
    return f"{name} is deleted; what it stored stays"


def pods_of(kube: Kube, kind: str, name: str) -> list[Object]:
    """The pods of a job or of a service, which may have one name: what a job trains, a service of its name often serves."""
    from danlu.k8s import client

    return client.find(kube, "Pod", {KIND: kind, NAME: name})


def unknown(kube: Kube, kind: str, name: str) -> ClusterError:
    """What to say of a name that nothing of a kind has."""
    from danlu.k8s import client

    there = [one["metadata"]["name"] for one in client.find(kube, kind)]
    what = {"RayJob": "job", "RayService": "service"}[kind]
    return ClusterError(
        f"there is no {what} named {name!r} in namespace {kube.namespace}" + (f"; there is: {', '.join(there[:8])}" if there else ""),
        where=f"context {kube.context}",
        fix="--namespace or --context for another place" + ("; --on local --storage URI shows what a job left" if kind == "RayJob" else ""),
    )
