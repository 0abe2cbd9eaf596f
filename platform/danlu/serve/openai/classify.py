"""`/v1/classify`: texts in, labels and probabilities out, in the shape vLLM uses."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from danlu.errors import RequestError
from danlu.serve.engine import Answer, Input

EXAMPLE = '{"model": "NAME", "input": ["a text"]}'


@dataclass(frozen=True)
class ClassifyRequest:
    """`POST /v1/classify`, in the shape vLLM uses; an input may also be {"text": ..., "text_pair": ...}."""

    model: str | None
    inputs: list[Input]


def parse_classify(body: bytes, *, max_inputs: int) -> ClassifyRequest:
    """The request in a body; RequestError names the field, the rule and what would work."""
    try:
        document = json.loads(body)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}", fix="send JSON in UTF-8") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", fix=EXAMPLE) from error
    if not isinstance(document, dict):
        raise RequestError(f"an object is needed, not {type(document).__name__}", fix=EXAMPLE)
    model = document.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"`model` is a text, not {type(model).__name__}", param="model", fix="a name from GET /v1/models")
    if "input" not in document:
        raise RequestError("there is no `input`", param="input", fix=EXAMPLE)
    given = document["input"]
    items = given if isinstance(given, list) else [given]
    if not items:
        raise RequestError("`input` is an empty list: there is no text to classify", param="input", fix=EXAMPLE)
    if len(items) > max_inputs:
        raise RequestError(
            f"{len(items)} texts in one request; the limit is {max_inputs}",
            status=413,
            param="input",
            fix=f"send them {max_inputs} at a time",
        )
    return ClassifyRequest(model, [_input(item, "input" if item is given else f"input[{i}]") for i, item in enumerate(items)])


def classify_response(model: str, answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
    """vLLM's response to a classification, with the labels' names beside the probabilities."""
    tokens = sum(answer.num_tokens for answer in answers)
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {"index": i, "label": answer.label, "probs": answer.probabilities, "num_classes": len(labels)}
            for i, answer in enumerate(answers)
        ],
        "labels": list(labels),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def _input(item: object, where: str) -> Input:
    if isinstance(item, str):
        return Input(_text(item, where))
    if isinstance(item, dict):
        unknown = sorted(set(item) - {"text", "text_pair"})
        if unknown or "text" not in item:
            told = f"`{where}` has the unknown field {unknown[0]!r}" if unknown else f"`{where}` has no `text`"
            raise RequestError(told, param=where, fix='{"text": "...", "text_pair": "..."}')
        pair = item.get("text_pair")
        return Input(_text(item["text"], f"{where}.text"), None if pair is None else _text(pair, f"{where}.text_pair"))
    raise RequestError(f"`{where}` is {type(item).__name__}, not a text", param=where, fix=EXAMPLE)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"`{where}` is {type(value).__name__}, not a text", param=where, fix=EXAMPLE)
    if not value.strip():
        raise RequestError(f"`{where}` is empty", param=where, fix="a text with at least one word")
    return value
