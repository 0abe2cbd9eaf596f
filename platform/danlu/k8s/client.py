"""The only file that talks to a Kubernetes cluster: objects in and out over a connection of kubeconfig.py, its errors said as ours."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import urllib3
from kubernetes.client import ApiException

from danlu.errors import ClusterError
from danlu.k8s.kubeconfig import LOG_IN, Kube
from danlu.k8s.pods import Object

FIELD_MANAGER = "danlu"
RETRIES = 5
"""Tries of one request that the server was too busy for."""
RETRY_S = 0.5
"""Wait before the second try; it doubles, up to RETRY_MAX_S, and what the server asks for in Retry-After comes first."""
RETRY_MAX_S = 15.0
TIMEOUT_S = 30.0
"""How long a server may take to answer; one that is silent is asked for twice as long."""
WATCH_S = 300
"""The server ends a watch after so long; it is then begun anew."""
OUTAGE_S = 600.0
"""How long a watch that has begun waits for a server that does not answer: its own upgrade takes minutes."""
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
TOO_BUSY = (429, 500, 502, 503, 504)

PATHS = {
    "RayJob": ("/apis/ray.io/v1", "rayjobs"),
    "RayService": ("/apis/ray.io/v1", "rayservices"),
    "RayCluster": ("/apis/ray.io/v1", "rayclusters"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
    "Workload": ("/apis/kueue.x-k8s.io/v1beta2", "workloads"),
}
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
JSON_PATCH = "application/json-patch+json"


class Refused(ClusterError):
    """What the API server answered instead of doing it. `status` is the HTTP status, `reason` Kubernetes' word for it."""

    def __init__(self, problem: str, *, where: str = "", fix: str = "", status: int = 0, reason: str = "") -> None:
        super().__init__(problem, where=where, fix=fix)
        self.status, self.reason = status, reason


def create(kube: Kube, one: Object, *, dry_run: bool = False) -> Object:
    """Make an object; Refused with status 409 if there is one of its name."""
    query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
    return _ask(kube, "POST", _path(kube, one["kind"], _namespace(kube, one)), query, one)


def apply(kube: Kube, one: Object, *, dry_run: bool = False) -> Object:
    """Make an object, or change the fields of it that are ours (server-side apply)."""
    query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
    path = _path(kube, one["kind"], _namespace(kube, one), one["metadata"]["name"])
    return _ask(kube, "PATCH", path, query, one, APPLY)


def patch(kube: Kube, kind: str, name: str, changes: Object) -> Object:
    """Merge changes into an object. With `metadata.resourceVersion` among them, Refused with status 409 if it has changed meanwhile."""
    return _ask(kube, "PATCH", _path(kube, kind, kube.namespace, name), {"fieldManager": FIELD_MANAGER}, changes, MERGE)


def set_values(kube: Kube, kind: str, name: str, values: Mapping[str, Any]) -> Object:
    """Change single values of an object, each by its path: /spec/workerGroupSpecs/0/maxReplicas."""
    changes = [{"op": "add", "path": path, "value": value} for path, value in values.items()]
    return _ask(kube, "PATCH", _path(kube, kind, kube.namespace, name), {"fieldManager": FIELD_MANAGER}, changes, JSON_PATCH)


def get(kube: Kube, kind: str, name: str) -> Object | None:
    """An object, or None; Refused where the cluster does not know the kind."""
    if not NAME.fullmatch(name):  # in a path it would be another question
        return None
    try:
        return _ask(kube, "GET", _path(kube, kind, kube.namespace, name))
    except Refused as refused:
        if refused.reason == "NotFound":
            return None
        raise


def find(kube: Kube, kind: str, labels: Mapping[str, str] | None = None, fields: Mapping[str, str] | None = None) -> list[Object]:
    """Objects of a kind by labels, or by fields. No Workloads where there is no Kueue."""
    selectors = {"labelSelector": _selector(labels), "fieldSelector": _selector(fields)}
    query = {name: text for name, text in selectors.items() if text}
    try:
        answer = _ask(kube, "GET", _path(kube, kind, kube.namespace), query)
    except Refused as refused:
        if refused.status == 404 and kind == "Workload":
            return []
        raise
    # A list's items leave out what the list says of all of them.
    root = PATHS[kind][0].removeprefix("/apis/").removeprefix("/api/")
    return [{"apiVersion": root, "kind": kind, **one} for one in answer["items"]]


def delete(kube: Kube, kind: str, name: str) -> bool:
    """Delete an object and what it owns; False if there was none."""
    if not NAME.fullmatch(name):
        return False
    try:
        _call(kube, "DELETE", _path(kube, kind, kube.namespace, name), {"propagationPolicy": "Background"})
    except Refused as refused:
        if refused.reason == "NotFound":
            return False
        raise
    return True


