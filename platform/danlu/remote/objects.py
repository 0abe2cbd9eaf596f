"""What a job and a service have in common there: a namespace, pods, a name that may not be one, an end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from danlu.k8s.pods import KIND, NAME, Object
from danlu.k8s.status import not_there

if TYPE_CHECKING:
    from danlu.k8s.kubeconfig import Kube


WHAT = {"RayJob": ("job", "train"), "RayService": ("service", "serve")}
"""What a person calls it, and the label of those that are Danlu's: others live beside them."""


def in_its_namespace(kube: Kube, one: Object) -> Kube:
    """The connection in the namespace of an object."""
    return replace(kube, namespace=one["metadata"].get("namespace") or kube.namespace)


def find_object(kube: Kube, kind: str, name: str) -> Object:
    """A job or a service of ours; ClusterError, which says what there is, if there is none of that name."""
    from danlu.k8s import client

    what, label = WHAT[kind]
    found = client.get(kube, kind, name)
    if found is not None and found["metadata"].get("labels", {}).get(KIND) == label:
        return found
    there = [one["metadata"]["name"] for one in client.find(kube, kind, {KIND: label})]
    other = f", but a {kind} that is not Danlu's" if found is not None else ""
    left = "; --on local --storage URI shows what a job left" if kind == "RayJob" else ""
    raise not_there(
        f"there is no {what} named {name!r} in namespace {kube.namespace}{other}",
        name,
        there,
        where=f"context {kube.context}",
        fix=f"--namespace or --context for another place{left}",
    )


def delete_object(kube: Kube, kind: str, name: str) -> str:
    """Delete a job or a service and its pods; ClusterError if there is none."""
    from danlu.k8s import client

    find_object(kube, kind, name)
    client.delete(kube, kind, name)
    return f"{name} is deleted; what it stored stays"


def pods_of(kube: Kube, kind: str, name: str) -> list[Object]:
    """The pods of a job or of a service, which may have one name: what a job trains, a service of its name often serves."""
    from danlu.k8s import client

    return client.find(kube, "Pod", {KIND: kind, NAME: name})
