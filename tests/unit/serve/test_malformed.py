"""Bodies that are wrong in every way we could think of: each is refused in OpenAI's shape, at once, and the next request is answered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from lm import write_family

from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import TextEngine
from danlu.spec.serve import EchoText, Limits, Torch

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
GOOD = {
    CHAT: {"model": "echo", "messages": [{"role": "user", "content": "a"}]},
    COMPLETION: {"model": "echo", "prompt": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/nosuch"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}
VALUES: dict[str, list[Any]] = {
    "string": ["a", ""],
    "integer": [-(10**30), 10**30, -3],
    "number": [1e308, -0.5, 1.5],
    "boolean": [True],
    "array": [[], [[]], [None], [{}], [1e9], [["a", 1]]],
    "object": [{}, {"a": {}}, {"type": "x"}, {"1": 2e9}],
}
"""A few values of each JSON type, odd ones first of all."""

RAW = {
    "nothing": b"",
    "white space": b" \n",
    "half a document": b'{"messages": [',
    "two documents": b"{}{}",
    "a trailing comma": b'{"a": 1,}',
    "single quotes": b"{'messages': []}",
    "bytes that are no text": b'{"messages": "\xff\xfe"}',
    "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "ten thousand brackets": b"[" * 10_000,
    "ten thousand objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "a number of 10,000 digits": b'{"n": ' + b"9" * 10_000 + b"}",
    "no object": b'"messages"',
    "null": b"null",
    "not a number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "beyond the largest number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "a megabyte and more": b" " * 1_000_001,
}
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "no messages": (CHAT, {}),
    "another role": (CHAT, {"messages": [{"role": "robot", "content": "a"}]}),
    "no content": (CHAT, {"messages": [{"role": "user"}]}),
    "an assistant that says nothing": (CHAT, {"messages": [{"role": "assistant"}]}),
    "a tool's answer to nobody": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}),
    "arguments that are no JSON": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}]},
    ),
    "two tools of a name": (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}),
    "a choice without tools": (CHAT, {"tool_choice": "required"}),
    "a choice of another tool": (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ),
    "top_logprobs alone": (CHAT, {"top_logprobs": 2}),
    "stream_options alone": (CHAT, {"stream_options": {"include_usage": True}}),
    "two guides": (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}),
    "a guide that is no JSON": (CHAT, {"guided_json": "{"}),
    "a guide that is no schema": (CHAT, {"guided_json": {"type": "object", "required": 3}}),
    "a longer answer than fits": (CHAT, {"max_tokens": 10**6}),
    "a longer prompt than fits": (COMPLETION, {"prompt": "a" * 5000}),
    "an empty prompt": (COMPLETION, {"prompt": ""}),
    "an empty list of prompts": (COMPLETION, {"prompt": []}),
    "an empty list of ids": (COMPLETION, {"prompt": [[]]}),
    "texts and ids": (COMPLETION, {"prompt": ["a", 1]}),
    "a token that there is not": (COMPLETION, {"prompt": [10**6]}),
    "a token below nothing": (COMPLETION, {"prompt": [-1]}),
    "as many prompts as a book": (COMPLETION, {"prompt": ["a"] * 300}),
    "no answer at all": (COMPLETION, {"max_tokens": 0}),
    "an unknown model": (COMPLETION, {"model": "gpt"}),
    "an unknown token to show": ("/detokenize", {"tokens": [10**6]}),
    "a name that is a path": ("/v1/load_lora_adapter", {"lora_name": "../a"}),
    "an adapter that is not there": ("/v1/unload_lora_adapter", {}),
}


def make_engine(kind: str, folder: Path) -> TextEngine:
    if kind == "echo":
        return EchoTextEngine(EchoText())
    # Short: hundreds of answers go to the model's last position.
    return TorchEngine(Torch(model_name_or_path=str(write_family(folder, "qwen3")), dtype="fp32", max_model_len=24, kv_cache_memory_gb=0.1))


@pytest.fixture(scope="module", params=["echo", "torch"])
def client(
    request: pytest.FixtureRequest, served: Callable[..., AbstractContextManager[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    gateway = Gateway(
        make_engine(request.param, tmp_path_factory.mktemp("decoder")), "echo", Limits(), lambda *_, **__: None, lora_updates=True
    )
    with served(gateway) as url, httpx.Client(base_url=url, timeout=10) as found:
        yield found
        assert gateway.in_flight == 0


def check(response: httpx.Response, what: object) -> None:
    """An answer, or a refusal in OpenAI's shape that says something; never a failure."""
    assert response.status_code < 500, (what, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, what
        assert len(error["message"]) > 10, what


@pytest.mark.parametrize("path", GOOD)
def test_a_body_that_is_no_document_is_refused(path: str, client: httpx.Client) -> None:
    for name, body in RAW.items():
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        check(response, name)
        assert response.status_code in (400, 413), name


@pytest.mark.parametrize("name", WRONG)
def test_a_field_that_makes_no_sense_is_refused(name: str, client: httpx.Client) -> None:
    path, fields = WRONG[name]
    body = {} if name == "no messages" else GOOD[path] | fields
    response = client.post(path, json=body)
    check(response, name)
    assert response.status_code in (400, 404)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_every_field_with_values_of_every_type_is_answered_or_refused_as_the_document_says(path: str, client: httpx.Client) -> None:
    """Each field of our own OpenAPI document, with values of each JSON type: several hundred bodies."""
    document = client.get("/openapi.json").json()
    name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    fields = document["components"]["schemas"][name]["properties"]
    assert len(fields) > 30
    began, asked, refused = time.monotonic(), 0, 0
    for field, schema in fields.items():
        allowed = types_of(schema, document)
        for kind, values in VALUES.items():
            for value in values:
                body = json.dumps(GOOD[path] | {field: value}).encode()
                response = client.post(path, content=body, headers={"content-type": "application/json"})
                check(response, (field, value))
                asked, refused = asked + 1, refused + (response.status_code != 200)
                if kind not in allowed and not (kind == "integer" and "number" in allowed):
                    assert response.status_code in (400, 404), (field, value)
                if response.status_code == 400:
                    assert (response.json()["error"]["param"] or field).startswith(
                        (field, "stream_options", "top_logprobs", "tool", "max_tokens")
                    )
    assert asked > 200
    assert refused > 200
    assert time.monotonic() - began < 60
    assert client.post(path, json=GOOD[path]).status_code == 200


def types_of(schema: dict[str, Any], document: dict[str, Any]) -> set[str]:
    """JSON types a field may have, by the document."""
    if "$ref" in schema:
        return types_of(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    members = schema.get("anyOf", schema.get("oneOf", ()))
    if members:
        return set.union(*(types_of(member, document) for member in members))
    given = {type(value) for value in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]}
    named = {"boolean": bool, "string": str}
    return {schema["type"]} if "type" in schema else {name for name, kind in named.items() if kind in given}
