"""The fields that chats and completions share: how tokens are chosen, what the answer must match, how it is sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from danlu.errors import RequestError
from danlu.serve.generation import Generation, Guide, Sampling
from danlu.serve.openai.common import Wire

Schema = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
NUM_SEEDS = 2**63
"""OpenAI's clients may send a negative seed; engines count them from zero."""


class StreamOptions(Wire):
    """How a stream ends."""

    include_usage: bool | None = None
    """One more chunk before the end, with the tokens that were read and made."""
    include_obfuscation: Literal[False] | None = None


class JsonSchemaFormat(Wire):
    """A named JSON Schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = {}
    strict: bool | None = None
    """Every answer follows its schema here, said strict or not."""


class TextFormat(Wire):
    type: Literal["text"]


class JsonObject(Wire):
    type: Literal["json_object"]


class JsonSchema(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


class SamplingFields(Wire):
    """Where OpenAI and vLLM have a field, it has their name, bounds and default. `null` is as if left out."""

    model: str | None = None
    """A name from `GET /v1/models`; the base model if left out."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: Annotated[TextFormat | JsonObject | JsonSchema, Field(discriminator="type")] | None = None

    user: str | None = None
    """As `metadata`, `safety_identifier`, `prompt_cache_key`: taken, not looked at."""
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    """Nothing is stored."""

    top_k: Annotated[int, Field(ge=-1)] | None = None
    """vLLM's, as are the following."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)] | None = None
    guided_json: Schema | str | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if bad := next((key for key in value or () if not key.isascii() or not key.isdigit() or len(key) > 9), None):
            raise ValueError(f"a token's id is needed as the key, not {bad!r}")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asks_for_json(self) -> bool:
        """Whether the answer is to be a document."""
        return self.guided_json is not None or isinstance(self.response_format, JsonObject | JsonSchema)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def check_stream_options(request: SamplingFields) -> None:
    """RequestError if they are given without a stream, as at OpenAI's."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("`stream_options` is for streams", param="stream_options", fix="stream: true, or leave it out")


def sampling(request: SamplingFields, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: bool = False) -> Sampling:
    """How tokens are chosen, as the engine is told."""
    default = Sampling()
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=default.temperature if request.temperature is None else request.temperature,
        top_p=default.top_p if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        seed=None if request.seed is None else request.seed % NUM_SEEDS,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=default.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias={int(key): value for key, value in (request.logit_bias or {}).items()},
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def guide(request: SamplingFields, of_tools: Guide | None = None) -> Guide | None:
    """The one guide that a request asks for; `of_tools` is that of its calls. RequestError if it asks for two that cannot both hold."""
    asked: list[tuple[str, Guide]] = [(of_tools.param, of_tools)] if of_tools else []
    match request.response_format:
        case JsonObject():
            asked.append(("response_format", Guide("json_object", param="response_format")))
        case JsonSchema(json_schema=given):
            asked.append(("response_format", Guide("json_schema", json.dumps(given.schema_), "response_format")))
    if request.guided_json is not None:
        asked.append(("guided_json", Guide("json_schema", _schema_text(request.guided_json), "guided_json")))
    if request.guided_regex is not None:
        asked.append(("guided_regex", Guide("regex", request.guided_regex, "guided_regex")))
    if request.guided_choice is not None:
        asked.append(("guided_choice", Guide("choice", json.dumps(request.guided_choice), "guided_choice")))
    if len(asked) == 2 and asked[0][1].kind == "tool_calls" and request.asks_for_json:
        return _calls_or(asked[0][1], asked[1][1])
    if len(asked) > 1:
        names = [name for name, _ in asked]
        raise RequestError(f"{' and '.join(names)} cannot both hold", param=names[-1], fix="one of them")
    return asked[0][1] if asked else None


def _calls_or(calls: Guide, answer: Guide) -> Guide:
    """Valid calls, or the document that was asked for."""
    schema = json.loads(answer.pattern) if answer.pattern else {"type": "object"}
    return replace(calls, pattern=json.dumps(json.loads(calls.pattern) | {"answer": schema, "answer_param": answer.param}))


def generations(
    prompts: Sequence[tuple[int, ...]], n: int, request_id: str, how: Sampling, adapter: str | None, guide: Guide | None
) -> list[Generation]:
    """n answers for each prompt, in order. With a seed the first has that seed and the others those after it, so that they differ."""
    return [
        Generation(
            request_id=f"{request_id}-{i * n + j}",
            prompt=prompt,
            sampling=how if how.seed is None or not j else replace(how, seed=(how.seed + j) % NUM_SEEDS),
            adapter=adapter,
            guide=guide,
        )
        for i, prompt in enumerate(prompts)
        for j in range(n)
    ]


def _schema_text(given: Schema | str) -> str:
    if isinstance(given, dict):
        return json.dumps(given)
    try:
        found = json.loads(given)
    except ValueError as error:
        raise RequestError(f"`guided_json` is not JSON: {error}", param="guided_json", fix="a JSON Schema") from error
    if not isinstance(found, dict):
        raise RequestError("`guided_json` is not an object", param="guided_json", fix="a JSON Schema")
    return given
