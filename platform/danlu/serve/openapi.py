"""The service's OpenAPI document, and a page that shows it without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from danlu import __version__
from danlu.spec.serve import Limits


def openapi(model: str, labels: Sequence[str], limits: Limits) -> dict[str, Any]:
    """OpenAPI 3.1 of what a replica answers."""
    text = {"type": "string", "minLength": 1}
    pair = {"type": "object", "properties": {"text": text, "text_pair": text}, "required": ["text"], "additionalProperties": False}
    one = {"oneOf": [text, pair]}
    request = {
        "type": "object",
        "required": ["input"],
        "properties": {
            "model": {"type": ["string", "null"], "description": f"Leave it out, or {model!r}."},
            "input": {"oneOf": [*one["oneOf"], {"type": "array", "items": one, "minItems": 1, "maxItems": limits.max_inputs}]},
        },
    }
    answer = {
        "type": "object",
        "properties": {
            "index": {"type": "integer"},
            "label": {"type": "string", "enum": list(labels)},
            "probs": {"type": "array", "items": {"type": "number"}, "description": "In the order of `labels`."},
            "num_classes": {"type": "integer"},
        },
    }
    response = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "list"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {"type": "array", "items": answer},
            "labels": {"type": "array", "items": {"type": "string"}},
            "usage": {"type": "object"},
        },
    }
    error = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "integer"},
                },
            }
        },
    }
    refused = {
        status: {"description": told, "content": {"application/json": {"schema": error}}}
        for status, told in {
            "400": "The body cannot be read or a field is wrong",
            "404": "No such model",
            "413": f"More than {limits.max_inputs} texts or {limits.max_body_bytes:,} bytes",
            "415": "Not application/json",
            "503": "Too busy; Retry-After says when to come back",
            "504": "No answer in time",
        }.items()
    }
    example = {"model": model, "input": ["wheat exports rose"]}
    classify = {
        "summary": "Label texts",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request, "example": example}}},
        "responses": {"200": {"description": "One answer a text", "content": {"application/json": {"schema": response}}}, **refused},
    }

    def plain(summary: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": {"description": "OK"}}}}

    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": __version__},
        "paths": {
            "/v1/classify": {"post": classify},
            "/v1/models": plain("The models that are served here"),
            "/healthz": plain("Whether the process is alive"),
            "/readyz": plain("Whether the model has answered its probes as evaluated"),
        },
    }


def docs_page(model: str) -> str:
    """A page of routes with a form to try one; no script from elsewhere."""
    rows = "".join(
        f"<tr><td><code>{method} {path}</code></td><td>{what}</td></tr>"
        for method, path, what in (
            ("POST", "/v1/classify", "label texts"),
            ("GET", "/v1/models", "what is served here"),
            ("GET", "/healthz", "alive"),
            ("GET", "/readyz", "ready: the model has answered its probes as evaluated"),
            ("GET", "/openapi.json", "all of it for machines"),
        )
    )
    name = json.dumps(model)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(model)} · Danlu</title><style>
:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:760px;margin:40px auto;padding:0 20px}}
td{{padding:4px 18px 4px 0}}textarea{{width:100%;height:90px;font:inherit}}pre{{overflow-x:auto;border:1px solid #8886;border-radius:6px;padding:10px}}
</style></head><body><h1>{escape(model)}</h1><table>{rows}</table><p><a href="openapi.json">openapi.json</a></p>
<h2>Try it</h2><textarea id="t" aria-label="A text to classify">wheat exports rose</textarea><p><button id="b">Classify</button></p><pre id="o"></pre>
<script>b.onclick=async()=>{{const r=await fetch("v1/classify",{{method:"POST",headers:{{"content-type":"application/json"}},
body:JSON.stringify({{model:{name},input:[t.value]}})}});o.textContent=JSON.stringify(await r.json(),null,1)}}</script></body></html>"""
