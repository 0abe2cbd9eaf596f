"""The service's OpenAPI document, and a page that shows it without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pydantic.json_schema import models_json_schema

from danlu import __version__
from danlu.serve import encoder_wire
from danlu.serve.openai.chat import ChatRequest
from danlu.serve.openai.common import Wire
from danlu.serve.openai.completions import (
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from danlu.spec.serve import Limits

Paths = dict[str, Any]
Schemas = dict[str, Any]

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string"], "description": "OpenAI's word where it has one, else the status."},
            },
        }
    },
}


def openapi(model: str, paths: Paths, schemas: Schemas) -> dict[str, Any]:
    """OpenAPI 3.1 of what a replica answers: an API's own paths, and those that every replica has."""

    def plain(summary: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "security": [], "responses": {"200": {"description": "OK"}}}}

    one = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    found = {"200": {"description": "OK"}, **_refused({"404": "No such model"})}
    bearer = {"type": "http", "scheme": "bearer", "description": "A key of `danlu keys`, where the service asks for one."}
    return {
        "openapi": "3.1.0",
        "info": {"title": model, "version": __version__},
        "paths": {
            **paths,
            "/v1/models": {"get": {"summary": "The models that are served here", "responses": {"200": {"description": "OK"}}}},
            "/v1/models/{model}": {"get": {"summary": "One model", "parameters": [one], "responses": found}},
            "/healthz": plain("Whether the process is alive"),
            "/readyz": plain("Whether the model has answered its probes as evaluated"),
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": bearer}},
        "security": [{}, {"key": []}],
    }


def encoder_paths(model: str, wires: Mapping[str, encoder_wire.Wire], labels: Sequence[str], limits: Limits) -> Paths:
    """The routes of a task whose requests are answered as a whole."""
    refused = _refused(
        {
            "400": "The body cannot be read or a field is wrong",
            "401": "No valid key",
            "403": "The key is for other models",
            "404": "No such model",
            "413": f"More than {limits.max_inputs} texts or {limits.max_body_bytes:,} bytes",
            "415": "Not application/json",
            "429": "As many requests as the key may have at once; Retry-After says when to come back",
            "503": "Too busy; Retry-After says when to come back",
            "504": "No answer in time",
        }
    )

    def asked(wire: encoder_wire.Wire) -> dict[str, Any]:
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

    return {path: asked(wire) for path, wire in wires.items()}


def text_paths(model: str, limits: Limits, *, updates: bool) -> tuple[Paths, Schemas]:
    """Chats, completions, tokens and, with `updates`, adapters; and the schemas of their bodies, from the types that read them."""
    bodies: dict[str, tuple[type[Wire], str]] = {
        "/v1/chat/completions": (ChatRequest, "Answer a conversation, whole or as server-sent events"),
        "/v1/completions": (CompletionRequest, "Continue texts or token ids"),
        "/tokenize": (TokenizeRequest, "Token ids of a text"),
        "/detokenize": (DetokenizeRequest, "The text of token ids"),
    }
    if updates:
        bodies["/v1/load_lora_adapter"] = (LoadAdapterRequest, "Make a LoRA adapter answer to a name")
        bodies["/v1/unload_lora_adapter"] = (UnloadAdapterRequest, "Forget a LoRA adapter")
    _, document = models_json_schema([(kind, "validation") for kind, _ in bodies.values()], ref_template="#/components/schemas/{model}")
    paths: Paths = {path: {"post": _operation(kind, summary, limits)} for path, (kind, summary) in bodies.items()}
    return paths, document["$defs"]


def _operation(kind: type[Wire], summary: str, limits: Limits) -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    told = {
        "400": "The body cannot be read, a field is wrong, or the prompt does not fit",
        "401": "No valid key",
        "403": "The key is for other models",
        "404": "No such model",
        "413": f"More than {limits.max_body_bytes:,} bytes",
        "415": "Not application/json",
        "429": "As many requests as the key may have at once; Retry-After says when to come back",
        "503": "Too busy; Retry-After says when to come back",
        "504": "No token in time",
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "OK"}, **_refused(told)},
    }


def _refused(told: Mapping[str, str]) -> dict[str, Any]:
    return {status: {"description": text, "content": {"application/json": {"schema": ERROR}}} for status, text in told.items()}


def docs_page(model: str, routes: Sequence[tuple[str, str]], form: str) -> str:
    """A page of routes with a form to try one; no script from elsewhere."""
    rows = "".join(f"<tr><td><code>{method} {escape(path)}</code></td></tr>" for method, path in routes)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(model)} · Danlu</title><style>
:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:760px;margin:40px auto;padding:0 20px}}
td{{padding:4px 18px 4px 0}}textarea,input{{width:100%;font:inherit}}textarea{{height:90px}}pre{{white-space:pre-wrap;border:1px solid #8886;border-radius:6px;padding:10px}}
</style></head><body><h1>{escape(model)}</h1><table>{rows}</table><p><a href="openapi.json">openapi.json</a></p>
<h2>Try it</h2>{form}<p><input id="k" type="password" aria-label="An API key" placeholder="API key, if one is needed" autocomplete="off"></p>
<p><button id="b">Ask</button></p><pre id="o"></pre></body></html>"""


def encoder_try_it(model: str, wire: encoder_wire.Wire) -> str:
    """A form that sends a body of the task's first route."""
    sample = escape(json.dumps(json.loads(wire.example) | {"model": model}, ensure_ascii=False, indent=1))
    return f"""<textarea id="t" aria-label="The body of a request">{sample}</textarea>
<script>onload=()=>b.onclick=async()=>{{const r=await fetch("{wire.path.removeprefix("/")}",{{method:"POST",headers:{_HEADERS},
body:t.value}});o.textContent=JSON.stringify(await r.json(),null,1)}}</script>"""


def text_try_it(model: str) -> str:
    """A form that asks a question and shows the answer as it comes."""
    return f"""<textarea id="t" aria-label="A message">Hello</textarea>
<script>onload=()=>b.onclick=async()=>{{o.textContent="";const r=await fetch("v1/chat/completions",{{method:"POST",headers:{_HEADERS},
body:JSON.stringify({{model:{_js(model)},stream:true,messages:[{{role:"user",content:t.value}}]}})}});
if(!r.ok){{o.textContent=JSON.stringify(await r.json(),null,1);return}}
const reader=r.body.pipeThrough(new TextDecoderStream()).getReader();let held="";for(;;){{const{{value,done}}=await reader.read();if(done)break;
const parts=(held+value).split("\\n\\n");held=parts.pop();for(const part of parts){{const data=part.slice(6);if(data==="[DONE]")continue;
const found=JSON.parse(data);o.textContent+=found.error?found.error.message:found.choices[0]?.delta?.content??""}}}}}}</script>"""


_HEADERS = '{"content-type":"application/json",...(k.value?{authorization:"Bearer "+k.value}:{})}'


def _js(text: str) -> str:
    return json.dumps(text).replace("<", "\\u003c")