def watch(kube: Kube, kind: str, name: str, *, timeout_s: float | None = None) -> Iterator[Object | None]:
    """An object now and after each change, None once it is deleted. A connection that breaks is made again; ends after `timeout_s`."""
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    failures, answered = 0, -OUTAGE_S
    while ends is None or time.monotonic() < ends:
        try:
            one = get(kube, kind, name)
        except ClusterError as error:
            if not _may_pass(error) or time.monotonic() - answered > OUTAGE_S:
                raise
            failures += 1
            time.sleep(min(RETRY_MAX_S, RETRY_S * 2 ** min(failures, 5)))
            continue
        answered = time.monotonic()
        yield one
        if one is None:
            return
        left = WATCH_S if ends is None else max(1, min(WATCH_S, int(ends - time.monotonic())))
        query = {"watch": "true", "fieldSelector": f"metadata.name={name}", "timeoutSeconds": str(left)}
        if version := one["metadata"].get("resourceVersion"):
            query["resourceVersion"] = version
        try:
            response = _call(kube, "GET", _path(kube, kind, kube.namespace), query, timeout=(TIMEOUT_S, left + TIMEOUT_S))
            for event in _lines(response):
                change = json.loads(event)
                if change["type"] == "ERROR":  # 410: the version is too old to go on from
                    break
                failures = 0
                if change["type"] in ("ADDED", "MODIFIED") and change["object"]["metadata"]["name"] == name:
                    yield change["object"]
                elif change["type"] == "DELETED" and change["object"]["metadata"]["name"] == name:
                    yield None
                    return
        except ClusterError as error:
            if not _may_pass(error):
                raise
            failures += 1
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            failures += 1
        # What was missed meanwhile is in the next `get`. Waits grow, so that a server that ends watches at once is not flooded.
        time.sleep(min(RETRY_MAX_S, RETRY_S * 2 ** min(failures, 5)))


def _may_pass(error: ClusterError) -> bool:
    """Whether it is the server's or the network's trouble, and not an answer."""
    return not isinstance(error, Refused) or error.status in TOO_BUSY


def pod_log(kube: Kube, pod: str, *, container: str | None = None, follow: bool = False, tail: int | None = None) -> Iterator[str]:
    """Lines of a pod's log; with `follow`, as they are written, until its container ends."""
    query = {"follow": "true"} if follow else {}
    query |= {"container": container} if container else {}
    query |= {"tailLines": str(tail)} if tail is not None else {}
    path = f"{_path(kube, 'Pod', kube.namespace, pod)}/log"
    told = 0
    while True:
        try:
            for number, line in enumerate(_lines(_call(kube, "GET", path, query, timeout=(TIMEOUT_S, None) if follow else TIMEOUT_S))):
                if number >= told:
                    told += 1
                    yield line
            return
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if not follow:
                raise ClusterError(f"the log of {pod} broke off: {_cause(error)}", where=f"context {kube.context}") from error
            _pause(RETRY_S)  # and once more from the beginning: what has been told is left out


