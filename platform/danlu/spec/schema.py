"""JSON Schema of any spec: draft-07, closed, with the tags of unions required. The only place a schema is made."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The schema of a spec; accepts and refuses what pydantic does, but for rules that span fields and `8.0`, JSON Schema's integer."""
    document = kind.model_json_schema(mode="validation")
    _require_tags(document)
    _draft07(document)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **document}


def _require_tags(node: Any) -> None:
    """pydantic needs a union's tag, but its schema calls it optional because it has a default."""
    definitions = node.get("$defs", {})

    def visit(part: Any) -> None:
        if isinstance(part, dict):
            for reference in part.get("discriminator", {}).get("mapping", {}).values():
                variant = definitions[reference.rpartition("/")[2]]
                tag = part["discriminator"]["propertyName"]
                variant["required"] = sorted({*variant.get("required", []), tag})
            for value in part.values():
                visit(value)
        elif isinstance(part, list):
            for value in part:
                visit(value)

    visit(node)


def _draft07(node: Any) -> None:
    """`$defs` and `discriminator` are later than draft-07 or OpenAPI's; a `$ref` hides what stands beside it there."""
    if isinstance(node, dict):
        if "$defs" in node:
            node["definitions"] = node.pop("$defs")
        node.pop("discriminator", None)
        if isinstance(node.get("$ref"), str):
            node["$ref"] = node["$ref"].replace("#/$defs/", "#/definitions/")
            if len(node) > 1:
                node["allOf"] = [{"$ref": node.pop("$ref")}]
        for value in node.values():
            _draft07(value)
    elif isinstance(node, list):
        for value in node:
            _draft07(value)
