"""What every body shares: how one is read, how a refusal reads, and the lists of models."""

from __future__ import annotations

import difflib
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from danlu.errors import RequestError
from danlu.serve.generation import Usage


class Wire(BaseModel):
    """Part of a request body. Closed: OpenAI refuses a field that it does not know, too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


Body = TypeVar("Body", bound=Wire)

INSTEAD = {
    "functions": "tools",
    "function_call": "tool_choice",
    "audio": "text only",
    "image_url": "a text: pictures are not read here",
    "input_audio": "a text: sound is not read here",
    "best_of": "n, and choose",
    "suffix": "the prompt alone",
    "max_completion_tokens": "max_tokens",
    "prediction": "leave it out",
    "reasoning_effort": 'chat_template_kwargs, with what the model\'s template knows: {"enable_thinking": false}',
    "web_search_options": "a tool of your own",
    "structured_outputs": "guided_json, guided_regex or guided_choice",
    "truncate_prompt_tokens": "leave it out: a text is cut at the model's own length",
}
"""Fields of OpenAI's and vLLM's that are not served here, and what to use."""


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in a body; RequestError names the field, the rule and what would work."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(kind, body, error.errors(include_url=False)) from error


def error_response(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object. `code` is OpenAI's word where it has one, else the status."""
    message = f"{error.problem}. Try: {error.fix}" if error.fix else error.problem
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.code or error.status}}


def unknown_field(param: str, known: Iterable[str]) -> RequestError:
    """Of a body that has a field it may not have, with the name that was meant."""
    name = param.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, 1)
    fix = INSTEAD.get(name) or (f"did you mean `{near[0]}`?" if near else "leave it out")
    return RequestError(f"unrecognized request argument: `{param}`", param=param, code="unknown_parameter", fix=fix)


@dataclass(frozen=True)
class ModelCard:
    """A model that is served: the base, or an adapter of it."""

    name: str
    parent: str | None = None
    root: str | None = None
    """Where an adapter was loaded from, if that is told."""
    max_model_len: int | None = None


def model_response(card: ModelCard, created: int) -> dict[str, Any]:
    """`GET /v1/models/{model}`; `parent`, `root` and `max_model_len` are vLLM's."""
    extras = {"parent": card.parent, "root": card.root or card.name, "max_model_len": card.max_model_len}
    found = {"id": card.name, "object": "model", "created": created, "owned_by": "danlu"}
    return found | (extras if card.max_model_len is not None else {})


def models_response(cards: Sequence[ModelCard], created: int) -> dict[str, Any]:
    """`GET /v1/models`."""
    return {"object": "list", "data": [model_response(card, created) for card in cards]}


def usage_response(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def new_id(kind: str) -> str:
    """`chatcmpl-...`, `cmpl-...`, `call_...`."""
    return f"{kind}{uuid.uuid4().hex[:24]}"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(document: object) -> bytes:
    """A server-sent event."""
    return b"data: " + _encode(document).encode() + b"\n\n"


class TextEvents:
    """Server-sent events that differ in one text alone: `document` has it where HOLE stands, and is written once.

    Of the events of a stream nearly all are of this kind.
    """

    HOLE = "\0text\0"

    def __init__(self, document: object) -> None:
        self.before, self.after = event(document).split(_encode(self.HOLE).encode())

    def event(self, text: str) -> bytes:
        return self.before + _encode(text).encode() + self.after


DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


def _refusal(kind: type[Wire], body: bytes, errors: list[ErrorDetails]) -> RequestError:
    first = errors[0]
    if first["type"] == "json_invalid":
        try:
            body.decode()
        except UnicodeDecodeError as error:
            return RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}", fix="send JSON in UTF-8")
        return RequestError(f"the body is not JSON: {first['ctx']['error']}", fix="a JSON object")
    if first["type"] in ("model_type", "model_attributes_type") and not first["loc"]:
        return RequestError("the body has to be a JSON object", fix=_example(kind))
    document = json.loads(body)
    # A union gives an error for each of its members: the one that got furthest is about what was meant.
    first = max(errors, key=lambda error: sum(map(_place(document, error["loc"])[0].count, ".[")))
    param, value = _place(document, first["loc"])
    if first["type"] == "missing":
        return RequestError(f"you must provide `{param}`", param=param, fix=_example(kind))
    if first["type"] == "extra_forbidden":
        return unknown_field(param, kind.model_fields if len(first["loc"]) == 1 else ())
    rules = dict.fromkeys(_rule(error) for error in errors if _place(document, error["loc"])[0] == param)
    told = json.dumps(value, ensure_ascii=False)
    return RequestError(
        f"`{param}` is {told if len(told) < 80 else told[:80] + '...'}; {' or '.join(rules)}",
        param=param,
        fix=INSTEAD.get(value, "") if isinstance(value, str) else "",
    )


def _place(document: Any, loc: Sequence[int | str]) -> tuple[str, Any]:
    """A pydantic location as a path in the document (it also has names of union members in it), and what stands there."""
    path, value = "", document
    for at, part in enumerate(loc):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(part, str) and isinstance(value, dict) and (part in value or at == len(loc) - 1):
            path, value = f"{path}.{part}" if path else part, value.get(part)
    return path, value


def _rule(error: ErrorDetails) -> str:
    if error["type"] == "union_tag_invalid":
        return f"its {error['ctx']['discriminator']} should be one of {error['ctx']['expected_tags']}"
    text = error["msg"].removeprefix("Value error, ").replace("Input should", "it should").replace(" after validation", "")
    if error["type"] == "literal_error":
        text = text.replace("True", "true").replace("False", "false")  # as JSON writes them
    return text[:1].lower() + text[1:]


def _example(kind: type[Wire]) -> str:
    examples = kind.model_config.get("json_schema_extra") or {}
    found = examples.get("examples") if isinstance(examples, dict) else None
    return json.dumps(found[0], ensure_ascii=False) if isinstance(found, list) else ""
