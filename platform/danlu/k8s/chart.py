"""What is generated into charts/danlu: its values with their documentation, their schema, and what specs leave out. Pure."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from typing import Annotated, Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from danlu.k8s import pods
from danlu.spec.cluster import Head, Incremental, JobCluster, Rules, Ttl
from danlu.spec.install import Install
from danlu.spec.parallel import Workers
from danlu.spec.schema import schema
from danlu.spec.serve import Autoscaling, Encoder, Limits

WIDTH = 138
"""Of a comment in values.yaml."""


def values() -> str:
    """values.yaml: every value with its default and what it is."""
    lines = ["# The values of charts/danlu, by `python -m danlu.generate`. values.schema.json holds every field of every spec.", ""]
    for name, field in Install.model_fields.items():
        lines += [*_about(name, field), ""]
    return "\n".join(lines).rstrip() + "\n"


def values_schema() -> dict[str, Any]:
    """values.schema.json: Install's, with Helm's own `global`, and with `cluster:` where there is a spec."""
    document = schema(Install)
    document["properties"]["global"] = {"type": "object", "description": "Helm's own; not read here."}
    for spec, cluster in (("TrainJob", "JobCluster"), ("Service", "ServiceCluster")):
        definition = document["definitions"][spec]
        definition["properties"]["cluster"] = {"$ref": f"#/definitions/{cluster}"}
        definition["required"] = [*definition["required"], "cluster"]
    return document


def facts() -> str:
    """templates/_spec.tpl: the defaults of specs and the constants of pods, as JSON for the templates."""
    found = {
        "ray_version": pods.RAY_VERSION,
        "ray_env": pods.RAY_ENV,
        "head_ports": [{"name": name, "port": port} for name, port in pods.HEAD_PORTS.items()],
        "writable": [{"name": name, "path": path} for name, path in pods.WRITABLE.items()],
        "spot": {name: {"label": label, "value": value, "taint": taint} for name, (label, value, taint) in pods.SPOT.items()},
        "head": _defaults(Head),
        "memory": JobCluster.model_fields["memory"].default,
        "workers": _defaults(Workers),
        "autoscaling": _defaults(Autoscaling),
        "engine": _defaults(Encoder),
        "tls_env": pods.TLS_ENV,
        "certificate": pods.CERTIFICATE,
        "drain_timeout_s": Limits.model_fields["drain_timeout_s"].default,
        "leave_s": pods.LEAVE_S,
        "end_s": pods.END_S,
        "request_timeout_s": Limits.model_fields["request_timeout_s"].default,
        "cleanup": {"ttl": _defaults(Ttl), "rules": _defaults(Rules)},
        "incremental": {name: value for name, value in _defaults(Incremental).items() if name not in ("kind", "gateway_class")},
    }
    said = "What specs leave out and what pods have, by `python -m danlu.generate`."
    return f'{{{{/* {said} */}}}}\n{{{{- define "danlu.facts" -}}}}\n{json.dumps(found, indent=1)}\n{{{{- end }}}}\n'


def _defaults(spec: type[BaseModel]) -> dict[str, Any]:
    return {
        name: field.default.model_dump(mode="json") if isinstance(field.default, BaseModel) else field.default
        for name, field in spec.model_fields.items()
        if not field.is_required()
    }


def _about(name: str, field: FieldInfo) -> list[str]:
    kinds = _models(field.annotation)
    said = field.description or (kinds[0].__doc__ if kinds else "") or ""
    comment = [f"# {line}" for line in textwrap.wrap(_words(said), WIDTH)]
    if kinds and isinstance(field.default, BaseModel):
        inner = [f"  {line}" for key, part in kinds[0].model_fields.items() for line in _about(key, part)]
        return [*comment, f"{name}:", *inner]
    for kind in kinds:
        if kind.__module__.endswith("install"):
            of = f" with kind: {kind.model_fields['kind'].default}. {_words(kind.__doc__ or '')}" if len(kinds) > 1 else ":"
            comment += [
                f"# Its fields{of}",
                *(f"#   {key}: {_words(_field_words(part))}" for key, part in kind.model_fields.items() if key != "kind"),
            ]
    return [*comment, f"{name}: {_yaml(field.default)}"]


def _field_words(field: FieldInfo) -> str:
    default = "needed" if field.is_required() else f"default {_yaml(field.default)}"
    return f"{default}. {field.description}" if field.description else default


def _words(text: str) -> str:
    return " ".join(text.split())


def _yaml(value: object) -> str:
    if isinstance(value, list):
        value = [one.model_dump(mode="json", exclude_defaults=True) if isinstance(one, BaseModel) else one for one in value]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The specs in `X`, `list[X]`, `X | None` or a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, types.UnionType, typing.Union, Annotated):
        return [found for part in typing.get_args(annotation) for found in _models(part)]
    return []
