"""Where a service is and which of its models is meant; its answers as they stream."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from danlu import traces
from danlu.errors import RequestError, ResourceError, SpecError

BASE_URL, API_KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
"""Environment variables, as OpenAI's client has them. DANLU_API_KEY goes before."""
DEFAULT_URL = "http://127.0.0.1:8000"


def base_url(given: str | None) -> str:
    """The service's URL without `/v1`. SpecError if it is none."""
    url = given or os.environ.get(BASE_URL) or DEFAULT_URL
    try:
        is_url = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        is_url = False
    if not is_url:
        raise SpecError(f"{url!r} is no URL of a service", where="url", fix=DEFAULT_URL)
    return url.rstrip("/").removesuffix("/v1")


def headers() -> dict[str, str]:
    """The trace that goes on there, and the environment's key, if it has one: on a command line everybody could read it. SpecError if it
    cannot be sent."""
    for name in ("DANLU_API_KEY", API_KEY):
        if key := os.environ.get(name, "").strip():  # files of secrets end with a new line
            if not (key.isascii() and key.isprintable()):
                raise SpecError(
                    "it holds what no key does: other characters than letters, digits and signs", where=name, fix="copy it again"
                )
            return {**traces.carrier(), "authorization": f"Bearer {key}"}
    return traces.carrier()


def only_model(client: httpx.Client) -> str:
    """The base model of a service."""
    document = _json(client.get("/v1/models"))
    return str(document["data"][0]["id"])


def stream_chat(client: httpx.Client, model: str, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Pieces of the answer. RequestError says what the service refuses or broke off with."""
    body = {"model": model, "messages": list(messages), "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            _json(response)
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RequestError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text


def _json(response: httpx.Response) -> dict[str, Any]:
    """The document of a response; RequestError with the service's own words where it refuses."""
    try:
        document = response.json()
    except ValueError:
        raise ResourceError(
            f"{response.url} answers {response.status_code} and no JSON", where="url", fix="the URL of a Danlu or OpenAI service"
        ) from None
    if response.status_code != 200:
        told = document.get("error") if isinstance(document, dict) else None
        raise RequestError(
            str(told["message"]) if isinstance(told, dict) and "message" in told else response.text[:200],
            status=response.status_code,
            fix=f"a key in DANLU_API_KEY or {API_KEY}; danlu keys create makes one" if response.status_code == 401 else "",
        )
    assert isinstance(document, dict)
    return document
