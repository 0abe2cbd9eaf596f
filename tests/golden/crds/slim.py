"""Makes the JSON files here from KubeRay's CRDs: `python tests/golden/crds/slim.py FOLDER`. Version v1, without descriptions and status,
each part that stands there several times once. What they accept stays the same.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def slim(crd: dict[str, Any]) -> dict[str, Any]:
    """The v1 schema of a CRD with its repeated parts under `definitions`."""
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = _without_descriptions(version["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    counts: Counter[str] = Counter()
    _count(schema, counts)
    names = {text: f"d{i}" for i, text in enumerate(text for text, number in counts.items() if number > 1 and len(text) > 200)}
    definitions = {names[text]: _shared(json.loads(text), names, top=True) for text in names}
    return {"kind": crd["spec"]["names"]["kind"], "schema": _shared(schema, names), "definitions": definitions}


def _without_descriptions(node: Any, *, names: bool = False) -> Any:
    if isinstance(node, dict):
        return {
            key: _without_descriptions(value, names=key == "properties" and not names)
            for key, value in node.items()
            if names or key not in ("description", "x-kubernetes-validations")
        }
    return [_without_descriptions(value) for value in node] if isinstance(node, list) else node


def _count(node: Any, counts: Counter[str]) -> None:
    if isinstance(node, dict):
        if "type" in node and isinstance(node["type"], str):
            counts[json.dumps(node, sort_keys=True)] += 1
        for value in node.values():
            _count(value, counts)
    elif isinstance(node, list):
        for value in node:
            _count(value, counts)


def _shared(node: Any, names: dict[str, str], *, top: bool = False) -> Any:
    if isinstance(node, dict):
        name = names.get(json.dumps(node, sort_keys=True))
        if name and not top:
            return {"$ref": f"#/definitions/{name}"}
        return {key: _shared(value, names) for key, value in node.items()}
    return [_shared(value, names) for value in node] if isinstance(node, list) else node


if __name__ == "__main__":
    for kind in ("rayjobs", "rayservices"):
        crd = yaml.load((Path(sys.argv[1]) / f"ray.io_{kind}.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (HERE / f"ray.io_{kind}.json").write_text(json.dumps(slim(crd), indent=1, sort_keys=True) + "\n")
