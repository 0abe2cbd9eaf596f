"""The service's OpenAPI document, and a page that shows it without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from danlu import __version__
from danlu.serve.encoder_wire import Wire
from danlu.spec.serve import Limits


def openapi(model: str, wires: Mapping[str, Wire], labels: Sequence[str], limits: Limits) -> dict[str, Any]:
    """OpenAPI 3.1 of what a replica answers."""
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

    def asked(wire: Wire) -> dict[str, Any]:
        request, response = wire.schemas(labels, limits)
        example = json.loads(wire.example) | {"model": model}
        return {
            "post": {
                "summary": wire.summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": request, "example": example}}},
                "responses": {
                    "200": {"description": "Answers, in order", "content": {"application/json": {"schema": response}}},
                    **refused,
                },
            }
        }

    def plain(summary: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": {"description": "OK"}}}}

    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": __version__},
        "paths": {
            **{path: asked(wire) for path, wire in wires.items()},
            "/v1/models": plain("The models that are served here"),
            "/healthz": plain("Whether the process is alive"),
            "/readyz": plain("Whether the model has answered its probes as evaluated"),
        },
    }


def docs_page(model: str, wires: Mapping[str, Wire]) -> str:
    """A page of routes with a form to try the first; no script from elsewhere."""
    path, wire = next(iter(wires.items()))
    sample = escape(json.dumps(json.loads(wire.example) | {"model": model}, ensure_ascii=False, indent=1))
    rows = "".join(
        f"<tr><td><code>{method} {path}</code></td><td>{what}</td></tr>"
        for method, path, what in (
            *(("POST", path, wire.summary.lower()) for path, wire in wires.items()),
            ("GET", "/v1/models", "what is served here"),
            ("GET", "/healthz", "alive"),
            ("GET", "/readyz", "ready: the model has answered its probes as evaluated"),
            ("GET", "/openapi.json", "all of it for machines"),
        )
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(model)} · Danlu</title><style>
:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:760px;margin:40px auto;padding:0 20px}}
td{{padding:4px 18px 4px 0}}textarea{{width:100%;height:150px;font:inherit}}pre{{overflow-x:auto;border:1px solid #8886;border-radius:6px;padding:10px}}
</style></head><body><h1>{escape(model)}</h1><table>{rows}</table><p><a href="openapi.json">openapi.json</a></p>
<h2>Try it</h2><textarea id="t" aria-label="The body of a request">{sample}</textarea><p><button id="b">POST {path}</button></p><pre id="o"></pre>
<script>b.onclick=async()=>{{const r=await fetch("{path.removeprefix("/")}",{{method:"POST",headers:{{"content-type":"application/json"}},
body:t.value}});o.textContent=JSON.stringify(await r.json(),null,1)}}</script></body></html>"""