def may(kube: Kube, verb: str, group: str, resource: str) -> bool:
    """True if this user may do that in the namespace (SelfSubjectAccessReview)."""
    attributes = {"namespace": kube.namespace, "verb": verb, "group": group, "resource": resource}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
    return bool(_ask(kube, "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {}, review)["status"]["allowed"])


def serves(kube: Kube, group: str) -> bool:
    """Whether the cluster has an API: gateway.networking.k8s.io. Whoever is known to it may ask."""
    try:
        _call(kube, "GET", f"/apis/{group}")
    except Refused as refused:
        if refused.status == 404:
            return False
        raise
    return True


def crd(kube: Kube, name: str) -> Object | None:
    """A CustomResourceDefinition, or None."""
    try:
        return _ask(kube, "GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
    except Refused as refused:
        if refused.status == 404:
            return None
        raise


def _call(
    kube: Kube,
    method: str,
    path: str,
    query: Mapping[str, str] | None = None,
    body: Object | list[Object] | None = None,
    content_type: str = "application/json",
    *,
    timeout: Any = TIMEOUT_S,
) -> Any:
    """The open response of a request; Refused for what the server refuses. What it is too busy for is asked again."""
    headers = {"Accept": "application/json", "Content-Type": content_type}
    began, wait = time.monotonic(), RETRY_S
    for attempt in range(1, RETRIES + 1):
        request = kube.api.param_serialize(
            method, path, query_params=list((query or {}).items()), header_params=dict(headers), body=body, auth_settings=["BearerToken"]
        )
        try:
            response = kube.api.rest_client.request(*request[:3], request[3], request[4], _request_timeout=timeout)
        except ApiException as error:  # what it makes of TLS: certificates do not change by asking again
            told = f"no secure connection to {kube.api.configuration.host}: {str(error.reason).splitlines()[-1]}"
            fix = f"{LOG_IN}; the cluster's certificate-authority and the user's certificate stand there"
            raise ClusterError(told, where=f"context {kube.context}", fix=fix) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # A create or a change that got lost on the way may have been done: only a question is asked twice.
            if method == "GET" and attempt < RETRIES and time.monotonic() - began < 2 * TIMEOUT_S:
                _pause(wait)
                wait = min(RETRY_MAX_S, 2 * wait)
                continue
            raise ClusterError(
                f"no answer from {kube.api.configuration.host}: {_cause(error)}",
                where=f"context {kube.context}",
                fix="kubectl cluster-info says whether it is the cluster, or this machine's way to it",
            ) from error
        if response.status < 400:
            return response.response
        refused = _refused(kube, method, path, response)
        # 429 was not done, by its meaning. After a 500 a create may have been: asking again then says 409, which is the truth.
        if refused.status not in TOO_BUSY or attempt == RETRIES:
            raise refused
        asked = response.headers.get("Retry-After", "")
        _pause(float(asked) if asked.isdecimal() else wait)
        wait = min(RETRY_MAX_S, 2 * wait)
    raise AssertionError("unreachable")


def _pause(seconds: float) -> None:
    time.sleep(min(RETRY_MAX_S, seconds) * random.uniform(0.8, 1.0))


def _refused(kube: Kube, method: str, path: str, response: Any) -> Refused:
    text = response.read().decode(errors="replace")
    try:
        status = json.loads(text)
    except ValueError:
        status = {}
    said = status.get("message") or text.strip()[:500] or f"HTTP {response.status}"
    reason = status.get("reason") or ""
    where = f"context {kube.context}, namespace {kube.namespace}"
    fix = {
        401: f"{LOG_IN}: the credentials are not valid, or no longer",
        403: f"ask for the right to {_verb(method, path)} in namespace {kube.namespace}; charts/danlu has a Role for it",
        422: "the cluster's KubeRay may be older than 1.7; `danlu doctor` compares",
        429: "the API server is overloaded; try again later",
    }.get(response.status, "")
    if response.status == 404 and (status.get("details") or {}).get("kind") == "namespaces":
        fix = "--namespace for one that is there: kubectl get namespaces; or kubectl create namespace"
    elif response.status == 404 and not reason:  # a path that the server does not know, not an object
        fix = "KubeRay is not installed there: helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"
    return Refused(said, where=where, fix=fix, status=response.status, reason=reason)


def _verb(method: str, path: str) -> str:
    verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "GET": "get, list and watch"}
    resource = next((part for part in reversed(path.split("/")) if part in {plural for _, plural in PATHS.values()}), "that")
    return f"{verbs[method]} {resource}{'/log' if path.endswith('/log') else ''}"


def _cause(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return str(inner or error).rpartition(": ")[2] or type(error).__name__


def _path(kube: Kube, kind: str, namespace: str, name: str | None = None) -> str:
    root, plural = PATHS[kind]
    return f"{root}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def _namespace(kube: Kube, one: Object) -> str:
    return str(one["metadata"].get("namespace") or kube.namespace)


def _selector(pairs: Mapping[str, str] | None) -> str:
    return ",".join(f"{name}={value}" for name, value in (pairs or {}).items())


def _ask(
    kube: Kube,
    method: str,
    path: str,
    query: Mapping[str, str] | None = None,
    body: Object | list[Object] | None = None,
    content_type: str = "application/json",
) -> Object:
    """What an API server answers: always an object. Else something else answers there, a proxy's login page for instance."""
    response = _call(kube, method, path, query, body, content_type)
    try:
        found = json.loads(response.data)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        kind = response.headers.get("Content-Type") or "no content type"
        told = f"{kube.api.configuration.host} answers with HTTP {response.status} and {kind}, and not as a Kubernetes API does"
        raise ClusterError(told, where=f"context {kube.context}", fix="the cluster's `server:` in the kubeconfig, or the proxy before it")
    return found


def _lines(response: Any) -> Iterator[str]:
    """Lines of a body as they come; the connection is given back however the reading ends."""
    rest = b""
    try:
        for chunk in response.stream(amt=None, decode_content=False):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    yield line.decode(errors="replace")
        if rest.strip():
            yield rest.decode(errors="replace")
    finally:
        response.close()
